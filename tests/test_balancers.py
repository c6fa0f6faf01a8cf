"""Selection biases: what they measure, when they move, and that they balance."""

import keras
import numpy as np
import pytest
import reference_routers as oracle
from backends import FAST_MODE, assert_close, compiled, on_each_backend, on_one_backend
from keras import ops
from layer_checks import array

from keras_moe import metrics, routers
from keras_moe.routers.noisy import noisy_load

pytestmark = on_one_backend

T, E = 16, 4
RNG = np.random.default_rng(0)
SKEWED = (RNG.normal(size=(T, E)) + [2.0, 0.5, 0.0, -1.0]).astype("float32")


def make(balancer, top_k=2, **kwargs):
    router = routers.TopKRouter(
        E,
        top_k,
        score="sigmoid",
        balancer=balancer,
        kernel_initializer=keras.initializers.Identity(),
        **kwargs,
    )
    router.build((None, E))
    return router


def test_one_step_of_the_loss_free_bias_against_the_formula():
    router = make(routers.LossFreeBias(rate=0.1), top_k=1)
    mask = np.arange(T) < 10
    counts = array(router(SKEWED, mask=mask, training=True).counts)
    step = 0.1 * np.sign(counts.mean() - counts)
    assert abs(step.mean()) > 0.01
    assert_close(array(router.selection_bias), step - step.mean())


@pytest.mark.parametrize("top_k", [1, 2, 3, E])
def test_one_step_of_the_quantile_bias_against_the_oracle(top_k):
    """Where all experts serve there is nothing to balance."""
    mask = np.arange(T) < 11
    scores = oracle.SCORES["sigmoid"](SKEWED.astype("float64"))
    expected = oracle.quantile_bias(scores, np.zeros(E), top_k, mask) if top_k < E else np.zeros(E)
    for momentum in (0.0, 0.75):
        router = make(routers.QuantileBias(momentum), top_k)
        router(SKEWED, mask=mask, training=True)
        bias = array(router.selection_bias)
        assert_close(bias, (1 - momentum) * (expected - expected.mean()))


@pytest.mark.parametrize("balancer", ["loss_free", "quantile"])
def test_a_batch_of_padding_moves_nothing(balancer):
    router = make(balancer)
    router(SKEWED, training=True)
    before = array(router.selection_bias)
    router(np.full_like(SKEWED, np.nan), mask=np.zeros(T, bool), training=True)
    router(SKEWED[:0], training=True)
    assert_close(array(router.selection_bias), before, scale=1.0)


def test_a_bias_is_frozen_in_evaluation_and_when_told_to_be():
    router = make("loss_free")
    router(SKEWED)
    router(SKEWED, training=True, indices=np.tile([[0, 1]], (T, 1)))
    router.updates_selection_bias = False
    router(SKEWED, training=True)
    router.updates_selection_bias, router.trainable = True, False
    router(SKEWED, training=True)
    assert not array(router.selection_bias).any()
    router.trainable = True
    router(SKEWED, training=True)
    assert array(router.selection_bias).any()


def test_accumulated_batches_move_the_loss_free_bias_as_one_batch():
    """Also where an expert has exactly the mean load, which three thirds of it may miss."""
    whole, parts = make(routers.LossFreeBias()), make(routers.LossFreeBias(accumulation_steps=3))
    for seed in range(4):
        tokens = np.random.default_rng(seed).normal(size=(12, E)).astype("float32")
        before = array(parts.selection_bias)
        for part in np.split(tokens, 3):
            np.testing.assert_array_equal(array(parts.selection_bias), before)
            parts(part, training=True)
        whole(tokens, training=True)
        assert_close(array(parts.selection_bias), array(whole.selection_bias))


def test_accumulated_batches_move_the_quantile_bias_to_the_mean_of_theirs():
    parts, ones = make(routers.QuantileBias(accumulation_steps=2)), []
    for tokens in (SKEWED[:8], SKEWED[8:]):
        ones.append(make(routers.QuantileBias()))
        for router in (parts, ones[-1]):
            router(tokens, training=True)
    assert_close(array(parts.selection_bias), sum(array(one.selection_bias) for one in ones) / 2)


@on_each_backend
@pytest.mark.parametrize("balancer", [routers.LossFreeBias(0.02), routers.QuantileBias()])
def test_a_skewed_router_is_balanced_within_fifty_steps(balancer):
    router = make(balancer)
    tokens = np.random.default_rng(1).normal(size=(256, E)) + [2.0, 0.5, 0.0, -1.0]
    tokens = tokens.astype("float32")

    def step(state, tokens):
        routing, state = router.stateless_call(
            [ops.convert_to_tensor(router.kernel)], state, tokens, training=True
        )
        return routing.counts, state

    step = compiled(step, FAST_MODE)
    state = [array(variable) for variable in router.non_trainable_variables]
    assert metrics.load_imbalance(step(state, tokens)[0]) > 0.5
    for _ in range(50):
        counts, state = step(state, tokens)
    assert metrics.load_imbalance(counts) < 0.1


def test_the_smooth_load_equals_the_oracle():
    rng = np.random.default_rng(2)
    clean, noise = rng.normal(size=(2, T, E))
    deviation = rng.uniform(0.5, 1.5, size=(T, E))
    arrays = clean, clean + noise * deviation, deviation
    mask = rng.random(T) < 0.8
    tensors = [ops.convert_to_tensor(each.astype("float32")) for each in arrays]
    for top_k in (1, 2, E):
        load = noisy_load(*tensors, top_k, ops.convert_to_tensor(mask))
        assert_close(array(load), oracle.noisy_load(*arrays, top_k, mask))
