"""Metrics of decisions and of specialization, against loops over tokens."""

import numpy as np
import pytest
from backends import FAST_MODE, MODES, assert_close, compiled, to_numpy
from keras import ops
from layer_checks import D, array, moe, normal

from keras_moe import metrics, routers
from keras_moe.ops import plan_groups, top_k_routing

T, E, K = 20, 4, 2


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, E)).astype("float32"), rng.random(T) < 0.7


def routing_of(logits, mask):
    return top_k_routing(logits, K, mask)


def pairs(routing):
    """Token and expert of each assignment."""
    return [(t, e) for t in np.flatnonzero(routing.mask) for e in routing.indices[t] if e >= 0]


@pytest.mark.parametrize("mode", MODES)
def test_decisions_equal_loops_over_tokens(mode):
    logits, mask = draw()
    later, _ = draw(1)

    def function(logits, later, mask):
        routing, after = routing_of(logits, mask), routing_of(later, mask)
        plan = plan_groups(routing, capacity=3)
        values = (
            metrics.router_confidence(routing),
            metrics.unserved_fraction(routing, plan),
            metrics.router_saturation(routing, after),
            metrics.coactivation(routing),
        )
        return values, routing, after, plan.groups.rows_of_token

    values, routing, after, rows = compiled(function, mode)(logits, later, mask)
    confidence, unserved, saturation, together = values
    real = np.flatnonzero(mask)
    assert_close(confidence, np.mean([routing.probs[t].max() for t in real]))
    assert_close(unserved, np.mean([(rows[t] < 0).all() for t in real]))
    kept = [len(set(routing.indices[t]) & set(after.indices[t])) for t in real]
    assert_close(saturation, sum(kept) / (K * len(real)))
    expected = np.zeros((E, E))
    for t in real:
        for a in routing.indices[t]:
            for b in routing.indices[t]:
                expected[a, b] += 1
    assert_close(together, expected / np.maximum(np.diag(expected)[:, None], 1))


@pytest.mark.parametrize("mode", MODES)
def test_a_count_table_and_its_information_equal_loops(mode):
    logits, mask = draw()
    groups = np.random.default_rng(2).integers(0, 3, T)

    def function(logits, mask, groups):
        routing = routing_of(logits, mask)
        table = metrics.count_table(routing, groups, 3)
        return routing, table, metrics.mutual_information(table)

    routing, table, information = compiled(function, mode)(logits, mask, groups)
    expected = np.zeros((3, E))
    for t, e in pairs(routing):
        expected[groups[t], e] += 1
    np.testing.assert_array_equal(table, expected)
    joint = expected / expected.sum()
    total = 0.0
    for g in range(3):
        for e in range(E):
            if joint[g, e]:
                total += joint[g, e] * np.log(joint[g, e] / joint[g].sum() / joint[:, e].sum())
    assert_close(information, total)


def test_information_is_all_or_nothing_at_its_ends():
    assert_close(array(metrics.mutual_information(np.eye(4) * 5)), np.log(4))
    assert_close(array(metrics.mutual_information(np.ones((3, 4)))), 0.0, scale=1.0)
    assert float(metrics.mutual_information(np.zeros((3, 4)))) == 0


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [8, 0, 0, 0], [3, 3, 3, 3], [1, 2, 3, 10]])
def test_usage_equals_its_formulas(counts):
    counts = np.array(counts)
    total = max(counts.sum(), 1)
    numbers = compiled(
        lambda c: (
            metrics.load_variation(c),
            metrics.max_share(c),
            metrics.active_fraction(c),
            metrics.utilization_quantiles(c),
        ),
        FAST_MODE,
    )(counts.astype("int32"))
    variation, share, active, quantiles = numbers
    mean = counts.mean() or 1.0
    assert_close(variation, counts.std() / mean, scale=1.0)
    assert_close(share, counts.max() / total, scale=1.0)
    assert_close(active, np.mean(counts > 0))
    expected = np.quantile(counts / total * 4, [0, 0.25, 0.5, 0.75, 1])
    assert_close(quantiles, expected, scale=1.0)


@pytest.mark.parametrize("router", [routers.TopKRouter(E, K), routers.TopPRouter(E)])
def test_saliency_is_the_mean_weight_times_norm_of_each_expert(router):
    layer = moe(router=router)
    x = normal(3, 5, D)
    mask = np.arange(15).reshape(3, 5) % 4 > 0
    saliency = array(metrics.expert_saliency(layer, ops.convert_to_tensor(x), mask))
    _, routing = layer(x, mask=mask, return_routing=True)
    routing = to_numpy(routing)
    tokens = x.reshape(-1, D)
    total, served = np.zeros(E), np.zeros(E)
    for t, e in pairs(routing):
        one = top_k_routing(
            ops.zeros((1, E)), 1, select=lambda s, e=e: ops.zeros((1, 1), "int32") + e
        )
        one = one._replace(weights=ops.ones((1, 1)))
        output = array(layer.experts(ops.convert_to_tensor(tokens[t : t + 1]), plan_groups(one)))
        place = list(routing.indices[t]).index(e)
        total[e] += routing.weights[t, place] * np.linalg.norm(output)
        served[e] += 1
    assert_close(saliency, total / np.maximum(served, 1), tolerance=1e-4)


def test_saliency_of_experts_that_a_hash_chooses():
    layer = moe(router=routers.HashRouter(E, 20, top_k=1))
    ids = np.arange(15).reshape(3, 5)
    saliency = array(metrics.expert_saliency(layer, normal(3, 5, D), token_ids=ids))
    assert (saliency > 0).sum() > 1


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "soft"])
def test_a_plan_says_whom_it_serves(router):
    router = routers.get(router, num_experts=E)
    tokens, mask = normal(6, D), np.arange(6) < 4
    routing = router(tokens, mask=mask)
    served = array(router.plan(routing).served())
    outputs = array(moe(router=router)(tokens, mask=mask))
    np.testing.assert_array_equal(served[mask], (outputs[mask] != 0).any(axis=1))
    assert_close(metrics.unserved_fraction(routing, router.plan(routing)), 1 - served[:4].mean())


def test_no_token_has_no_confidence():
    assert float(metrics.router_confidence(routing_of(np.zeros((0, E), "float32"), None))) == 0
