"""Expert usage against the oracle, and decisions and specialization against loops over tokens."""

import numpy as np
import pytest
from backends import (
    FAST_MODE,
    assert_close,
    compiled,
    on_each_backend,
    on_one_backend,
    to_numpy,
    unless_compiled,
)
from hypothesis import given
from hypothesis import strategies as st
from layer_checks import D, array, moe, normal

from keras_moe import losses, metrics, routers
from keras_moe.ops import GroupedPlan, top_k_routing

pytestmark = on_one_backend

T, E, K = 20, 4, 2

# counts, imbalance, entropy, dead experts
BY_HAND = [
    ([5, 5, 5, 5], 0.0, 1.0, 0),
    ([8, 0, 0, 0], 3.0, 0.0, 3),
    ([4, 4, 0, 0], 1.0, 0.5, 2),
    ([0, 0, 0, 0], 0.0, 0.0, 4),
    ([6, 2], 0.5, 0.811278124, 0),
    ([7], 0.0, 1.0, 0),
    ([0], 0.0, 0.0, 1),
]


def expected_usage(counts):
    total, number = sum(counts), len(counts)
    shares = np.array(counts) / max(total, 1)
    entropy = -sum(share * np.log(share) for share in shares if share)
    return {
        "load_imbalance": number * max(shares) - 1 if total else 0.0,
        "load_entropy": (entropy / np.log(number) if number > 1 else 1.0) if total else 0.0,
        "dead_experts": sum(count <= 1e-3 * total / number for count in counts),
        "expert_share": shares,
    }


def test_the_oracle_is_right_on_small_examples():
    for counts, *by_hand in BY_HAND:
        values = list(expected_usage(counts).values())[:3]
        np.testing.assert_allclose(values, by_hand, atol=1e-8)


OF_COUNTS = list(expected_usage([1]))


@on_each_backend
@pytest.mark.parametrize("num_experts", unless_compiled([1, 2, 4], [4]))
def test_usage_equals_the_oracle(num_experts, mode):
    function = compiled(lambda counts: [getattr(metrics, name)(counts) for name in OF_COUNTS], mode)

    def check(counts):
        results = function(np.array(counts, "int32"))
        expected = expected_usage(counts)
        for name, result in zip(OF_COUNTS, results, strict=True):
            value = expected[name]
            assert result.dtype == np.float32, name
            # 1 is taken from the ratio of loads: what is left of a small imbalance is rounded.
            assert_close(result, value, scale=max(1.0, np.max(value)))

    for counts, *_ in BY_HAND:
        if len(counts) == num_experts:
            check(counts)

    given(st.lists(st.integers(0, 10**6), min_size=num_experts, max_size=num_experts))(check)()


def draw():
    return normal(T, E), np.random.default_rng(0).random(T) < 0.7


@on_each_backend
def test_decisions_and_tables_equal_loops_over_tokens(mode):
    logits, mask = draw()
    groups = np.random.default_rng(2).integers(0, 3, T)

    def function(logits, mask, groups):
        routing = top_k_routing(logits, K, mask)
        table = metrics.count_table(routing, groups, 3)
        values = (
            metrics.coactivation(routing),
            table,
            metrics.mutual_information(table),
        )
        return values, routing

    (together, table, information), routing = compiled(function, mode)(logits, mask, groups)
    real = np.flatnonzero(mask)
    pairs, of_groups = np.zeros((E, E)), np.zeros((3, E))
    for t in real:
        for a in routing.indices[t]:
            of_groups[groups[t], a] += 1
            for b in routing.indices[t]:
                pairs[a, b] += 1
    assert_close(together, pairs / np.maximum(np.diag(pairs)[:, None], 1))
    np.testing.assert_array_equal(table, of_groups)
    joint = of_groups / of_groups.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    assert_close(information, np.sum(joint[there] * np.log(joint[there] / independent[there])))


OF_ROUTINGS = [
    *(metrics.router_entropy, metrics.coactivation),
    lambda routing: metrics.count_table(routing, [0] * T, 1),
    *(cls(1.0) for name, cls in losses.IDENTIFIERS.items() if name != "global_load_balance"),
]


@pytest.mark.parametrize("function", OF_ROUTINGS)
def test_recorded_routings_of_numpy_arrays_are_measured(function):
    logits, mask = draw()
    routing = top_k_routing(logits, K, mask)
    assert_close(to_numpy(function(to_numpy(routing))), to_numpy(function(routing)))


def test_information_is_all_or_nothing_at_its_ends():
    information = compiled(metrics.mutual_information, FAST_MODE)
    assert_close(information(np.eye(4) * 5), np.log(4))
    assert_close(information(np.ones((4, 4))), 0.0, scale=1.0)
    assert information(np.zeros((4, 4))) == 0


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "soft"])
def test_a_plan_knows_whom_it_serves(router):
    router = routers.get(router, num_experts=E)
    tokens, mask = normal(6, D), np.arange(6) < 4
    routing = router(tokens, mask=mask)
    plan = GroupedPlan.of(routing.indices, routing.weights, E)
    served = (array(plan.row_of_assignment) >= 0).any(axis=1)
    outputs = array(moe(router=router)(tokens, mask=mask))
    np.testing.assert_array_equal(served[mask], (outputs[mask] != 0).any(axis=1))


def test_typical_words_are_served_more_often_than_others():
    indices = [[0, 1]] * 30 + [[0, 2]] * 30 + [[1, 2]] * 2 + [[-1, -1]]
    texts = ["the cat"] * 30 + ["the dog"] * 30 + ["rare", "the"] + ["padding"]
    routing = top_k_routing(np.zeros((63, 3), "float32"), 2)._replace(indices=np.array(indices))
    of_first, *others = metrics.typical_words(routing, texts)
    assert "the" not in sum(others, []) and "padding" not in of_first
    assert [words[0] for words in others] == ["cat", "dog"] and others[0][1:] == ["rare"]
    assert metrics.typical_words(routing, texts, 1)[1:] == [["cat"], ["dog"]]
    assert metrics.typical_words(routing, [""] * 63) == [[], [], []]
