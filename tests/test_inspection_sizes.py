"""What a model is made of: active parameters by who serves a token, whatever the router."""

import keras
import numpy as np
import pytest
from layer_checks import D, E, moe, normal

import keras_moe
from keras_moe import inspection, layers, routers
from keras_moe.callbacks import ExpertMonitor

EXPERT = 2 * D * 16 + 16 + D

# How many of the experts work on a token.
SERVING = {
    "top_k": ("top_k", 2),
    "switch": ("switch", 1),
    "three": (routers.TopKRouter(E, top_k=3), 3),
    "forced": (routers.ForcedRouter(E, top_k=3), 3),
    "top_p": (routers.TopPRouter(E, max_top_k=3), 3),
    "relu": (routers.ReLURouter(E, top_k=1, max_top_k=3), 1),
    "dense": ("dense", E),
    "expert_choice": (routers.ExpertChoiceRouter(E, capacity_factor=1.5), 1.5),
    "expert_choice of all": (routers.ExpertChoiceRouter(E, capacity_factor=2.0 * E), E),
    "soft": (routers.SoftRouter(E, slots=3), 1),
    "balanced_assignment": ("balanced_assignment", 1),
}


@pytest.mark.parametrize("router, serving", SERVING.values(), ids=SERVING)
def test_active_parameters_are_those_of_the_experts_that_serve_a_token(router, serving):
    model = keras.Sequential([keras.Input((5, D)), moe(router=router), keras.layers.Dense(2)])
    (layer,) = inspection.summarize(model)
    of_router = layer.parameters - E * EXPERT
    assert layer.active_parameters == of_router + serving * EXPERT
    assert layer.flops == 2 * layer.active_parameters
    idle = (E - serving) * EXPERT
    assert inspection.count_parameters(model) == (model.count_params(), model.count_params() - idle)


def with_zero_expert(bank):
    return layers.ZeroComputationExperts(bank, num_zero=1)


@pytest.mark.parametrize("wrap", [lambda bank: bank, with_zero_expert], ids=["bank", "wrapped"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_and_routers_that_layers_share_count_once(top_k, wrap):
    bank, router = layers.FeedForwardExperts(E, 16), routers.TopKRouter(top_k=top_k)
    sharing = [moe(wrap(bank), router=router) for _ in range(3)]
    model = keras.Sequential([keras.Input((5, D)), *sharing])
    total, active = inspection.count_parameters(model)
    num_experts = sharing[0].experts.num_experts
    idle = E * EXPERT * (1 - min(1, 3 * top_k / num_experts))
    assert total == model.count_params() and total - active == round(idle)
    # A row of the table is about its layer alone.
    rows = inspection.summarize(model)
    of_router = rows[0].parameters - E * EXPERT
    expected = of_router + round(E * EXPERT * top_k / num_experts)
    assert [row.active_parameters for row in rows] == [expected] * 3


@pytest.mark.parametrize("frozen", ["layer", "experts"])
def test_what_is_frozen_costs_the_same(frozen):
    layer = moe()
    model = keras.Sequential([keras.Input((5, D)), layer])
    (before,) = inspection.summarize(model)
    (layer if frozen == "layer" else layer.experts).trainable = False
    assert inspection.summarize(model) == [before]


def test_summary_prints_one_row_for_each_layer():
    model = keras.Sequential([keras.Input((5, D)), moe(name="first"), moe(name="second")])
    lines = []
    assert keras_moe.summary(model, print_fn=lines.append) is None
    assert f"{model.count_params():,} parameters" in lines[0]
    table = [line.split()[0] for line in lines[2:5]]
    assert table == ["layer", "first", "second"] and f"2 of {E}" in lines[3]


def test_summary_is_refused_before_it_prints(capsys):
    with pytest.raises(ValueError, match="must be built"):
        keras_moe.summary(keras.Sequential([moe()]))
    with pytest.raises(ValueError, match="at least one `MixtureOfExperts`"):
        keras_moe.summary(keras.Sequential([keras.Input((D,)), keras.layers.Dense(1)]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("validation_split", [0.0, 0.5])
def test_summary_has_the_last_epoch_after_a_monitor(validation_split, tmp_path):
    model = keras.Sequential([keras.Input((D,)), moe(name="moe"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    monitor = ExpertMonitor()
    options = {"epochs": 2, "validation_split": validation_split, "verbose": 0}
    model.fit(normal(16, D), normal(16, 1), callbacks=[monitor], **options)
    (found,) = inspection.summarize(model)
    counts = np.array(found.counts)
    assert counts.sum() == 16 * (1 - validation_split) * found.top_k
    np.testing.assert_allclose(counts / counts.sum(), monitor.shares["moe"][-1], rtol=1e-6)
    # So has a file of it, and a model that had other counts before it loaded the file.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert inspection.summarize(loaded)[0].counts == found.counts
    inspection.moe_layers(loaded)["moe"].last_counts = np.ones(E)
    model.save_weights(tmp_path / "model.weights.h5")
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert inspection.summarize(loaded)[0].counts == found.counts
    untrained = keras.models.clone_model(model)
    untrained.save_weights(tmp_path / "untrained.weights.h5")
    loaded.load_weights(tmp_path / "untrained.weights.h5")
    assert not any(inspection.summarize(loaded)[0].counts)
    # What is counted after it replaces it.
    with inspection.count_in_evaluation(model):
        model(normal(3, D))
    assert sum(inspection.summarize(model)[0].counts) == 3 * found.top_k
    # An evaluation under the monitor does as well.
    inspection.moe_layers(model)["moe"].reset_counts()
    model.evaluate(normal(5, D), normal(5, 1), callbacks=[monitor], verbose=0)
    assert sum(inspection.summarize(model)[0].counts) == 5 * found.top_k
