"""Plans: which assignments are served, in which row, and how rows become tokens again."""

import numpy as np
import pytest
import reference
from backends import EXAMPLES, FAST_MODE, KERNEL_MODES, assert_close, compiled, differentiated
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.ops import Routing, expert_capacity, plan_groups


def make_routing(indices, weights, mask, num_experts):
    """A routing with these decisions; scores play no part in a plan."""
    chosen = ops.expand_dims(indices, -1) == ops.arange(num_experts, dtype="int32")
    chosen = ops.logical_and(chosen, ops.reshape(mask, (-1, 1, 1)))
    counts = ops.sum(ops.cast(chosen, "int32"), axis=(0, 1))
    return Routing(indices, weights, None, None, mask, counts, None)


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


@pytest.mark.parametrize("mode", KERNEL_MODES)
def test_a_plan_equals_the_oracle_and_so_do_its_verbs_and_their_gradients(mode):
    def weigh(inputs, indices, mask, capacity, upstream, num_experts):
        tokens, weights = inputs
        routing = make_routing(indices, weights, mask, num_experts)
        plan = plan_groups(routing, capacity)
        outputs = plan.combine(plan.dispatch(tokens))
        return ops.sum(outputs * upstream), (plan, outputs, plan.dropped_fraction(routing.counts))

    @settings(max_examples=EXAMPLES[mode])
    @given(decisions(), st.one_of(st.none(), st.integers(1, 12)))
    def check(case, capacity):
        indices, mask, num_experts, rng = case
        tokens, upstream = rng.normal(size=(2, len(mask), 3)).astype("float32")
        weights = (rng.random(indices.shape) * mask[:, None]).astype("float32")
        room = None if capacity is None else np.int32(capacity)
        function = differentiated(lambda *args: weigh(*args, num_experts), mode)
        _, (plan, outputs, dropped), (d_tokens, d_weights) = function(
            [tokens, weights], indices, mask, room, upstream
        )

        served = reference.queues(indices, mask, num_experts, capacity)
        in_order = [assignment for queue in served for assignment in queue]
        num_rows = len(in_order)
        np.testing.assert_array_equal(plan.groups.sizes, [len(queue) for queue in served])
        numbers = [k * len(mask) + t for t, k in in_order]
        np.testing.assert_array_equal(plan.groups.assignment_of_row[:num_rows], numbers)
        rows = np.full(indices.shape, -1)
        for row, assignment in enumerate(in_order):
            rows[assignment] = row
        np.testing.assert_array_equal(plan.groups.rows_of_token, rows)

        num_assigned = indices.shape[1] * np.sum(mask)
        assert_close(dropped, (num_assigned - num_rows) / max(num_assigned, 1))
        kept = np.where(rows >= 0, weights, 0.0).sum(axis=1, keepdims=True, dtype="float64")
        assert_close(outputs, kept * tokens)
        assert_close(d_tokens, kept * upstream)
        assert_close(d_weights, (rows >= 0) * np.sum(tokens * upstream, axis=1, keepdims=True))

    check()


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


def test_the_capacity_is_rounded_up_and_at_least_one():
    for *arguments, expected in (
        (8, 4, 1, 1.25, 3),
        (100, 64, 1, 1e-5, 1),
        (10, 2, 2, 1.1, 11),
        (10, 1, 1, 1.1, 10),
        (4096, 64, 2, 1.25, 160),
    ):
        assert reference.expert_capacity(*arguments) == expert_capacity(*arguments) == expected


@pytest.mark.parametrize("mode", KERNEL_MODES)
def test_the_capacity_is_exact_where_the_number_of_tokens_is_a_tensor(mode):
    cases = [(1, 1, 1.1), (3, 1, 0.3), (7, 3, 1.0), (64, 2, 1.25), (6, 4, 4 / 3), (4, 1, 1e-5)]

    def capacities(num_tokens):
        return [expert_capacity(num_tokens, *case) for case in cases]

    num_tokens = np.arange(1, 5001, dtype="int32")
    for case, actual in zip(cases, compiled(capacities, mode)(num_tokens)):
        expected = [expert_capacity(int(number), *case) for number in num_tokens]
        np.testing.assert_array_equal(actual, expected)


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 8), st.integers(1, 400))
def test_the_capacity_equals_that_of_exact_arithmetic(num_tokens, num_experts, top_k, percent):
    factor, top_k = percent / 100, min(top_k, num_experts)
    expected = reference.expert_capacity(num_tokens, num_experts, top_k, factor)
    assert expert_capacity(num_tokens, num_experts, top_k, factor) == expected


def test_the_capacity_of_many_tokens_does_not_pass_32_bits():
    expected = expert_capacity(200_000, 64, 7, 1.999)
    actual = compiled(lambda n: expert_capacity(n, 64, 7, 1.999), FAST_MODE)(np.int32(200_000))
    assert actual == expected == 43_729
