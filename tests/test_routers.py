"""Routers against the oracle, their precision and their noise in training."""

import contextlib

import keras
import numpy as np
import pytest
import reference_routers as oracle
from backends import (
    BACKEND,
    FAST_MODE,
    assert_close,
    compiled,
    differentiated,
    most_bytes,
    on_each_backend,
    on_one_backend,
    to_numpy,
    to_tensors,
    trace,
    unless_compiled,
)
from drawn import MASKS, SKEWS, draw_logits, draw_mask
from forced_router import ForcedRouter
from keras import ops
from layer_checks import gradients, normal

from keras_moe import layers, losses, routers


def make(name, *arguments, **kwargs):
    # The kernel is the identity: tokens are logits.
    identity = keras.initializers.Identity()
    return getattr(routers, f"{name}Router")(*arguments, kernel_initializer=identity, **kwargs)


def bias_of(num_experts):
    return np.linspace(-0.4, 0.3, num_experts).astype("float32")


def biased(*arguments, **kwargs):
    router = make(*arguments, score="sigmoid", balancer="loss_free", **kwargs)
    router.build((None, router.num_experts))
    router.selection_bias.assign(bias_of(router.num_experts))
    router.updates_selection_bias = False
    return router


def hashed(e, k, s):
    router = routers.HashRouter(e, vocabulary_size=7, top_k=k)
    router.build(None)
    table = ops.convert_to_numpy(router.table)
    return router, oracle.fixed(table[np.arange(100) % 7], e)


def forced(e, k, s):
    first = np.arange(100)[:, None] * k
    return ForcedRouter(e, k), oracle.fixed((first + np.arange(k)) % e, e)


def groups(e, k, s):
    router = make("GroupLimited", 3 * e, num_groups=e, top_groups=k, top_k=k)
    return router, oracle.top_k(k, "sigmoid", groups=(e, k))


def biased_groups(e, k, s):
    router = biased("GroupLimited", 2 * e, num_groups=e, top_groups=1, top_k=1)
    return router, oracle.top_k(1, "sigmoid", groups=(e, 1), bias=bias_of(2 * e))


def dselect(per_example):
    def case(e, k, s):
        router = routers.DSelectKRouter(e, k, per_example, gamma=1.5)
        router.build((None, e))
        rng = np.random.default_rng(1)
        kernel, bias = (rng.normal(0, s, (e, router.bias.shape[0])) for s in (0.4, 0.5))
        router.bias.assign(bias[0])
        if per_example:
            router.kernel.assign(kernel)
        kernel = kernel if per_example else 0.0 * kernel
        return router, oracle.dselect_k(kernel, bias[0], router.top_k, 1.5, e)

    return case


T, E, S = 12, 4, 4

