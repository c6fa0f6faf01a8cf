"""Many devices and processes, each check in processes of its own; and what other backends say."""

import pathlib

import numpy as np
import pytest
from backends import run_python
from replicas_models import free_ports, results_of, start

CHECKS = pathlib.Path(__file__).with_name("on_eight_devices.py")


@pytest.mark.backends("jax")  # Keras splits weights there only
def test_eight_devices_give_what_one_gives():
    run_python(
        *("-m", "pytest", CHECKS, "-p", "no:cacheprovider", "-q"),
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # Compiling takes most of the time.
    )


@pytest.mark.backends("jax")
def test_two_processes_give_what_one_gives():
    (port,) = free_ports(1)
    processes = [start("two_processes.py", *each) for each in ((0, 0), (port, 0), (port, 1))]
    alone, *two = results_of(processes)
    for result in two:
        np.testing.assert_allclose(result["loss"], alone["loss"], rtol=1e-5)
        for actual, expected in zip(result["state"], alone["state"], strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
