"""Data parallelism on PyTorch: a step of two processes is that of one."""

import functools
import tempfile

import keras
import numpy as np
import pytest
from replicas_models import EVERY_LAYER, GLOBAL_LAYERS, assert_equal, free_ports, results_of, start

from keras_moe import layers

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="processes of torch.distributed"
)

SCRIPT = "replicas_torch.py"


@pytest.mark.parametrize("is_stacked", [True, False])
def test_distributions_that_split_weights_are_refused(is_stacked, monkeypatch):
    experts = [keras.layers.Dense(4), keras.layers.Dense(4)]
    bank = layers.FeedForwardExperts(2, 8) if is_stacked else layers.LayerExperts(experts)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "model parallel")
    with pytest.raises(ValueError, match="under model parallel"):
        bank.build((None, 4))


@functools.cache
def trained_in(processes):
    """The results of each process, started as `torchrun` does."""
    group = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        ranks = range(processes)
        return results_of([start(SCRIPT, folder, **group, RANK=str(rank)) for rank in ranks])


def both():
    (one,) = trained_in(1)
    return [(two, one) for two in trained_in(2)]


@pytest.mark.parametrize("layer", ["dense", *EVERY_LAYER])
def test_a_step_of_the_same_batch_in_two_processes_is_that_of_one(layer):
    for two, one in both():
        assert_equal(two["all"], one["all"], layer, 2, same_batch=True)


@pytest.mark.parametrize("bank", ["dense", "gated", "layer", "constant"])
def test_experts_without_tokens_need_no_search_for_unused_parameters(bank):
    for two, one in both():
        assert_equal(two["idle"], one["idle"], f"{bank}_bank", 2, same_batch=True)


@pytest.mark.parametrize("layer", GLOBAL_LAYERS)
def test_a_batch_split_over_processes_is_balanced_as_one(layer):
    for two, one in both():
        assert_equal(two["split"], one["split"], layer, 2, same_batch=False)


def test_one_process_evaluates_alone():
    (two, one), (other, _) = both()
    if hasattr(keras.Model, "quantization_summary"):
        pytest.skip("Keras 3.16 evaluates in all processes together")
    assert other["alone"] == {} and "global_load_imbalance" in two["alone"]
    for key, value in one["alone"].items():
        np.testing.assert_allclose(two["alone"][key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    ("processes", "kind", "shares"), [(2, "experts", 2), (4, "experts", 4), (4, "grid", 2)]
)
def test_experts_in_several_processes_are_those_of_one(processes, kind, shares):
    (one,) = trained_in(1)
    several = [each[kind] for each in trained_in(processes)]
    outputs = np.concatenate([each["outputs"] for each in several])
    np.testing.assert_allclose(outputs, one["experts"]["outputs"], rtol=1e-5, atol=1e-6)
    for each in several:
        assert each["num_parameters"] * shares == one["experts"]["num_parameters"]


@pytest.mark.parametrize(
    ("processes", "kind"), [(1, "experts"), (2, "experts"), (4, "experts"), (4, "grid")]
)
def test_saved_experts_come_back_in_every_process(processes, kind):
    for each in trained_in(processes):
        np.testing.assert_array_equal(each[kind]["loaded"], each[kind]["outputs"])


def test_a_process_group_says_who_shares_experts():
    groups = [each["groups"] for each in trained_in(4)]
    # Of the ranks 0 and 2, and of 1 and 3: so 0 and 1 hold the same experts, and 2 and 3.
    assert [each["own"] for each in groups] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [each["gradient"] for each in groups] == [3 / 4, 3 / 4, 7 / 4, 7 / 4]


def test_numbers_and_processes_that_do_not_fit_are_an_error():
    received = ["experts=3", "data=4", "process group of 4", "[(0,), (1, 2, 3)]"]
    received = ["no process group", *received, "must divide the number of experts"]
    for each in trained_in(4):
        for message, words in zip(each["errors"], received, strict=True):
            assert words in message
