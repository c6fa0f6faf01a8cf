"""Routers as layers: what they compute, in which precision, and their noise in training."""

import keras
import numpy as np
import pytest
import reference
from backends import FAST_MODE, assert_close, compiled, to_numpy, to_tensors
from keras import ops

from keras_moe import layers, routers, surgery

TOKENS = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")


def route(router, tokens=TOKENS, **kwargs):
    return to_numpy(router(to_tensors(tokens), **to_tensors_of(kwargs)))


def to_tensors_of(kwargs):
    return {
        name: to_tensors(value) if isinstance(value, np.ndarray) else value
        for name, value in kwargs.items()
    }


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_router_is_a_matrix_product_and_a_routing(top_k):
    router = routers.TopKRouter(4, top_k)
    router.build(TOKENS.shape)
    kernel = np.random.default_rng(1).normal(size=(6, 4)).astype("float32")
    router.kernel.assign(kernel)
    mask = np.arange(16) % 3 > 0
    routing = route(router, mask=mask)
    logits = TOKENS.astype("float64") @ kernel
    expected = reference.top_k_routing(logits, top_k, mask)
    assert_close(routing.logits[mask], logits[mask])
    assert_close(routing.weights, expected.weights)
    np.testing.assert_array_equal(routing.indices[mask], expected.indices[mask])
    np.testing.assert_array_equal(routing.counts, expected.counts)
    assert routing.dropped == 0


def test_a_dense_mixture_is_a_sparse_one_of_all_experts_which_can_become_sparse(tmp_path):
    def model_with(router):
        experts = layers.FeedForwardExperts(4, 3)
        return keras.Sequential([keras.Input((6,)), layers.MixtureOfExperts(experts, router)])

    dense, sparse = model_with(routers.DenseRouter()), model_with(routers.TopKRouter(top_k=4))
    dense.layers[-1].router.kernel.assign(np.random.default_rng(1).normal(size=(6, 4)))
    dense.save_weights(tmp_path / "dense.weights.h5")
    sparse.load_weights(tmp_path / "dense.weights.h5")
    assert_close(to_numpy(sparse(TOKENS)), to_numpy(dense(TOKENS)), tolerance=1e-5)
    for router in (dense.layers[-1].router, routers.DenseRouter(4)):
        with pytest.raises(TypeError, match="a `TopKRouter` has a `top_k` that can be set"):
            router.top_k = 1
    with pytest.raises(ValueError, match="computes what a `DenseRouter` does"):
        surgery.set_top_k(dense, 1)
    surgery.set_top_k(sparse, 1)


@pytest.mark.parametrize("policy", ["float16", "mixed_float16", "bfloat16", "mixed_bfloat16"])
def test_a_router_computes_in_float32_whatever_the_policy_around_it(policy):
    keras.config.set_dtype_policy(policy)
    router = routers.TopKRouter(4, kernel_initializer=keras.initializers.RandomNormal(seed=1))
    routing = route(router)
    assert router.kernel.dtype == "float32"
    assert routing.logits.dtype == routing.probs.dtype == routing.weights.dtype == np.float32
    # 1 + 1e-4 is 1 in half precision.
    kernel = ops.convert_to_numpy(router.kernel)
    assert_close(routing.logits, TOKENS.astype("float64") @ kernel)


@pytest.mark.parametrize("noise", [{"input_jitter": 0.1}, {"logit_noise": 0.1}])
def test_noise_is_drawn_in_training_only(noise):
    quiet, noisy = routers.TopKRouter(4, seed=3), routers.TopKRouter(4, seed=3, **noise)
    expected = route(quiet).logits
    for training in (False, None):
        np.testing.assert_array_equal(route(noisy, training=training).logits, expected)
    assert np.all(route(noisy, training=True).logits != expected)


@pytest.mark.parametrize("noise", [{"input_jitter": 0.1}, {"logit_noise": 0.1}])
def test_noise_follows_its_seed_and_is_new_at_every_call(noise):
    one, same, other = (routers.TopKRouter(4, seed=seed, **noise) for seed in (3, 3, 4))
    for router in (one, same, other):
        router.build(TOKENS.shape)
        router.kernel.assign(np.ones((6, 4)))
    first, repeated = route(one, training=True).logits, route(same, training=True).logits
    np.testing.assert_array_equal(first, repeated)
    assert np.any(route(one, training=True).logits != first)
    assert np.any(route(other, training=True).logits != first)


def test_input_jitter_is_a_factor_close_to_one_of_its_own_for_every_feature():
    router = routers.TopKRouter(2, input_jitter=0.25, seed=0)
    router.build((None, 2))
    router.kernel.assign(np.eye(2))
    factors = route(router, np.ones((4000, 2), "float32"), training=True).logits
    assert np.min(factors) >= 0.75 and np.max(factors) <= 1.25
    # Uniform: the mean is 1 and the standard deviation 0.5 / sqrt(12), up to 1 / sqrt(8000).
    assert abs(np.mean(factors) - 1.0) < 0.01
    assert abs(np.std(factors) - 0.5 / np.sqrt(12)) < 0.01
    assert np.mean(factors[:, 0] != factors[:, 1]) > 0.99


