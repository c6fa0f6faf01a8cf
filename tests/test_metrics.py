"""Expert usage: pure functions of counts, and the Keras metrics of the same names."""

import keras
import numpy as np
import pytest
import reference
from backends import MODES, assert_close, compiled
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_moe import metrics
from keras_moe.ops import top_k_routing

OF_COUNTS = ("load_imbalance", "load_entropy", "dead_experts", "expert_share")
TOTALS = {
    "load_imbalance": metrics.LoadImbalance,
    "load_entropy": metrics.LoadEntropy,
    "dead_experts": metrics.DeadExperts,
    "dropped_fraction": metrics.DroppedFraction,
    "expert_share": metrics.ExpertShare,
}
CLASSES = {**TOTALS, "dead_experts_over_window": metrics.DeadExpertsOverWindow}


def expected_value(name, counts, dropped):
    counts = [int(count) for count in counts]
    if name == "dropped_fraction":
        return reference.dropped_fraction(dropped, counts)
    return getattr(reference, name)(counts)


HAND_COMPUTED = [
    # counts, imbalance, entropy, dead experts
    ([5, 5, 5, 5], 0.0, 1.0, 0),
    ([8, 0, 0, 0], 3.0, 0.0, 3),
    ([4, 4, 0, 0], 1.0, 0.5, 2),
    ([6, 2], 0.5, 0.811278124, 0),
    ([0, 0, 0], 0.0, 0.0, 3),
    ([7], 0.0, 1.0, 0),
    ([0], 0.0, 0.0, 1),
]


@pytest.mark.parametrize(("counts", "imbalance", "entropy", "dead"), HAND_COMPUTED)
def test_usage_of_small_examples_is_what_a_hand_computes(counts, imbalance, entropy, dead):
    counts = np.array(counts, "int32")
    assert_close(ops.convert_to_numpy(metrics.load_imbalance(counts)), imbalance)
    assert_close(ops.convert_to_numpy(metrics.load_entropy(counts)), entropy)
    assert float(metrics.dead_experts(counts)) == dead
    assert_close(reference.load_imbalance(counts), imbalance)
    assert_close(reference.load_entropy(counts), entropy, tolerance=1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_experts", [1, 2, 7])
def test_usage_of_drawn_counts_equals_the_oracle(num_experts, mode):
    function = compiled(
        lambda counts, dropped: (
            *(getattr(metrics, name)(counts) for name in OF_COUNTS),
            metrics.dropped_fraction(dropped, counts),
        ),
        mode,
    )

    @given(st.lists(st.integers(0, 10**6), min_size=num_experts, max_size=num_experts), st.data())
    def check(counts, data):
        dropped = data.draw(st.integers(0, sum(counts)))
        results = function(np.array(counts, "int32"), np.float32(dropped))
        for name, result in zip((*OF_COUNTS, "dropped_fraction"), results):
            assert result.dtype == np.float32
            # 1 is taken from the ratio of loads: what is left of a small imbalance is rounded.
            scale = max(1.0, np.max(expected_value(name, counts, dropped)))
            assert_close(result, expected_value(name, counts, dropped), scale=scale)

    check()


def routing_of(logits, mask=None, dropped=0.0):
    routing = top_k_routing(ops.convert_to_tensor(logits), 2, mask)
    return routing._replace(dropped=ops.convert_to_tensor(dropped, "float32"))


@pytest.mark.parametrize("name", TOTALS)
def test_a_metric_sums_all_routings_since_its_last_reset(name):
    rng = np.random.default_rng(0)
    metric = TOTALS[name](num_experts=5)
    for _ in range(2):
        counts, dropped = np.zeros(5), 0.0
        for num_tokens, fraction in ((7, 0.5), (20, 0.0), (3, 1 / 3)):
            logits = rng.normal(size=(num_tokens, 5)) - np.arange(5.0) ** 2
            logits = logits.astype("float32")
            mask = np.arange(num_tokens) != 1
            metric.update_state(routing_of(logits, ops.convert_to_tensor(mask), fraction))
            batch = reference.top_k_routing(logits, 2, mask).counts
            counts, dropped = counts + batch, dropped + fraction * np.sum(batch)
        value = ops.convert_to_numpy(metric.result())
        assert_close(value, expected_value(name, counts, dropped))
        metric.reset_state()
    np.testing.assert_array_equal(
        ops.convert_to_numpy(metric.result()), expected_value(name, [0] * 5, 0)
    )


@pytest.mark.parametrize("window", [1, 2, 3, 6])
def test_experts_are_dead_that_had_nothing_in_a_window_of_batches(window):
    rng = np.random.default_rng(window)
    batches = rng.integers(0, 9, (5, 5)) * (rng.random((5, 5)) < 0.3)
    batches[:, 4] = 0
    metric = metrics.DeadExpertsOverWindow(num_experts=5, window=window)
    routing = routing_of(np.zeros((3, 5), "float32"))
    for last in range(1, 6):
        counts = ops.convert_to_tensor(batches[last - 1].astype("int32"))
        metric.update_state(routing._replace(counts=counts))
        seen = batches[:last].astype("int32")
        expected = reference.dead_experts_over_window(seen, window)
        assert float(metric.result()) == expected
        assert float(metrics.dead_experts_over_window(seen, window)) == expected
    metric.reset_state()
    assert float(metric.result()) == 0


@pytest.mark.parametrize("name", CLASSES)
def test_padding_counts_in_no_metric(name):
    logits = np.random.default_rng(0).normal(size=(9, 5)).astype("float32")
    padded = np.concatenate([logits, np.full((4, 5), np.nan, "float32")])
    plain, masked = CLASSES[name](5), CLASSES[name](5)
    plain.update_state(routing_of(logits))
    masked.update_state(routing_of(padded, ops.arange(13) < 9))
    np.testing.assert_array_equal(
        ops.convert_to_numpy(masked.result()), ops.convert_to_numpy(plain.result())
    )


@pytest.mark.parametrize("name", CLASSES)
def test_a_metric_survives_its_config(name):
    metric = CLASSES[name](num_experts=5, name="mine")
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert type(restored) is CLASSES[name]
    assert restored.get_config() == metric.get_config()
    assert restored.name == "mine" and restored.num_experts == 5


def test_a_metric_is_named_after_its_function():
    for name, metric in CLASSES.items():
        assert metric(3).name.startswith(name)


def test_a_routing_of_another_number_of_experts_is_named():
    with pytest.raises(ValueError) as error:
        metrics.DeadExperts(num_experts=3).update_state(routing_of(np.zeros((2, 4), "float32")))
    assert str(error.value) == (
        "The routing must have as many experts as the metric. Received: 4 experts, num_experts=3. "
        "Make the metric with num_experts=4."
    )


def test_a_sample_weight_is_refused():
    with pytest.raises(ValueError) as error:
        metrics.DeadExperts(4).update_state(routing_of(np.zeros((2, 4), "float32")), [1.0, 1.0])
    assert str(error.value) == (
        "Usage metrics count assignments and take no weight. Received: sample_weight. "
        "Mask tokens out at the router."
    )


@pytest.mark.parametrize("num_experts", [0, -1, 2.0, None, True])
def test_a_number_of_experts_that_is_none_is_named(num_experts):
    with pytest.raises(ValueError) as error:
        metrics.ExpertShare(num_experts)
    assert str(error.value) == (
        f"`num_experts` must be a positive integer. Received: num_experts={num_experts!r}. "
        "Pass an integer of at least 1."
    )
