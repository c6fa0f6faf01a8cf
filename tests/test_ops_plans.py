"""Plans: which assignments are served, in which row, and how rows become tokens again."""

import keras
import numpy as np
import pytest
import reference
from backends import (
    EXAMPLES,
    FAST_MODE,
    assert_close,
    compiled,
    differentiated,
    on_each_backend,
    on_one_backend,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from layer_checks import E, array, moe, one_hot, one_hot_router

from keras_moe import layers
from keras_moe.layers.capacity import drop_excess
from keras_moe.ops import GroupedPlan, Routing, top_k_routing
from keras_moe.ops.selection import mask_invalid
from keras_moe.ops.sorting import slots_of_expert

pytestmark = on_one_backend


def make_routing(indices, weights, mask, num_experts):
    """A routing with these decisions; scores play no part in a plan."""
    chosen = ops.expand_dims(indices, -1) == ops.arange(num_experts, dtype="int32")
    chosen = ops.logical_and(chosen, ops.reshape(mask, (-1, 1, 1)))
    counts = ops.sum(ops.cast(chosen, "int32"), axis=(0, 1))
    return Routing(indices, weights, None, None, mask, counts, None)


def plan_groups(routing, capacity=None, priority=None):
    """The plan of a routing whose experts have a capacity."""
    num_experts = routing.counts.shape[0]
    experts = mask_invalid(routing.indices, num_experts, ops.convert_to_tensor(routing.mask))
    if capacity is not None:
        experts = drop_excess(experts, priority, num_experts, capacity)
    return GroupedPlan.of(experts, ops.convert_to_tensor(routing.weights), num_experts)


@st.composite
def decisions(draw):
    num_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    skew = draw(st.sampled_from([0.0, 1.5, 50.0]))
    odds = 1.0 / np.arange(1.0, num_experts + 1) ** skew + 1e-12
    indices = [
        rng.choice(num_experts, top_k, replace=False, p=odds / np.sum(odds))
        for _ in range(num_tokens)
    ]
    mask = rng.random(num_tokens) < draw(st.sampled_from([0.0, 0.3, 0.8, 2.0]))
    return np.array(indices, "int32"), mask, num_experts, rng


@on_each_backend
def test_a_plan_equals_the_oracle_and_so_do_its_verbs_and_their_gradients(mode):
    def weigh(inputs, indices, mask, capacity, upstream, num_experts):
        tokens, weights = inputs
        routing = make_routing(indices, weights, mask, num_experts)
        plan = plan_groups(routing, capacity)
        outputs = plan.combine(plan.dispatch(tokens))
        return ops.sum(outputs * upstream), (plan, outputs)

    @settings(max_examples=EXAMPLES[mode])
    @given(decisions(), st.one_of(st.none(), st.integers(1, 12)))
    def check(case, capacity):
        indices, mask, num_experts, rng = case
        tokens, upstream = rng.normal(size=(2, len(mask), 3)).astype("float32")
        weights = (rng.random(indices.shape) * mask[:, None]).astype("float32")
        room = None if capacity is None else np.int32(capacity)
        function = differentiated(lambda *args: weigh(*args, num_experts), mode)
        _, (plan, outputs), (d_tokens, d_weights) = function(
            [tokens, weights], indices, mask, room, upstream
        )

        served = reference.queues(indices, mask, num_experts, capacity)
        in_order = [assignment for queue in served for assignment in queue]
        num_rows = len(in_order)
        np.testing.assert_array_equal(plan.sizes, [len(queue) for queue in served])
        numbers = [k * len(mask) + t for t, k in in_order]
        np.testing.assert_array_equal(plan.assignment_of_row[:num_rows], numbers)
        rows = np.full(indices.shape, -1)
        for row, assignment in enumerate(in_order):
            rows[assignment] = row
        np.testing.assert_array_equal(plan.row_of_assignment, rows)

        kept = np.where(rows >= 0, weights, 0.0).sum(axis=1, keepdims=True, dtype="float64")
        assert_close(outputs, kept * tokens)
        assert_close(d_tokens, kept * upstream)
        assert_close(d_weights, (rows >= 0) * np.sum(tokens * upstream, axis=1, keepdims=True))

    check()


@on_each_backend
def test_combine_reads_no_padded_row():
    indices, mask = np.array([[0], [0], [0]], "int32"), np.array([True, False, True])

    def combine(indices, mask, rows):
        plan = plan_groups(make_routing(indices, ops.ones(indices.shape), mask, 1), 1)
        return plan.combine(rows)

    # One row is served, that of the first token. The other tokens stay zero whatever stands in it.
    for served in (1.0, np.nan, np.inf):
        rows = np.array([[served], [np.nan], [np.inf]], "float32")
        outputs = compiled(combine, FAST_MODE)(indices, mask, rows)
        np.testing.assert_array_equal(outputs, [[served], [0.0], [0.0]])


@on_each_backend
def test_the_capacity_is_exact_where_the_number_of_tokens_is_a_tensor(mode):
    cases = [(1, 1, 1.1), (3, 1, 0.3), (7, 3, 1.0), (64, 2, 1.25), (6, 4, 4 / 3), (4, 1, 1e-5)]

    def capacities(num_tokens):
        return [slots_of_expert(num_tokens, *case) for case in cases]

    num_tokens = np.arange(1, 5001, dtype="int32")
    for case, actual in zip(cases, compiled(capacities, mode)(num_tokens)):
        expected = [slots_of_expert(int(number), *case) for number in num_tokens]
        np.testing.assert_array_equal(actual, expected)


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 8), st.integers(1, 400))
def test_the_capacity_equals_that_of_exact_arithmetic(num_tokens, num_experts, top_k, percent):
    factor, top_k = percent / 100, min(top_k, num_experts)
    expected = reference.expert_capacity(num_tokens, num_experts, top_k, factor)
    assert slots_of_expert(num_tokens, num_experts, top_k, factor) == expected


