"""Selection biases: what they measure, when they move, and that they balance."""

import keras
import numpy as np
import pytest
import reference_routers as oracle
from backends import FAST_MODE, assert_close, compiled, to_numpy
from keras import ops
from layer_checks import array

from keras_moe import layers, metrics, routers
from keras_moe import ops as moe_ops

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
    router = make(routers.LossFreeBias(rate=0.1))
    mask = np.arange(T) < 10
    counts = array(router(SKEWED, mask=mask, training=True).counts)
    step = 0.1 * np.sign(counts.mean() - counts)
    assert_close(array(router.selection_bias), step - step.mean())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_one_step_of_the_quantile_bias_against_the_oracle(top_k):
    router = make(routers.QuantileBias(), top_k)
    mask = np.arange(T) < 11
    router(SKEWED, mask=mask, training=True)
    scores = 1 / (1 + np.exp(-SKEWED.astype("float64"))) + 1e-7
    expected = oracle.quantile_bias(scores, np.zeros(E), top_k, mask)
    assert_close(array(router.selection_bias), expected - expected.mean())


def test_momentum_keeps_a_share_of_the_old_bias():
    slow, fast = (make(routers.QuantileBias(momentum=share)) for share in (0.75, 0.0))
    for router in (slow, fast):
        router(SKEWED, training=True)
    assert_close(array(slow.selection_bias), 0.25 * array(fast.selection_bias))


def test_where_all_experts_serve_there_is_nothing_to_balance():
    router = make("quantile", top_k=E)
    router(SKEWED, training=True)
    assert not array(router.selection_bias).any()


@pytest.mark.parametrize("balancer", ["loss_free", "quantile"])
def test_a_batch_of_padding_moves_nothing(balancer):
    router = make(balancer)
    router(SKEWED, training=True)
    before = array(router.selection_bias)
    router(np.full_like(SKEWED, np.nan), mask=np.zeros(T, bool), training=True)
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


def test_a_bias_moves_the_selection_and_no_weight_of_the_chosen():
    router = make("loss_free", renormalize=False)
    router.selection_bias.assign([-10.0, 0.0, 0.0, 10.0])
    routing = to_numpy(router(SKEWED))
    assert (routing.indices[:, 0] == 3).all() and not (routing.indices == 0).any()
    scores = 1 / (1 + np.exp(-SKEWED.astype("float64"))) + 1e-7
    assert_close(routing.weights, np.take_along_axis(scores, routing.indices, axis=1))


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


@pytest.mark.parametrize("balancer", [routers.LossFreeBias(0.02), routers.QuantileBias()])
def test_a_skewed_router_is_balanced_within_fifty_steps(balancer):
    router = make(balancer)
    tokens = np.random.default_rng(1).normal(size=(256, E)) + [2.0, 0.5, 0.0, -1.0]
    tokens = tokens.astype("float32")
    variables = router.non_trainable_variables

    def step(state, tokens):
        routing, state = router.stateless_call(
            [ops.convert_to_tensor(router.kernel)], state, tokens, training=True
        )
        return routing.counts, state

    step = compiled(step, FAST_MODE)
    state = [array(variable) for variable in variables]
    first, _ = step(state, tokens)
    for _ in range(50):
        counts, state = step(state, tokens)
    assert array(metrics.load_imbalance(first)) > 0.5
    assert array(metrics.load_imbalance(counts)) < 0.1


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras refuses it on PyTorch")
def test_several_steps_in_one_execution_move_the_bias_as_often():
    def fit(steps):
        keras.utils.set_random_seed(0)
        bank = layers.FeedForwardExperts(E, 4)
        layer = layers.MixtureOfExperts(bank, router=make("loss_free"), router_losses=())
        model = keras.Sequential([keras.Input((E,)), layer])
        model.compile(keras.optimizers.SGD(0.0), "mse", steps_per_execution=steps)
        x = np.tile(SKEWED, (4, 1))
        model.fit(x, x, batch_size=T, epochs=1, shuffle=False, verbose=0)
        return array(layer.router.selection_bias)

    one = fit(1)
    assert np.abs(one).max() > 2e-3
    assert_close(fit(4), one)


def test_the_smooth_load_equals_the_oracle():
    rng = np.random.default_rng(2)
    clean, noise = rng.normal(size=(2, T, E))
    deviation = rng.uniform(0.5, 1.5, size=(T, E))
    noisy = clean + noise * deviation
    mask = rng.random(T) < 0.8
    for top_k in (1, 2, E):
        load = moe_ops.noisy_load(
            *(ops.convert_to_tensor(a.astype("float32")) for a in (clean, noisy, deviation)),
            top_k,
            ops.convert_to_tensor(mask),
        )
        assert_close(array(load), oracle.noisy_load(clean, noisy, deviation, top_k, mask))