def test_logit_noise_is_normal_with_its_standard_deviation():
    router = routers.TopKRouter(4, logit_noise=0.5, kernel_initializer="zeros", seed=0)
    noise = route(router, np.ones((2000, 3), "float32"), training=True).logits
    assert abs(np.mean(noise)) < 0.03
    assert abs(np.std(noise) - 0.5) < 0.03


def test_jitter_reaches_the_router_and_not_the_experts():
    # A single expert gets every token with weight 1, whatever the router sees.
    layer = layers.MixtureOfExperts(
        layers.FeedForwardExperts(1, 8), routers.TopKRouter(1, top_k=1, input_jitter=0.5)
    )
    outputs, routing = to_numpy(layer(TOKENS, training=False, return_routing=True))
    jittered, jittered_routing = to_numpy(layer(TOKENS, training=True, return_routing=True))
    assert np.all(jittered_routing.logits != routing.logits)
    assert_close(jittered, outputs)


@pytest.mark.parametrize("noise", [{"input_jitter": 0.1}, {"logit_noise": 0.1}])
def test_noise_gives_padding_no_part(noise):
    router = routers.TopKRouter(4, **noise)
    tokens, mask = TOKENS.copy(), np.arange(16) < 10
    tokens[~mask] = np.nan
    routing = route(router, tokens, mask=mask, training=True)
    assert np.sum(routing.counts) == 20
    assert np.all(np.isfinite(routing.weights)) and not np.any(routing.weights[~mask])


@pytest.mark.parametrize("content", [np.nan, np.inf, 1e30])
def test_padding_of_any_content_changes_no_routing(content):
    router = routers.TopKRouter(4)
    router.build((None, 6))
    tokens, mask = TOKENS.copy(), np.arange(16) < 10
    tokens[~mask] = content
    padded, truncated = route(router, tokens, mask=mask), route(router, TOKENS[:10])
    np.testing.assert_array_equal(padded.counts, truncated.counts)
    np.testing.assert_array_equal(padded.indices[:10], truncated.indices)
    assert_close(padded.weights[:10], truncated.weights)
    assert not np.any(padded.weights[10:])


def test_a_single_token_and_a_batch_of_padding_are_routed():
    router = routers.TopKRouter(4)
    assert np.sum(route(router, TOKENS[:1]).counts) == 2
    nothing = route(router, mask=np.zeros(16, bool))
    assert not np.any(nothing.counts) and not np.any(nothing.weights)


def test_the_default_router_starts_small_and_uses_all_experts():
    router = routers.TopKRouter(8, seed=0)
    tokens = np.random.default_rng(0).normal(size=(1000, 64)).astype("float32")
    routing = route(router, tokens)
    assert abs(np.std(ops.convert_to_numpy(router.kernel)) - 0.02) < 0.003
    assert np.all(routing.counts > 0)


def test_a_compiled_router_equals_the_eager_one():
    router = routers.TopKRouter(4)
    eager = route(router)
    compiled_routing = compiled(router, FAST_MODE)(TOKENS)
    for one, other in zip(compiled_routing, eager):
        assert_close(one, other)


def test_a_symbolic_call_gives_the_shapes_and_dtypes_of_a_real_one():
    symbolic, real = routers.TopKRouter(4)(keras.Input((6,))), routers.TopKRouter(4)(TOKENS)
    for one, other in zip(symbolic[:-1], real[:-1]):
        assert len(one.shape) == len(other.shape)
        assert all(a in (None, b) for a, b in zip(one.shape, other.shape))
        assert one.dtype == keras.backend.standardize_dtype(other.dtype)


def test_a_router_without_a_rule_says_what_to_write():
    router = routers.Router(num_experts=2)
    with pytest.raises(NotImplementedError, match="must implement `route\\(tokens, mask, train"):
        router.route(TOKENS, None, False)


def test_top_k_names_a_router_with_its_defaults():
    router = routers.get("top_k", num_experts=6)
    assert type(router) is routers.TopKRouter
    assert (router.num_experts, router.top_k) == (6, 2)


@pytest.mark.parametrize("name", routers.BY_NAME)
def test_a_layer_has_the_losses_that_suit_its_router(name):
    by_losses = {
        ("LoadBalance", "RouterZ"): ("cosine", "gshard", "switch", "top_k", "top_p"),
        ("ImportanceVariation", "LoadVariation"): ("noisy_top_k", "v_moe"),
    }
    expected = [classes for classes, names in by_losses.items() if name in names] or [()]
    layer = layers.MixtureOfExperts(layers.FeedForwardExperts(4, 8), router=name)
    assert [tuple(type(loss).__name__ for loss in layer.router_losses)] == expected
    assert layers.MixtureOfExperts(layer.experts, name, router_losses=()).router_losses == ()
