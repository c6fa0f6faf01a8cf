"""Many devices and processes, each check in processes of its own; and what other backends say."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_moe.distribution import expert_parallel

BACKEND = keras.backend.backend()
PROCESSES = pathlib.Path(__file__).with_name("two_processes.py")
CHECKS = pathlib.Path(__file__).with_name("on_eight_devices.py")


@pytest.mark.skipif(BACKEND != "jax", reason="Keras splits weights on JAX only")
def test_eight_devices_give_what_one_gives():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(CHECKS), "-p", "no:cacheprovider", "-q"],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            # Compiling takes most of the time.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.skipif(BACKEND != "jax", reason="Keras splits weights on JAX only")
def test_two_processes_give_what_one_gives():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [start(0, 0), start(port, 0), start(port, 1)]
    outputs = [process.communicate(timeout=300) for process in running]
    for process, (_, errors) in zip(running, outputs):
        assert process.returncode == 0, errors[-2000:]
    alone, *two = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    for result in two:
        np.testing.assert_allclose(result["loss"], alone["loss"], rtol=1e-5)
        for actual, expected in zip(result["state"], alone["state"], strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def start(port, number):
    arguments = [sys.executable, str(PROCESSES), str(port), str(number)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(BACKEND == "jax", reason="a wrong setting of devices is checked with them")
def test_what_a_backend_cannot_split_is_an_error():
    wrong, message = {
        "tensorflow": ({}, "Keras splits no weights on TensorFlow"),
        "torch": ({"devices": ["cpu:0"]}, "`devices` and `layout_map` are for JAX"),
    }[BACKEND]
    with pytest.raises(ValueError, match=message):
        expert_parallel(4, **wrong)