# From E, K and the length of a sequence to a router and its oracle.
CASES = {
    "top_k": lambda e, k, s: (make("TopK", e, k), oracle.top_k(k)),
    "switch": lambda e, k, s: (make("TopK", e, 1), oracle.top_k(1)),
    "not renormalized": lambda e, k, s: (
        make("TopK", e, k, renormalize=False),
        oracle.top_k(k, renormalize=False),
    ),
    "sigmoid": lambda e, k, s: (
        make("TopK", e, k, "sigmoid", scaling_factor=2.5),
        oracle.top_k(k, "sigmoid", scale=2.5),
    ),
    "sqrt_softplus": lambda e, k, s: (
        make("TopK", e, k, "sqrt_softplus"),
        oracle.top_k(k, "sqrt_softplus"),
    ),
    "selection bias": lambda e, k, s: (
        biased("TopK", e, k),
        oracle.top_k(k, "sigmoid", bias=bias_of(e)),
    ),
    "group_limited": groups,
    "groups and bias": biased_groups,
    "noisy_top_k": lambda e, k, s: (make("NoisyTopK", e, k), oracle.top_k(k)),
    "v_moe": lambda e, k, s: (make("VMoE", e, k), oracle.top_k(k, renormalize=False)),
    "gshard": lambda e, k, s: (make("GShard", e), oracle.top_k(min(e, 2))),
    "cosine": lambda e, k, s: (
        make("Cosine", e, projection_dim=e, top_k=k),
        oracle.of_directions(oracle.top_k(k), scale=2.0),
    ),
    "top_p": lambda e, k, s: (make("TopP", e, threshold=0.6, max_top_k=k), oracle.top_p(0.6, k)),
    "relu": lambda e, k, s: (make("ReLU", e, 1, max_top_k=k), oracle.relu(k)),
    "dense": lambda e, k, s: (make("Dense", e), oracle.dense),
    "dselect_k": dselect(per_example=True),
    "dselect_k for all": dselect(per_example=False),
    "expert_choice": lambda e, k, s: (
        make("ExpertChoice", e, capacity_factor=0.75 * k),
        oracle.expert_choice(0.75 * k, s),
    ),
    "soft": lambda e, k, s: (
        make("Soft", e, slots=k),
        oracle.of_directions(oracle.soft_routing(k)),
    ),
    "sinkhorn": lambda e, k, s: (make("Sinkhorn", e, k, 5), oracle.sinkhorn(5, k)),
    "sinkhorn in evaluation": lambda e, k, s: (make("Sinkhorn", e), oracle.top_k(1, "sigmoid")),
    "balanced_assignment": lambda e, k, s: (
        make("BalancedAssignment", e),
        oracle.balanced_assignment,
    ),
    "balanced_assignment in evaluation": lambda e, k, s: (
        make("BalancedAssignment", e),
        oracle.top_k(1, "sigmoid"),
    ),
    "hash": hashed,
    "forced": forced,
}
# Their oracle is that of training, of the others that of evaluation.
TRAINED = ("sinkhorn", "balanced_assignment")
# E, K, the length of sequences, and how many there are.
SIZES = [(5, 2, 4, 3), (4, 4, 7, 1), (1, 1, 5, 2), (3, 1, 1, 3)]
# Compiled are those with operations of their own, for one size.
EXAMPLES = 8 if BACKEND == "torch" else 1
COMPILED = ["groups and bias", "top_p", "dselect_k", "expert_choice", "soft", "sinkhorn"]
COMPILED += ["balanced_assignment"]


def is_sure(route, logits, mask, rng):
    """Whether no rounding changes who is chosen."""
    chosen = route(logits, mask)[0] > 0
    moved = (logits + 1e-4 * rng.normal(size=logits.shape) for _ in range(4))
    return all((chosen == (route(other, mask)[0] > 0)).all() for other in moved)


def draw(router, route, num_tokens, seed):
    rng = np.random.default_rng(seed)
    features = router.num_experts * getattr(router, "slots", 1)
    while True:
        logits = draw_logits(rng, num_tokens, features, SKEWS[seed % 3], preference=3.0)
        mask = draw_mask(rng, num_tokens, MASKS[seed % 4])
        if is_sure(route, logits, mask, rng):
            return logits, mask


def routing_of(router, tokens, mask, length, training):
    return router(
        tokens,
        mask=mask,
        training=training,
        sequence_length=length,
        token_ids=ops.arange(tokens.shape[0]),
    )


def dense_weights(routing):
    """(T, E) combine weights, wherever the places are."""
    experts = ops.arange(routing.probs.shape[-1], dtype="int32")
    chosen = ops.expand_dims(routing.indices, -1) == experts
    return ops.sum(ops.where(chosen, ops.expand_dims(routing.weights, -1), 0.0), axis=1)