def test_the_capacity_of_many_tokens_does_not_pass_32_bits():
    expected = slots_of_expert(200_000, 64, 7, 1.999)
    actual = compiled(lambda n: slots_of_expert(n, 64, 7, 1.999), FAST_MODE)(np.int32(200_000))
    assert actual == expected == 43_729


# All choose experts 0 and 1, which have two places each.
PROBS = np.array([[0.6, 0.3, 0.1], [0.7, 0.2, 0.1], [0.8, 0.15, 0.05]])


def served(**limits):
    def function(logits):
        plan = plan_groups(top_k_routing(logits, 2), **limits)
        return plan.sizes, plan.row_of_assignment >= 0

    return compiled(function, FAST_MODE)(np.log(PROBS).astype("float32"))


def test_indices_and_priorities_may_be_unsigned():
    indices = np.array([[0], [1], [1], [0]], "uint8")
    mask = np.array([True, True, True, False])
    routing = top_k_routing(np.zeros((4, 2), "float32"), 1, mask)
    routing = routing._replace(indices=ops.convert_to_tensor(indices))
    plan = plan_groups(routing, capacity=1, priority=ops.array([0, 1, 2, 3], "uint8"))
    assert plan.experts.tolist() == [[0], [-1], [1], [-1]]


def test_by_urgency_the_most_urgent_are_served():
    urgency = keras.ops.convert_to_tensor(PROBS.max(axis=1).astype("float32"))
    sizes, is_served = served(capacity=2, priority=urgency)
    assert sizes.tolist() == [2, 2, 0]
    assert is_served.tolist() == [[False, False], [True, True], [True, True]]


def test_first_choices_are_served_before_more_urgent_second_ones():
    # Tokens 0 and 1 choose 0 then 1; token 2 chooses 1 then 0 and is the most urgent. One place:
    # 0 serves token 1, the most urgent first choice, and 1 serves token 2.
    probs = np.array([[0.6, 0.4], [0.7, 0.3], [0.1, 0.9]])

    def function(logits):
        routing = top_k_routing(logits, 2)
        first = keras.ops.max(routing.probs, axis=-1)
        plan = plan_groups(routing, capacity=1, priority=first)
        return plan.row_of_assignment >= 0

    is_served = compiled(function, FAST_MODE)(np.log(probs).astype("float32"))
    assert is_served.tolist() == [[False, False], [True, False], [True, False]]


