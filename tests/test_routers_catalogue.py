"""Every router against the oracle: selection, weights, scores, counts and gradients."""

import keras
import numpy as np
import pytest
import reference_routers as oracle
from backends import (
    FAST_MODE,
    KERNEL_MODES,
    assert_close,
    compiled,
    differentiated,
    to_numpy,
)
from drawn import MASKS, SKEWS, draw_logits, draw_mask
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import layers, losses, routers
from keras_moe.layers.capacity import PRIORITIES

T, E, S = 12, 6, 4
IDENTITY = keras.initializers.Identity()
BIAS = np.array([0.3, -0.2, 0.0, 0.1, -0.4, 0.2], "float32")


class Fixed(routers.SelectionBalancer):
    """Leaves a bias as it is."""

    def measure(self, routing, scores, bias):
        return 0.0 * bias

    def update(self, bias, measured):
        return ops.convert_to_tensor(BIAS)


def case(router_class, oracle, training=False, **kwargs):
    def make():
        router = router_class(E, kernel_initializer=IDENTITY, **kwargs)
        router.build((None, E))
        if kwargs.get("balancer") is not None:
            router.selection_bias.assign(BIAS)
        return router

    return make, oracle, training


# The kernel is the identity: tokens are logits.
CASES = {
    "top-1": case(routers.TopKRouter, oracle.top_k(1), top_k=1),
    "top-3": case(routers.TopKRouter, oracle.top_k(3), top_k=3),
    "top-2 as it is": case(
        routers.TopKRouter, oracle.top_k(2, renormalize=False), renormalize=False
    ),
    "sigmoid": case(
        routers.TopKRouter,
        oracle.top_k(2, "sigmoid", scale=2.5),
        score="sigmoid",
        scaling_factor=2.5,
    ),
    "square root of softplus": case(
        routers.TopKRouter, oracle.top_k(2, "sqrt_softplus"), score="sqrt_softplus"
    ),
    "selection bias": case(
        routers.TopKRouter, oracle.top_k(2, "sigmoid", bias=BIAS), score="sigmoid", balancer=Fixed()
    ),
    "groups": case(
        routers.GroupLimitedRouter,
        oracle.top_k(3, "sigmoid", groups=(3, 2)),
        num_groups=3,
        top_k=3,
    ),
    "groups and bias": case(
        routers.GroupLimitedRouter,
        oracle.top_k(2, "sigmoid", groups=(3, 1), bias=BIAS),
        num_groups=3,
        top_groups=1,
        balancer=Fixed(),
    ),
    "dense": case(routers.DenseRouter, oracle.dense),
    "gshard": case(routers.GShardRouter, oracle.top_k(2)),
    "noisy": case(routers.NoisyTopKRouter, oracle.top_k(2)),
    "noisy top-1": case(routers.NoisyTopKRouter, oracle.top_k(1), top_k=1),
    "v-moe": case(routers.VMoERouter, oracle.top_k(2, renormalize=False)),
    "top-p": case(routers.TopPRouter, oracle.top_p(0.7, 4), threshold=0.7),
    "relu": case(routers.ReLURouter, oracle.relu(4)),
    "relu, without a limit": case(routers.ReLURouter, oracle.relu(E), max_top_k=E),
    "relu, at most 2": case(routers.ReLURouter, oracle.relu(2), max_top_k=2),
    "expert choice": case(routers.ExpertChoiceRouter, oracle.expert_choice(2.0, S)),
    "sinkhorn": case(routers.SinkhornRouter, oracle.sinkhorn(8, 2), training=True, top_k=2),
    "sinkhorn top-1": case(routers.SinkhornRouter, oracle.sinkhorn(8, 1), training=True),
    "sinkhorn in evaluation": case(
        routers.SinkhornRouter, oracle.top_k(1, "sigmoid", renormalize=False)
    ),
    "balanced assignment": case(
        routers.BalancedAssignmentRouter, oracle.balanced_assignment, training=True
    ),
    "balanced assignment in evaluation": case(
        routers.BalancedAssignmentRouter, oracle.top_k(1, "sigmoid", renormalize=False)
    ),
}
by_case = pytest.mark.parametrize("name", CASES)


