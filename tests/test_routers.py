"""Routers as layers: their experts, their precision, and their noise in training."""

import contextlib

import keras
import numpy as np
import pytest
from backends import BACKEND, assert_close, to_numpy, to_tensors
from keras import ops

from keras_moe import layers, routers

TOKENS = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
NOISES = [{"input_jitter": 0.1}, {"logit_noise": 0.1}]


def route(router, tokens=TOKENS, **kwargs):
    return to_numpy(router(to_tensors(tokens), **kwargs))


def test_a_dense_mixture_is_a_sparse_one_of_all_experts():
    dense, sparse = routers.DenseRouter(4), routers.TopKRouter(4, 4)
    expected = route(dense)
    sparse.build(TOKENS.shape)
    sparse.set_weights(dense.get_weights())
    routing = route(sparse)
    weights = np.take_along_axis(routing.weights, np.argsort(routing.indices, axis=1), axis=1)
    assert_close(weights, expected.weights)
    assert_close(expected.counts, 4 * expected.weights.sum(0))  # by weight, as all serve all
    np.testing.assert_array_equal(routing.counts, 16)


def autocast():
    if BACKEND != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("policy", ["float16", "mixed_bfloat16"])
def test_a_router_computes_in_float32_whatever_is_around_it(policy):
    keras.config.set_dtype_policy(policy)
    router = routers.NoisyTopKRouter(4, kernel_initializer=keras.initializers.RandomNormal(seed=1))
    with autocast():
        routing = route(router, training=True)
    assert router.kernel.dtype == "float32"
    assert routing.logits.dtype == routing.probs.dtype == routing.weights.dtype == np.float32
    # 1 + 1e-4 is 1 in half precision.
    kernel = ops.convert_to_numpy(router.kernel)
    assert_close(routing.logits, TOKENS.astype("float64") @ kernel)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_drawn_in_training_only_and_padding_has_no_part(noise):
    quiet, noisy = routers.TopKRouter(4, seed=3), routers.TopKRouter(4, seed=3, **noise)
    expected = route(quiet).logits
    np.testing.assert_array_equal(route(noisy).logits, expected)
    mask = np.arange(16) < 10
    routing = route(noisy, np.where(mask[:, None], TOKENS, np.nan), mask=mask, training=True)
    assert np.all(routing.logits[mask] != expected[mask])
    assert np.sum(routing.counts) == 20
    assert np.all(np.isfinite(routing.weights)) and not np.any(routing.weights[~mask])


@pytest.mark.parametrize("noise", NOISES)
def test_noise_follows_its_seed_and_is_new_at_every_call(noise):
    one, same, other = (routers.TopKRouter(4, seed=seed, **noise) for seed in (3, 3, 4))
    for router in (one, same, other):
        router.build(TOKENS.shape)
        router.kernel.assign(np.ones((6, 4)))
    first, repeated = route(one, training=True).logits, route(same, training=True).logits
    np.testing.assert_array_equal(first, repeated)
    assert np.any(route(one, training=True).logits != first)
    assert np.any(route(other, training=True).logits != first)


@pytest.mark.backends("tensorflow", "torch")  # JAX would compile each operation
def test_input_jitter_is_uniform_for_every_feature_and_logit_noise_is_normal():
    eye = keras.initializers.Identity()
    router = routers.TopKRouter(2, input_jitter=0.25, kernel_initializer=eye, seed=0)
    factors = route(router, np.ones((4000, 2), "float32"), training=True).logits
    assert np.min(factors) >= 0.75 and np.max(factors) <= 1.25
    # Uniform: the mean is 1 and the standard deviation 0.5 / sqrt(12), up to 1 / sqrt(8000).
    assert abs(np.mean(factors) - 1.0) < 0.01
    assert abs(np.std(factors) - 0.5 / np.sqrt(12)) < 0.01
    assert np.mean(factors[:, 0] != factors[:, 1]) > 0.99
    router = routers.TopKRouter(2, logit_noise=0.5, kernel_initializer="zeros", seed=0)
    noise = route(router, np.ones((4000, 2), "float32"), training=True).logits
    assert abs(np.mean(noise)) < 0.03
    assert abs(np.std(noise) - 0.5) < 0.03


@pytest.mark.backends("tensorflow", "torch")  # JAX would compile each operation
def test_jitter_reaches_the_router_and_not_the_experts():
    # A single expert gets every token with weight 1, whatever the router sees.
    router = routers.TopKRouter(input_jitter=0.5)
    layer = layers.MixtureOfExperts(layers.FeedForwardExperts(1, 8), router)
    outputs, routing = to_numpy(layer(TOKENS, training=False, return_routing=True))
    jittered, jittered_routing = to_numpy(layer(TOKENS, training=True, return_routing=True))
    assert np.all(jittered_routing.logits != routing.logits)
    assert_close(jittered, outputs)


def test_the_default_router_starts_small_and_uses_all_experts():
    router = routers.TopKRouter(8, seed=0)
    tokens = np.random.default_rng(0).normal(size=(1000, 64)).astype("float32")
    routing = route(router, tokens)
    assert abs(np.std(ops.convert_to_numpy(router.kernel)) - 0.02) < 0.003
    assert np.all(routing.counts > 0)


def test_a_symbolic_call_gives_the_shapes_and_dtypes_of_a_real_one():
    symbolic, real = routers.TopKRouter(4)(keras.Input((6,))), routers.TopKRouter(4)(TOKENS)
    for one, other in zip(symbolic[:-1], real[:-1]):
        assert len(one.shape) == len(other.shape)
        assert all(a in (None, b) for a, b in zip(one.shape, other.shape))
        assert one.dtype == keras.backend.standardize_dtype(other.dtype)


def test_what_keras_layers_take_is_taken():
    router = routers.TopKRouter(np.int64(4), top_k=np.array(2), seed=np.int64(1))
    router.build(np.array([16, 6]))
    mask = np.arange(16) < 10
    expected = route(router, mask=mask)
    for given in (mask.tolist(), mask.astype("int32"), ops.convert_to_tensor(mask)):
        np.testing.assert_array_equal(route(router, mask=given).counts, expected.counts)
    replayed = route(router, mask=mask, indices=expected.indices.tolist(), training=1)
    assert_close(replayed.weights, expected.weights)
    assert router.get_config()["top_k"] == 2


@pytest.mark.parametrize("name", routers.BY_NAME)
def test_a_router_by_name_fits_its_layer(name):
    by_losses = {
        ("LoadBalance", "RouterZ"): ("cosine", "gshard", "switch", "top_k", "top_p"),
        ("ImportanceVariation", "LoadVariation"): ("noisy_top_k", "v_moe"),
    }
    expected = [classes for classes, names in by_losses.items() if name in names] or [()]
    layer = layers.MixtureOfExperts(layers.FeedForwardExperts(4, 8), router=name)
    assert [tuple(type(loss).__name__ for loss in layer.router_losses)] == expected
    assert layer.router.num_experts == 4 and layer.router.max_top_k <= 4
    if name == "deepseek_v3":
        with pytest.raises(ValueError, match="num_experts=1"):
            routers.get(name, num_experts=1)
    else:
        router = routers.get(name, num_experts=1)
        assert (router.top_k, router.max_top_k) == (1, 1)
