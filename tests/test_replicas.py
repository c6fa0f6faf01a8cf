"""Data parallelism on TensorFlow: a step on several replicas is one device's."""

import functools
import json

import keras
import numpy as np
import pytest
from replicas_models import EVERY_LAYER, GLOBAL_LAYERS, assert_equal, free_ports, results_of, start

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="replicas of tf.distribute"
)


@functools.cache
def trained_on(replicas):
    (result,) = results_of([start("replicas_tensorflow.py", replicas)])
    return result


@pytest.mark.parametrize("layer", ["dense", *EVERY_LAYER])
def test_a_step_of_the_same_batch_on_two_replicas_is_that_of_one_device(layer):
    one, two = trained_on(1)["all"], trained_on(2)["all"]
    np.testing.assert_allclose(two["logs"]["loss"], one["logs"]["loss"], rtol=1e-6)
    assert_equal(two, one, layer, 2, same_batch=True)


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
def test_a_sum_over_replicas_in_a_compiled_part_is_an_error(layer):
    assert "Put `tf.function` around `strategy.run`" in trained_on(2)["errors"][layer]


@pytest.mark.parametrize("layer", GLOBAL_LAYERS)
def test_a_batch_split_over_replicas_is_balanced_as_one(layer):
    one, two = trained_on(1)["split"], trained_on(2)["split"]
    assert np.any(np.not_equal(one["weights"][f"{layer}/expert_counts/1"], 8 * 6 * 2 / 4))
    assert_equal(two, one, layer, 2, same_batch=False)


def test_two_workers_balance_their_batch_as_one():
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    workers = []
    for index in range(2):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        workers.append(start("replicas_tensorflow.py", TF_CONFIG=json.dumps(config)))
    for trained in results_of(workers):
        for layer in GLOBAL_LAYERS:
            assert_equal(trained["split"], trained_on(1)["split"], layer, 2, same_batch=False)