def run(capacity, experts, training=True, mask=None):
    """Which tokens (B, S) are served, each of which chooses one expert."""
    layer = moe(
        layers.FeedForwardExperts(E, 8, bias_initializer="ones"),
        router=one_hot_router(),
        router_losses=(),
        capacity_factor=capacity,
    )
    tokens = np.stack([one_hot(*sequence) for sequence in experts])
    tokens = np.concatenate([tokens, np.zeros_like(tokens)], axis=-1)
    outputs, routing = layer(tokens, mask=mask, training=training, return_routing=True)
    return array(outputs).any(axis=-1), float(routing.dropped)


CROWDED = [[0, 0, 0, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    "capacity, experts, training, served",
    [
        (1.0, CROWDED, True, "1100 0111"),
        (1.0, CROWDED, False, "1111 1111"),
        (layers.Capacity(4.0, evaluation_factor=0.5), CROWDED, True, "1111 1111"),
        (layers.Capacity(4.0, evaluation_factor=0.5), CROWDED, False, "1000 0111"),
        (layers.Capacity(0.5), CROWDED, True, "1000 0111"),
        (layers.Capacity(0.5, minimum=3), CROWDED, True, "1110 0111"),
        (layers.Capacity(0.5, multiple_of=2), CROWDED, True, "1100 0111"),
        (layers.Capacity(0.5, minimum=3, multiple_of=2), CROWDED, True, "1111 0111"),
        (layers.Capacity(0.5, minimum=9), CROWDED, True, "1111 1111"),
        (layers.Capacity(1.0, per_sequence=True), [[0, 0, 1, 1], [0, 0, 0, 1]], True, "1010 1001"),
    ],
)
def test_a_capacity_serves_the_first_tokens_of_each_expert(capacity, experts, training, served):
    is_served, dropped = run(capacity, experts, training)
    expected = np.array([[digit == "1" for digit in each] for each in served.split()])
    np.testing.assert_array_equal(is_served, expected)
    assert dropped == 1 - expected.mean()


def test_padding_takes_no_room():
    mask = np.array([[False, True, True, True], [True] * 4])
    is_served, _ = run(
        layers.Capacity(1.0, per_sequence=True), [[0, 0, 1, 2], [0, 1, 2, 3]], mask=mask
    )
    assert is_served.tolist() == [[False, True, True, True], [True] * 4]


@on_each_backend
def test_random_priority_serves_as_many_and_not_always_the_same():
    capacity = layers.Capacity(1.0, priority="random")
    layer = moe(router=one_hot_router(), router_losses=(), capacity_factor=capacity)
    tokens = np.concatenate([one_hot(*[0] * 16), np.zeros((16, 4), "float32")], axis=-1)
    layer.build(tokens.shape)
    trainable = [array(variable) for variable in layer.trainable_variables]

    def step(state, trainable, tokens):
        return layer.stateless_call(trainable, state, tokens, training=True)

    step = compiled(step, FAST_MODE)
    state = [keras.ops.convert_to_numpy(variable) for variable in layer.non_trainable_variables]
    draws = set()
    for _ in range(5):
        outputs, state = step(state, trainable, tokens)
        draws.add(tuple(outputs.any(axis=-1)))
    assert len(draws) > 1
    assert {sum(draw) for draw in draws} == {4}
    # Not the first ones more often than the last: some draw serves a token of the second half.
    assert any(any(draw[8:]) for draw in draws)


def test_experts_without_computation_have_no_limit():
    bank = layers.ZeroComputationExperts(
        layers.FeedForwardExperts(E - 2, 8), num_zero=1, num_identity=1
    )
    layer = moe(bank, router=one_hot_router(), router_losses=(), capacity_factor=1.0)
    identity = E - 1
    tokens = np.concatenate([one_hot(*[identity] * 10, *[0] * 6), np.ones((16, 2), "float32")], 1)
    outputs, routing = layer(tokens, training=True, return_routing=True)
    # Of the six tokens of the first expert, `ceil(16 / 4)` find a slot.
    assert float(routing.dropped) == 2 / 16
    assert_close(array(outputs)[:10], array(routing.weights)[:10] * tokens[:10])