@pytest.mark.parametrize("name", unless_compiled(CASES, COMPILED))
def test_a_router_of_any_size_equals_the_oracle_whatever_padding_holds(name, mode):
    for example in range(EXAMPLES):
        e, k, length, number = SIZES[example % len(SIZES)]
        router, expected = CASES[name](e, k, length)
        num_tokens = length * number
        logits, mask = draw(router, expected, num_tokens, example)
        padded = np.where(mask[:, None], logits, [np.nan, 0, np.inf][example % 3])

        def function(tokens, mask, router=router, length=length):
            routing = routing_of(router, tokens, mask, length, name in TRAINED)
            return routing, dense_weights(routing)

        routing, weights = compiled(function, mode)(padded.astype("float32"), mask)
        expected_weights, probs = expected(logits, mask)[:2]
        assert_close(weights, expected_weights)
        assert_close(routing.probs[mask], probs[mask])
        counts = np.sum(expected_weights > 0, axis=0)
        if name == "soft":  # Experts run on slots.
            counts = np.full(e, number * k)
        if name in ("dense", "dselect_k", "dselect_k for all"):  # A share of the gate's weights.
            shares = expected_weights.sum(0) / max(expected_weights.sum(), 1e-7)
            assert_close(routing.counts, counts.sum() * shares)
        else:
            np.testing.assert_array_equal(routing.counts, counts)
        assert routing.indices.shape == (num_tokens, router.max_top_k)
        assert routing.indices.dtype == np.int32
        assert all(np.dtype(a.dtype) == "float32" for a in (routing.weights, routing.probs))
        assert not np.isnan(routing.weights).any()


@on_each_backend
def test_nan_in_one_column_of_the_kernel_is_not_hidden():
    router = routers.TopKRouter(E, top_k=2, score="sigmoid")
    router.build((None, 8))
    router.kernel.assign(np.where(np.arange(E) == 1, np.nan, normal(8, E)))
    routing = router(normal(6, 8))
    assert np.isnan(keras.ops.convert_to_numpy(routing.weights)).any(axis=1).all()


@pytest.mark.parametrize("factor, has_nan", [(1.6, False), (2.0, True)])
def test_experts_choose_a_token_of_nan_last(factor, has_nan, mode):
    logits, mask = normal(6, 2), np.arange(6) < 5
    logits[1] = np.nan
    router, expected = (
        make("ExpertChoice", 2, capacity_factor=factor),
        oracle.expert_choice(factor, 6),
    )
    routing = compiled(lambda *given: routing_of(router, *given, 6, False), mode)(logits, mask)
    weights = to_numpy(dense_weights(routing))
    np.testing.assert_allclose(weights, expected(logits, mask)[0], rtol=1e-5)
    assert np.isnan(routing.weights[1]).all() == has_nan and not np.isnan(routing.weights[2:]).any()


@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.parametrize("training", [False, True])
def test_every_router_can_be_traced(training):
    for name in CASES:
        router, _ = CASES[name](E, 2, S)
        features = router.num_experts * getattr(router, "slots", 1)
        if not router.built:
            router.build((None, features))
        weights = to_numpy([w.value for w in router.trainable_variables])
        state = to_numpy([w.value for w in router.non_trainable_variables])

        def call(weights, state, tokens, mask, router=router):
            context = {"sequence_length": S, "token_ids": ops.arange(T)}
            return router.stateless_call(
                weights, state, tokens, mask=mask, training=training, **context
            )

        trace(call, weights, state, normal(T, features), np.arange(T) % 5 > 0)


@on_one_backend
def test_no_router_is_left_out():
    assert set(routers.IDENTIFIERS) | {"hash", "forced"} <= set(CASES)


LEARNED = [name for name in CASES if name not in ("hash", "forced", "dselect_k for all")]


@pytest.mark.parametrize("name", unless_compiled(LEARNED, COMPILED))
def test_gradients_equal_differences_of_the_oracle(name):
    router, expected = CASES[name](E, 2, S)

    def objective(inputs, mask, on_weights, on_probs):
        routing = routing_of(router, inputs[0], mask, S, name in TRAINED)
        value = ops.sum(dense_weights(routing) * on_weights) + ops.sum(routing.probs * on_probs)
        return value, ()

    function = differentiated(objective, FAST_MODE)
    for seed in (0, 4):
        logits, mask = draw(router, expected, T, seed)
        rng = np.random.default_rng(seed)
        on_weights, on_probs = rng.normal(size=(2, T, router.num_experts)).astype("float32")
        on_probs[~mask] = 0
        padded = np.where(mask[:, None], logits, np.nan).astype("float32")
        _, _, (gradient,) = function([padded], mask, on_weights, on_probs)
        differences, kinks = differences_of(expected, logits, mask, on_weights, on_probs)
        assert kinks.mean() < 0.1
        actual, wanted = (np.where(kinks, 0, each) for each in (gradient, differences))
        assert_close(actual, wanted, tolerance=1e-4)