def draw(seed=0):
    """Logits and a mask, NaN where it is False."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(T, E)).astype("float32")
    mask = rng.random(T) < 0.75
    mask[0] = True
    return logits, mask


def dense_weights(routing):
    """(T, E) combine weights, wherever the places are."""
    experts = ops.arange(routing.probs.shape[-1], dtype="int32")
    chosen = ops.expand_dims(routing.indices, -1) == experts
    return ops.sum(ops.where(chosen, ops.expand_dims(routing.weights, -1), 0.0), axis=1)


def route(router, logits, mask, training):
    return router(logits, mask=mask, training=training, sequence_length=S)


@by_case
@pytest.mark.parametrize("mode", KERNEL_MODES)
def test_a_router_equals_the_oracle_whatever_padding_holds(name, mode):
    make, expected, training = CASES[name]
    router = make()
    logits, mask = draw()
    padded = np.where(mask[:, None], logits, np.nan).astype("float32")

    def function(logits, mask):
        routing = route(router, logits, mask, training)
        return routing, dense_weights(routing)

    function = compiled(function, mode)
    routing, weights = function(padded, mask)
    expected_weights, probs = expected(logits, mask)
    assert_close(weights, expected_weights)
    assert_close(routing.probs[mask], probs[mask])
    np.testing.assert_array_equal(routing.counts, np.sum(expected_weights > 0, axis=0))
    assert not np.isnan(routing.weights).any()
    assert routing.indices.dtype == np.int32 and routing.indices.shape == (T, router.max_top_k)
    routing, _ = function(np.full((T, E), np.nan, "float32"), np.zeros(T, bool))
    assert not routing.weights.any() and not routing.counts.any(), "all is padding"


@by_case
def test_gradients_equal_differences_of_the_oracle(name):
    make, expected, training = CASES[name]
    router = make()

    def objective(inputs, mask, on_weights, on_probs):
        routing = route(router, inputs[0], mask, training)
        value = ops.sum(dense_weights(routing) * on_weights) + ops.sum(routing.probs * on_probs)
        return value, ()

    function = differentiated(objective, FAST_MODE)
    for seed in (1, 2):
        logits, mask = draw(seed)
        rng = np.random.default_rng(seed)
        on_weights, on_probs = rng.normal(size=(2, T, E)).astype("float32")
        on_probs[~mask] = 0
        _, _, (gradient,) = function([logits], mask, on_weights, on_probs)
        differences, kinks = differences_of(expected, logits, mask, on_weights, on_probs)
        assert kinks.mean() < 0.1
        actual, wanted = (np.where(kinks, 0, each) for each in (gradient, differences))
        assert_close(actual, wanted, tolerance=1e-4)


def differences_of(expected, logits, mask, on_weights, on_probs, step=1e-5):
    """Derivatives (T, E) of the oracle by differences, and where there are none.

    Where another expert is chosen there is a jump and no derivative.
    """

    def value(logits):
        weights, probs = expected(logits, mask)
        return np.sum(weights * on_weights) + np.sum(probs * on_probs)

    def chosen(logits):
        return expected(logits, mask)[0] > 0

    differences, kinks = np.zeros((T, E)), np.zeros((T, E), bool)
    for place in np.ndindex(T, E):
        move = np.zeros((T, E))
        move[place] = step
        up, down = logits + move, logits - move
        differences[place] = (value(up) - value(down)) / (2 * step)
        kinks[place] = (chosen(up) != chosen(down)).any()
    return differences, kinks


@pytest.mark.parametrize("mode", KERNEL_MODES)
@pytest.mark.parametrize("name", CASES)
def test_no_tokens_give_no_outputs(name, mode):
    make, _, _ = CASES[name]
    assert_none_of_none(make(), mode)


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("priority", PRIORITIES)
def test_no_tokens_need_no_room(priority, per_sequence):
    capacity = layers.Capacity(1.0, priority=priority, per_sequence=per_sequence)
    assert_none_of_none(routers.TopKRouter(E), FAST_MODE, capacity, [*losses.BY_NAME])


def assert_none_of_none(router, mode, capacity=None, router_losses=("load_balance", "router_z")):
    layer = layers.MixtureOfExperts(
        layers.FeedForwardExperts(E, 4), router, router_losses, capacity_factor=capacity
    )
    layer.build((None, E))
    state = [ops.convert_to_tensor(v) for v in layer.non_trainable_variables]
    trainable = [ops.convert_to_tensor(v) for v in layer.trainable_variables]

    def function(x):
        return layer.stateless_call(trainable, state, x, training=True, return_losses=True)

    shapes = [(0, 5, E), (2, 0, E), (0, E)]
    for shape in shapes[:1] if mode == "xla" else shapes:  # XLA compiles each anew, for a second
        outputs, state_after, losses = compiled(function, mode)(np.zeros(shape, "float32"))
        assert outputs.shape == shape
        assert all(np.isfinite(value).all() for value in [*state_after, *losses])


@by_case
def test_a_layer_with_the_router_is_the_weighted_sum_of_its_experts(name):
    make, expected, training = CASES[name]
    bank = layers.FeedForwardExperts(E, 4, activation="tanh")
    layer = layers.MixtureOfExperts(bank, router=make(), router_losses=())
    x = np.random.default_rng(0).normal(size=(T // S, S, E)).astype("float32")
    mask = np.ones((T // S, S), bool)
    mask[-1, -2:] = False
    layer.build(x.shape)
    state = [ops.convert_to_tensor(v) for v in layer.non_trainable_variables]
    trainable = [ops.convert_to_tensor(v) for v in layer.trainable_variables]

    def function(x, mask):
        return layer.stateless_call(trainable, state, x, mask=mask, training=training)[0]

    outputs = compiled(function, FAST_MODE)(x, mask)
    weights, _ = expected(x.reshape(T, E), mask.reshape(T))
    up, down = to_numpy(ops.convert_to_tensor(bank.up_kernel)), to_numpy(bank.down_kernel.value)
    total = np.zeros((T, E))
    for e in range(E):
        total += weights[:, e : e + 1] * (np.tanh(x.reshape(T, E) @ up[e]) @ down[e])
    assert_close(outputs.reshape(T, E), total)


@pytest.mark.parametrize("name", [name for name in CASES if name != "dense"])
def test_scores_without_preference_have_finite_gradients(name):
    """A router of zeros, whose experts are exactly balanced."""
    make, _, training = CASES[name]
    router = make()
    balance = [losses.get(loss) for loss in losses.BY_NAME if loss != "global_load_balance"]

    def objective(inputs):
        routing = route(router, inputs[0], None, training)
        total = ops.sum(routing.weights)
        for loss in balance:
            extra = {"sequence_length": S} if loss.per_sequence else {}
            total = total + loss(routing, **extra)
        return total, ()

    value, _, (gradient,) = differentiated(objective, FAST_MODE)([np.zeros((T, E), "float32")])
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_every_name_makes_a_router_of_a_single_expert_or_says_why_not():
    for name in routers.BY_NAME:
        if name in ("gshard", "deepseek_v3"):
            with pytest.raises(ValueError, match="num_experts=1"):
                routers.get(name, num_experts=1)
            continue
        try:
            router = routers.get(name, num_experts=1)
        except ValueError as error:
            assert "`top_k` must be at most `num_experts`" in str(error), name
            router = type(routers.get(name, num_experts=2))(1, top_k=1)
        routing = to_numpy(router(np.ones((3, 2), "float32"), training=True))
        assert np.isfinite(routing.weights).all(), name


def drawn(router_class, *arguments, **kwargs):
    return router_class(*arguments, kernel_initializer=IDENTITY, **kwargs)


def hashed(e, k, length):
    router = routers.HashRouter(e, vocabulary_size=7, top_k=k)
    router.build(None)
    table = ops.convert_to_numpy(router.table)
    return router, oracle.fixed(table[np.arange(100) % 7], e)


def forced(e, k, length):
    first = np.arange(100)[:, None] * k
    return routers.ForcedRouter(e, k), oracle.fixed((first + np.arange(k)) % e, e)


# From E, K and the length of a sequence to a router and its oracle.
DRAWN = {
    "top_k": lambda e, k, s: (drawn(routers.TopKRouter, e, k), oracle.top_k(k)),
    "switch": lambda e, k, s: (drawn(routers.TopKRouter, e, 1), oracle.top_k(1)),
    "sigmoid": lambda e, k, s: (
        drawn(routers.TopKRouter, e, k, "sigmoid", scaling_factor=2.5),
        oracle.top_k(k, "sigmoid", scale=2.5),
    ),
    "deepseek_v3": lambda e, k, s: (
        drawn(routers.GroupLimitedRouter, 3 * e, num_groups=e, top_groups=k, top_k=k),
        oracle.top_k(k, "sigmoid", groups=(e, k)),
    ),
    "noisy_top_k": lambda e, k, s: (drawn(routers.NoisyTopKRouter, e, k), oracle.top_k(k)),
    "v_moe": lambda e, k, s: (
        drawn(routers.VMoERouter, e, k),
        oracle.top_k(k, renormalize=False),
    ),
    "gshard": lambda e, k, s: (drawn(routers.GShardRouter, e + 1), oracle.top_k(2)),
    "cosine": lambda e, k, s: (
        drawn(routers.CosineRouter, e, projection_dim=e, top_k=k),
        oracle.of_directions(oracle.top_k(k), scale=2.0),
    ),
    "top_p": lambda e, k, s: (
        drawn(routers.TopPRouter, e, threshold=0.6, max_top_k=k),
        oracle.top_p(0.6, k),
    ),
    "relu": lambda e, k, s: (drawn(routers.ReLURouter, e, 1, max_top_k=k), oracle.relu(k)),
    "dense": lambda e, k, s: (drawn(routers.DenseRouter, e), oracle.dense),
    "expert_choice": lambda e, k, s: (
        drawn(routers.ExpertChoiceRouter, e, capacity_factor=0.75 * k),
        oracle.expert_choice(0.75 * k, s),
    ),
    "soft": lambda e, k, s: (
        drawn(routers.SoftRouter, e, slots=k),
        oracle.of_directions(oracle.soft_routing(k)),
    ),
    "sinkhorn": lambda e, k, s: (drawn(routers.SinkhornRouter, e, k, 5), oracle.sinkhorn(5, k)),
    "balanced_assignment": lambda e, k, s: (
        drawn(routers.BalancedAssignmentRouter, e),
        oracle.balanced_assignment,
    ),
    "hash": hashed,
    "forced": forced,
}
BALANCED_IN_TRAINING = ("sinkhorn", "balanced_assignment")
DRAWS = {"eager": 8, "xla": 3, "jit": 6}


def is_sure(route, logits, mask, rng):
    """Whether no rounding changes who is chosen."""
    chosen = route(logits, mask)[0] > 0
    moved = (logits + 1e-4 * rng.normal(size=logits.shape) for _ in range(4))
    return all((chosen == (route(other, mask)[0] > 0)).all() for other in moved)


@pytest.mark.parametrize("mode", KERNEL_MODES)
@pytest.mark.parametrize("name", DRAWN)
def test_a_router_of_any_size_equals_the_oracle(name, mode):
    @settings(max_examples=DRAWS[mode])
    @given(st.data())
    def check(data):
        e = data.draw(st.integers(1, 5))
        k = data.draw(st.integers(1, e))
        length, num_sequences = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
        router, expected = DRAWN[name](e, k, length)
        num_tokens, num_experts = length * num_sequences, router.num_experts
        slots = getattr(router, "slots", 1)
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        skew, kind = data.draw(st.sampled_from(SKEWS)), data.draw(st.sampled_from(MASKS))
        logits = draw_logits(rng, num_tokens, num_experts * slots, skew, preference=3.0)
        mask = draw_mask(rng, num_tokens, kind)
        assume(is_sure(expected, logits, mask, rng))
        padded = np.where(mask[:, None], logits, data.draw(st.sampled_from([0, np.nan, np.inf])))

        def function(tokens, mask):
            routing = router(
                tokens,
                mask=mask,
                training=name in BALANCED_IN_TRAINING,
                sequence_length=length,
                token_ids=ops.arange(num_tokens),
            )
            return routing, dense_weights(routing)

        routing, weights = compiled(function, mode)(padded.astype("float32"), mask)
        expected_weights, probs = expected(logits, mask)
        assert_close(weights, expected_weights)
        assert_close(routing.probs[mask], probs[mask])
        counts = np.sum(expected_weights > 0, axis=0)
        if name == "soft":  # Experts run on slots.
            counts = np.full(num_experts, num_sequences * slots)
        np.testing.assert_array_equal(routing.counts, counts)
        assert routing.indices.shape == (num_tokens, router.max_top_k)
        assert routing.indices.dtype == np.int32
        assert all(np.dtype(a.dtype) == "float32" for a in (routing.weights, routing.probs))

    check()


def test_no_router_is_left_out_of_the_drawn_ones():
    assert set(routers.BY_NAME) | {"hash", "forced"} <= set(DRAWN)
