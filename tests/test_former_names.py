"""Public names of earlier versions warn once, and still work."""

import functools
import importlib

import numpy as np
import pytest
from layer_checks import array, normal

from keras_moe import losses, metrics, ops, routers
from keras_moe._internal.former_names import FORMER

pytestmark = pytest.mark.backends("torch")


def former(name):
    """The object of a former name, whose first use warns and whose second does not."""
    part, _, name = name.rpartition(".")
    module = importlib.import_module(f"keras_moe.{part}")
    vars(module).pop(name, None)
    with pytest.warns(FutureWarning, match=f"`{part}.{name}` is deprecated. Use "):
        found = getattr(module, name)
    assert getattr(module, name) is found
    del vars(module)[name]
    return found


@pytest.mark.parametrize("name", FORMER)
def test_a_former_name_warns_once_and_is_not_listed(name):
    assert former(name) is not None
    part, _, name = name.rpartition(".")
    module = importlib.import_module(f"keras_moe.{part}")
    assert name not in dir(module)
    assert not hasattr(module, "no_such_name")


def test_former_functions_and_classes_compute_what_they_did():
    counts, logits = [6, 2, 0, 0], normal(6, 4)
    assert float(former("metrics.max_share")(counts)) == 0.75
    assert float(former("metrics.active_fraction")(counts)) == 0.5
    assert float(former("metrics.load_variation")(counts)) == pytest.approx(np.std(counts) / 2)
    assert float(former("metrics.dropped_fraction")(3.0, counts)) == 0.375
    loss = losses.LoadBalance(1e-7)
    assert "too weak" in former("inspection.health.judge_weak_loss")(loss, 1e-7).text
    assert former("inspection.health.judge_heavy_losses")([loss], [1.0], None) is None
    batches = [[5, 0, 0], [0, 0, 1], [1, 0, 0]]
    in_window = former("metrics.dead_experts_over_window")
    assert [float(in_window(batches, window)) for window in (1, 2, 3, 4)] == [2, 1, 1, 0]
    quantiles = former("metrics.utilization_quantiles")(counts)
    np.testing.assert_allclose(array(quantiles), [0, 0, 0.5, 1.5, 3])
    routing = ops.top_k_routing(logits, 2)
    metric = former("metrics.LoadImbalance")(num_experts=4)
    metric.update_state(routing)
    assert float(metric.result()) == float(metrics.load_imbalance(routing.counts))
    for name, loss in (("load_balance", "LoadBalance"), ("router_z", "RouterZ")):
        assert float(former(f"ops.{name}")(routing)) == float(getattr(losses, loss)(1.0)(routing))
    confidence, mask = former("metrics.router_confidence"), np.arange(6) < 4
    expected = array(routing.probs)[:4].max(axis=1).mean()
    assert float(confidence(ops.top_k_routing(logits, 2, mask))) == pytest.approx(expected)
    assert float(confidence(ops.top_k_routing(normal(0, 4), 2))) == 0
    in_sequences = losses.SequenceLoadBalance(1.0)(routing, sequence_length=3)
    assert float(former("ops.sequence_load_balance")(routing, 3)) == float(in_sequences)
    assert former("losses.BY_NAME")["router_z"] is losses.RouterZ
    assert isinstance(former("routers.ForcedRouter")(4), routers.Router)
    assert isinstance(former("metrics.DeadExperts"), functools.partial)