def differences_of(expected, logits, mask, on_weights, on_probs, step=1e-5):
    """Derivatives of the oracle by differences, and where there are none.

    Where another expert is chosen there is a jump and no derivative.
    """

    def value(logits):
        weights, probs = expected(logits, mask)[:2]
        return np.sum(weights * on_weights) + np.sum(probs * on_probs)

    def chosen(logits):
        return expected(logits, mask)[0] > 0

    differences, kinks = np.zeros(logits.shape), np.zeros(logits.shape, bool)
    for place in np.ndindex(logits.shape):
        move = np.zeros(logits.shape)
        move[place] = step
        up, down = logits + move, logits - move
        differences[place] = (value(up) - value(down)) / (2 * step)
        kinks[place] = (chosen(up) != chosen(down)).any()
    return differences, kinks


@on_one_backend
@pytest.mark.parametrize(
    "name", ["top_k", "sigmoid", "sqrt_softplus", "relu", "top_p", "cosine", "soft", "noisy_top_k"]
)
def test_scores_without_preference_have_finite_gradients(name):
    """A router of zeros, whose experts are exactly balanced."""
    router, _ = CASES[name](E, 2, S)
    balance = [losses.get(loss) for loss in losses.IDENTIFIERS if loss != "global_load_balance"]

    def objective(inputs):
        routing = routing_of(router, inputs[0], None, S, training=False)
        total = ops.sum(routing.weights)
        for loss in balance:
            extra = {"sequence_length": S} if loss.scope == "sequence" else {}
            total = total + loss(routing, **extra)
        return total, ()

    features = E * getattr(router, "slots", 1)
    zeros = np.zeros((T, features), "float32")
    value, _, (gradient,) = differentiated(objective, FAST_MODE)([zeros])
    assert np.isfinite(value) and np.isfinite(gradient).all()


WITHOUT_TOKENS = [
    ("top_k", layers.Capacity(1.0, priority="probability", per_sequence=True)),
    ("expert_choice", None),
    ("soft", None),
    ("top_k", None),
    ("top_k", layers.Capacity(1.0, priority="random")),
]


@pytest.mark.filterwarnings("ignore:.*has no effect with a")
@pytest.mark.parametrize("name, capacity", unless_compiled(WITHOUT_TOKENS, WITHOUT_TOKENS[:3]))
def test_no_tokens_give_no_outputs(name, capacity, mode):
    layer = layers.MixtureOfExperts(
        layers.FeedForwardExperts(E, 4), name, [*losses.IDENTIFIERS], capacity_factor=capacity
    )
    layer.build((None, E))
    state = [ops.convert_to_tensor(v) for v in layer.non_trainable_variables]
    trainable = [ops.convert_to_tensor(v) for v in layer.trainable_variables]

    def function(x):
        return layer.stateless_call(trainable, state, x, training=True, return_losses=True)

    shapes = [(0, 5, E), (2, 0, E), (0, E)]
    for shape in unless_compiled(shapes, shapes[:1]):
        outputs, state_after, losses_after = compiled(function, mode)(np.zeros(shape, "float32"))
        assert outputs.shape == shape
        assert all(np.isfinite(value).all() for value in [*state_after, *losses_after])


TOKENS = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
NOISES = [{"input_jitter": 0.1}, {"logit_noise": 0.1}]


def route(router, tokens=TOKENS, **kwargs):
    return to_numpy(router(to_tensors(tokens), **kwargs))


def autocast():
    if BACKEND != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "policy", unless_compiled(["float16", "mixed_bfloat16"], ["mixed_bfloat16"])
)
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


