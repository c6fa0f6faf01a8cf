"""Data parallelism on TensorFlow: a step on several replicas is one device's."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import losses, routers
from keras_moe.routers import balancers

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="replicas of tf.distribute"
)

PACKAGE = pathlib.Path(keras_moe.__file__).parent
SCRIPT = pathlib.Path(__file__).with_name("replicas_tensorflow.py")
# They add up over replicas, so for the same batch on each there is so many times as much.
COUNTERS = {
    "expert_counts",
    "dropped_count",
    "router_loss_totals",
    "router_entropy_total",
    "call_count",
    "global_counts",
}
EVERY_LAYER = [
    *(f"loss_{name}" for name in losses.BY_NAME),
    *(f"balancer_{name}" for name in balancers.BY_NAME),
    *(f"router_{name}" for name in routers.BY_NAME),
]
GLOBAL_LAYERS = [*(f"balancer_{name}" for name in balancers.BY_NAME), "strength", "global"]


def start(*args, **variables):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, args)],
        # The package that is tested, wherever that was imported from.
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process):
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]
    return json.loads(output.splitlines()[-1])


@functools.cache
def trained_on(replicas):
    return result_of(start(replicas))


def assert_equal(actual, expected, layer, replicas, same_batch):
    """The weights of a layer, trained on several replicas and on one."""
    names = [name for name in expected["weights"] if name.startswith(f"{layer}/")]
    assert names
    for name in names:
        weight = name.split("/")[1]
        factor = replicas if same_batch and weight in COUNTERS else 1
        if not same_batch and weight in COUNTERS - {"expert_counts", "global_counts"}:
            continue  # Means of several batches are not those of one.
        np.testing.assert_allclose(
            actual["weights"][name],
            np.multiply(expected["weights"][name], factor),
            rtol=1e-5,
            atol=1e-6,
            err_msg=name,
        )


@pytest.mark.parametrize("layer", ["dense", *EVERY_LAYER])
def test_a_step_of_the_same_batch_on_two_replicas_is_that_of_one_device(layer):
    one, two = trained_on(1)["all"], trained_on(2)["all"]
    np.testing.assert_allclose(two["logs"]["loss"], one["logs"]["loss"], rtol=1e-6)
    assert_equal(two, one, layer, 2, same_batch=True)


@pytest.mark.parametrize("layer", ["dense", "plain", *GLOBAL_LAYERS])
def test_a_step_on_four_replicas_is_that_of_one_device(layer):
    assert_equal(trained_on(4)["few"], trained_on(1)["few"], layer, 4, same_batch=True)


@pytest.mark.parametrize("layer", ["dense", "plain", *GLOBAL_LAYERS])
def test_fit_of_the_same_batch_on_two_replicas_is_that_of_one_device(layer):
    assert_equal(trained_on(2)["fit"], trained_on(1)["fit"], layer, 2, same_batch=True)


def test_what_is_logged_on_replicas_is_what_one_device_logs():
    one, two = trained_on(1)["fit"]["logs"], trained_on(2)["fit"]["logs"]
    assert two.keys() == one.keys() and "val_plain_load_imbalance" in one
    for key, values in one.items():
        np.testing.assert_allclose(two[key], values, rtol=1e-5, atol=1e-6, err_msg=key)


def test_a_layer_of_keras_that_waits_for_other_replicas_loses_no_router_loss():
    assert_equal(trained_on(2)["merged"], trained_on(1)["merged"], "plain", 2, same_batch=True)


@pytest.mark.parametrize("layer", ["dense", "plain"])
def test_a_step_that_xla_compiles_on_each_replica_is_that_of_one_device(layer):
    assert_equal(trained_on(2)["xla"], trained_on(1)["xla"], layer, 2, same_batch=True)


@pytest.mark.parametrize("layer", GLOBAL_LAYERS)
def test_a_sum_over_replicas_inside_of_a_compiled_part_is_an_error_that_says_so(layer):
    assert "Put `tf.function` around `strategy.run`" in trained_on(2)["errors"][layer]


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("layer", GLOBAL_LAYERS)
def test_a_batch_split_over_replicas_is_balanced_as_one(layer, replicas):
    one, several = trained_on(1)["split"], trained_on(replicas)["split"]
    assert np.any(np.not_equal(one["weights"][f"{layer}/expert_counts/1"], 8 * 6 * 2 / 4))
    assert_equal(several, one, layer, replicas, same_batch=False)


def test_two_workers_balance_their_batch_as_one():
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    workers = []
    for index in range(2):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        workers.append(start(TF_CONFIG=json.dumps(config)))
    for worker in workers:
        trained = result_of(worker)["split"]
        for layer in GLOBAL_LAYERS:
            assert_equal(trained, trained_on(1)["split"], layer, 2, same_batch=False)
