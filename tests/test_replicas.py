"""Data parallelism on TensorFlow and PyTorch: a step on several replicas is one device's."""

import functools
import json
import tempfile

import keras
import numpy as np
import pytest
from backends import BACKEND
from replicas_models import EVERY_LAYER, GLOBAL_LAYERS, assert_equal, free_ports, results_of, start

from keras_moe import layers

pytestmark = pytest.mark.backends("tensorflow", "torch")
on_tensorflow, on_torch = pytest.mark.backends("tensorflow"), pytest.mark.backends("torch")


@functools.cache
def trained_on_tensorflow():
    (results,) = results_of([start("replicas_tensorflow.py")])
    return results


@functools.cache
def trained_on(number):
    """The results of each process: TensorFlow has one for all replicas, PyTorch one for each."""
    if BACKEND == "tensorflow":
        return [trained_on_tensorflow()[str(number)]]
    # As `torchrun` does.
    group = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    group["MASTER_PORT"] = str(free_ports(1)[0])
    with tempfile.TemporaryDirectory() as folder:
        ranks = range(number)
        processes = [start("replicas_torch.py", folder, **group, RANK=str(each)) for each in ranks]
        return results_of(processes)


def assert_as_one_device(part, layer, same_batch=True):
    (one,) = trained_on(1)
    for two in trained_on(2):
        assert_equal(two[part], one[part], layer, 2, same_batch)


@pytest.mark.parametrize("layer", ["dense", *EVERY_LAYER])
def test_a_step_of_the_same_batch_on_two_replicas_is_that_of_one_device(layer):
    assert_as_one_device("all", layer)


@pytest.mark.parametrize("layer", GLOBAL_LAYERS)
def test_a_batch_split_over_replicas_is_balanced_as_one(layer):
    counts = trained_on(1)[0]["split"]["weights"][f"{layer}/expert_counts/1"]
    assert np.any(np.not_equal(counts, 8 * 6 * 2 / 4))
    assert_as_one_device("split", layer, same_batch=False)


PARTS = [
    *(("fit", layer) for layer in ("dense", "plain", *GLOBAL_LAYERS)),
    ("merged", "plain"),  # between layers of Keras that wait for other replicas
    *(("xla", layer) for layer in ("dense", "plain")),
]


@on_tensorflow
@pytest.mark.parametrize("part, layer", PARTS)
def test_a_training_on_two_replicas_is_that_of_one_device(part, layer):
    assert_as_one_device(part, layer)


@on_tensorflow
def test_what_is_logged_on_replicas_is_what_one_device_logs():
    (one,), (two,) = trained_on(1), trained_on(2)
    losses = [each["all"]["logs"]["loss"] for each in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    one, two = one["fit"]["logs"], two["fit"]["logs"]
    assert two.keys() == one.keys() and "val_plain_load_imbalance" in one
    for key, values in one.items():
        np.testing.assert_allclose(two[key], values, rtol=1e-5, atol=1e-6, err_msg=key)


@on_tensorflow
def test_a_sum_over_replicas_in_a_compiled_part_is_an_error():
    assert "`merge_call` called while" in trained_on(2)[0]["error"]


@on_tensorflow
def test_two_workers_balance_their_batch_as_one():
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    workers = []
    for index in range(2):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        workers.append(start("replicas_tensorflow.py", TF_CONFIG=json.dumps(config)))
    (one,) = trained_on(1)
    for trained in results_of(workers):
        for layer in GLOBAL_LAYERS:
            assert_equal(trained["split"], one["split"], layer, 2, same_batch=False)


@on_torch
@pytest.mark.parametrize("is_stacked", [True, False])
def test_distributions_that_split_weights_are_refused(is_stacked, monkeypatch):
    experts = [keras.layers.Dense(4), keras.layers.Dense(4)]
    bank = layers.FeedForwardExperts(2, 8) if is_stacked else layers.LayerExperts(experts)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "model parallel")
    with pytest.raises(ValueError, match="under model parallel"):
        bank.build((None, 4))


@on_torch
@pytest.mark.parametrize("bank", ["dense", "gated", "layer", "constant"])
def test_experts_without_tokens_need_no_search_for_unused_parameters(bank):
    assert_as_one_device("idle", f"{bank}_bank")


@on_torch
def test_one_process_evaluates_alone():
    if hasattr(keras.Model, "quantization_summary"):
        pytest.skip("Keras 3.16 evaluates in all processes together")
    (one,), (two, other) = trained_on(1), trained_on(2)
    assert other["alone"] == {} and "global_load_imbalance" in two["alone"]
    for key, value in one["alone"].items():
        np.testing.assert_allclose(two["alone"][key], value, rtol=1e-5, atol=1e-6, err_msg=key)


KINDS = [(1, "experts", 1), (2, "experts", 2), (2, "copies", 1), (4, "experts", 4), (4, "grid", 2)]


@on_torch
@pytest.mark.parametrize(("processes", "kind", "shares"), KINDS)
def test_experts_in_several_processes_are_those_of_one_and_saved_whole(processes, kind, shares):
    (one,) = trained_on(1)
    several = [each[kind] for each in trained_on(processes)]
    outputs = np.concatenate([each["outputs"] for each in several])
    np.testing.assert_allclose(outputs, one["experts"]["outputs"], rtol=1e-5, atol=1e-6)
    for each in several:
        assert each["num_parameters"] * shares == one["experts"]["num_parameters"]
        np.testing.assert_array_equal(each["loaded"], each["outputs"])


@on_torch
@pytest.mark.parametrize(("processes", "kind"), [(2, "experts"), (4, "grid")])
def test_second_derivatives_of_shared_experts_are_those_of_one_process(processes, kind):
    (one,) = trained_on(1)
    # The mean of what two processes sum, each for its own half of the kernels.
    halves = [2 * np.asarray(each[kind]["second"]) for each in trained_on(processes)]
    expected = np.split(np.asarray(one["experts"]["second"]), 2)
    for half, own in zip(halves, expected * (processes // 2)):
        np.testing.assert_allclose(half, own, rtol=1e-3, atol=1e-4 * np.abs(own).max())


@on_torch
def test_processes_of_one_seed_draw_different_dropout():
    assert [each["draws_alike"] for each in trained_on(2)] == [False, False]


@on_torch
def test_numbers_and_processes_that_do_not_fit_are_an_error():
    received = ["no process group", "experts=3", "data=4", "must divide the number of experts"]
    for each in trained_on(4):
        for message, words in zip(each["errors"], received, strict=True):
            assert words in message