@on_one_backend
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


@pytest.mark.parametrize("noise", unless_compiled(NOISES, NOISES[1:]))
def test_noise_follows_its_seed_and_is_new_at_every_call(noise):
    one, same, other = (routers.TopKRouter(4, seed=seed, **noise) for seed in (3, 3, 4))
    for router in (one, same, other):
        router.build(TOKENS.shape)
        router.kernel.assign(np.ones((6, 4)))
    first, repeated = route(one, training=True).logits, route(same, training=True).logits
    np.testing.assert_array_equal(first, repeated)
    assert np.any(route(one, training=True).logits != first)
    assert np.any(route(other, training=True).logits != first)


@on_one_backend
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


@on_one_backend
@pytest.mark.parametrize("name", routers.IDENTIFIERS)
def test_a_router_by_name_fits_its_layer(name):
    by_losses = {
        ("LoadBalance", "RouterZ"): ("cosine", "gshard", "switch", "top_k", "top_p"),
        ("ImportanceVariation", "LoadVariation"): ("noisy_top_k", "v_moe"),
        ("SelectorEntropy",): ("dselect_k",),
    }
    expected = [classes for classes, names in by_losses.items() if name in names] or [()]
    layer = layers.MixtureOfExperts(layers.FeedForwardExperts(4, 8), router=name)
    assert [tuple(type(loss).__name__ for loss in layer.router_losses)] == expected
    assert layer.router.num_experts == 4 and layer.router.max_top_k <= 4
    assert routers.get(name).num_experts is None
    if name == "group_limited":
        with pytest.raises(ValueError, match="num_experts=1"):
            routers.get(name, num_experts=1)
    else:
        router = routers.get(name, num_experts=1)
        assert (router.top_k, router.max_top_k) == (1, 1)


class WithoutSkipping(routers.DSelectKRouter):
    def route(self, *args, **context):
        routing = super().route(*args, **context)
        return routing._replace(indices=ops.zeros_like(routing.indices) + ops.arange(E))


@on_one_backend
@pytest.mark.parametrize("per_example", [True, False])
def test_skipping_experts_of_weight_zero_changes_no_output_and_no_gradient(per_example):
    found, skipped = [], []
    for cls in (routers.DSelectKRouter, WithoutSkipping):
        keras.utils.set_random_seed(0)
        router = cls(top_k=2, per_example=per_example, seed=0)
        layer = layers.MixtureOfExperts(layers.FeedForwardExperts(E, 8), router)
        layer.build(TOKENS.shape)
        # Some bits are exact, others are not.
        router.bias.assign([0.3, -0.2, 0.2, 0.7, -0.1, 0.6])
        for weight in layer.experts.trainable_variables:
            weight.assign(np.random.default_rng(0).normal(size=weight.shape))
        skipped.append((route(router).indices < 0).mean())
        found.append({"outputs": layer(TOKENS), **gradients(layer, TOKENS, training=True)})
    assert skipped[0] > 0.2 and not skipped[1]
    for ours, theirs in zip(*(each.values() for each in found), strict=True):
        assert_close(to_numpy(ours), to_numpy(theirs))
        assert np.any(to_numpy(ours))


@pytest.mark.parametrize("name", ["dense", "top_k"])
def test_no_tensor_has_all_experts_for_each_choice_of_a_token(name):
    """A dense router chooses 64 of 64 experts: (T, 64, 64) is 16 to 64 times the logits."""
    router = routers.get(name, 64, top_k=16) if name == "top_k" else routers.get(name, 64)
    router.build((None, 4))
    loss = losses.LoadBalance(scope="sequence")

    def objective(tokens):
        routing = router(tokens, training=True)
        plan = router.plan(routing, routing.indices)
        value = ops.sum(ops.square(routing.weights))
        if name == "dense":
            value = value + loss(routing, sequence_length=64)
        return value, (plan.sizes, routing.counts)

    logits = 256 * 64 * 4
    assert most_bytes(objective, normal(256, 4)) <= 6 * logits
