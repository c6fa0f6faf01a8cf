"""Looking into a model: its MoE layers by name, their routings, sizes and costs."""

import math

import keras
import numpy as np
import pytest
from backends import on_each_backend, on_one_backend
from forced_router import ForcedRouter
from layer_checks import D, E, array, model_of, moe, normal, one_hot_router

import keras_moe
from keras_moe import inspection, layers, routers
from keras_moe.callbacks import ExpertMonitor

pytestmark = on_one_backend

EXPERT = 2 * D * 16 + 16 + D


def two_block_model():
    inputs = keras.Input((None, 8))
    hidden = inputs
    for name in ("first", "second"):
        feedforward = moe(router=one_hot_router(top_k=2), name=name)
        hidden = layers.TransformerEncoderBlock(2, feedforward)(hidden)
    return keras.Model(inputs, hidden)


def test_layers_are_found_in_blocks_and_nested_models_in_order():
    inputs = keras.Input((None, 8))
    outer = keras.Model(inputs, moe(name="last")(two_block_model()(inputs)))
    assert list(inspection.moe_layers(outer)) == ["first", "second", "last"]
    blocks = [layers.TransformerEncoderBlock(2, moe(name="moe"), name=f"block_{n}") for n in (0, 1)]
    model = keras.Sequential([keras.Sequential(blocks)])
    model.build((None, 3, 8))
    # A path leaves out the common prefix.
    assert list(inspection.moe_layers(model)) == ["block_0_moe", "block_1_moe"]


def test_routings_are_those_the_layer_returns():
    layer = moe(router=one_hot_router(top_k=2), name="moe")
    model = keras.Sequential([keras.Input((5, 8)), layer])
    batches = [normal(2, 5, 8, seed=seed) for seed in range(2)]
    recorded = inspection.record_routings(model, batches)["moe"]
    for batch, routing in zip(batches, recorded, strict=True):
        _, expected = layer(batch, return_routing=True)
        for ours, theirs in zip(keras.tree.flatten(routing), keras.tree.flatten(expected)):
            np.testing.assert_array_equal(ours, array(theirs))
    # A batch that fails leaves the model as it was, too.
    with pytest.raises(ValueError, match=r"ran on batch 1: float64 \(2, 5, 7\)"):
        inspection.record_routings(model, [batches[0], np.zeros((2, 5, 7))])
    assert not layer._observers


@on_each_backend
def test_compiled_functions_count_in_the_context_alone():
    model = model_of(moe(name="moe"), shape=(8,))
    x = np.ones((4, 8), "float32")

    def counted(compute, *data):
        before = model.layers[0].read_counts(evaluation=True)
        compute(*data, verbose=0)
        counted = model.layers[0].read_counts(evaluation=True).since(before)
        return int(counted.assignments.sum())

    for call in ((model.evaluate, x, x), (model.predict, x)):
        assert counted(*call) == 0
        with inspection.count_in_evaluation(model), inspection.count_in_evaluation(model):
            assert counted(*call) == 4 * model.layers[0].router.top_k
        assert counted(*call) == 0
    with pytest.raises(KeyError), inspection.count_in_evaluation(model):
        raise KeyError
    assert counted(model.predict, x) == 0


# How many of the experts work on a token.
SERVING = {
    "top_k": ("top_k", 2),
    "forced": (ForcedRouter(E, top_k=3), 3),
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
    trained = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    assert inspection.count_parameters(model) == (model.count_params(), trained - idle)
    for part in (model.layers[0].experts, model.layers[0]):  # frozen, they cost the same
        part.trainable = False
        assert inspection.summarize(model) == [layer]


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_and_routers_that_layers_share_count_once(top_k, is_wrapped):
    bank, router = layers.FeedForwardExperts(E, 16), routers.TopKRouter(top_k=top_k)
    wrapped = [layers.ZeroComputationExperts(bank, num_zero=1) for _ in range(3)]
    sharing = [moe(each, router=router) for each in (wrapped if is_wrapped else [bank] * 3)]
    model = keras.Sequential([keras.Input((5, D)), *sharing])
    total, active = inspection.count_parameters(model)
    num_experts = sharing[0].experts.num_experts
    idle = E * EXPERT * (1 - min(1, 3 * top_k / num_experts))
    trained = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    assert total == model.count_params() and active == trained - round(idle)
    # A row of the table is about its layer alone.
    rows = inspection.summarize(model)
    of_router = rows[0].parameters - E * EXPERT
    expected = of_router + round(E * EXPERT * top_k / num_experts)
    assert [row.active_parameters for row in rows] == [expected] * 3
    assert [row.shared_parameters for row in rows] == [rows[0].parameters] * 3


def test_the_summary_prints_sizes_costs_and_loads(capsys):
    model = model_of(moe(name="moe"), keras.layers.Dense(2))
    keras_moe.summary(model)
    printed = capsys.readouterr().out.splitlines()
    router, head = D * E, 2 * D + 2
    layer, active = router + E * EXPERT, router + 2 * EXPERT
    total = model.count_params()
    assert printed[0].endswith(
        f": {total:,} parameters, {active + head:,} of them active for a token"
    )
    assert printed[3].split() == [
        *("moe", "2", "of", str(E), f"{layer:,}", f"{active:,}", f"{2 * active:,}", "-", "-"),
        "float32",
    ]
    assert printed[-1].startswith("No counts are here: experts are counted in training")
    model.layers[0].expert_counts.assign([6, 2, 0, 0])
    keras_moe.summary(model)
    assert capsys.readouterr().out.splitlines()[-1].split()[-5:-1] == ["3.00", "x", "fair", "2"]


def test_the_summary_of_tasks_marks_the_bank_that_they_share():
    experts = layers.FeedForwardExperts(E, 16)
    inputs = keras.Input((D,))
    model = keras.Model(inputs, layers.MultiGateMixtureOfExperts(experts, 2)(inputs))
    lines = []
    keras_moe.summary(model, print_fn=lines.append)
    text = f"{E * EXPERT + D * E:,} ({E * EXPERT:,} shared)"
    assert sum(text in line for line in lines) == 2
    assert lines[0].split(": ")[1].startswith(f"{model.count_params():,} parameters")


def test_the_first_evaluation_after_compile_counts():
    model = model_of(moe(name="moe"))
    with inspection.count_in_evaluation(model):
        model.evaluate(normal(3, D), normal(3, D), verbose=0)
    assert sum(inspection.summarize(model)[0].counts) == 3 * 2


def test_summary_counts_all_of_a_training_and_without_one_the_evaluations(tmp_path):
    model = model_of(moe(name="moe"), keras.layers.Dense(1))
    with inspection.count_in_evaluation(model):
        model(normal(3, D))
    assert sum(inspection.summarize(model)[0].counts) == 3 * 2
    model.fit(normal(8, D), normal(8, 1), epochs=2, callbacks=[ExpertMonitor()], verbose=0)
    (found,) = inspection.summarize(model)
    assert sum(found.counts) == 2 * 8 * 2
    # So has a file of it, and a model that had other counts before it loaded the file.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert inspection.summarize(loaded)[0].counts == found.counts
    untrained = keras.models.clone_model(model)
    untrained.save_weights(tmp_path / "untrained.weights.h5")
    loaded.load_weights(tmp_path / "untrained.weights.h5")
    assert not any(inspection.summarize(loaded)[0].counts)


@on_one_backend
def test_the_flops_of_convolutional_experts_count_each_place():
    def expert():
        convolution = keras.layers.Conv2D(3, 3, use_bias=False)  # of 6 by 6 places
        parts = [convolution, keras.layers.Flatten(), keras.layers.Dense(2, use_bias=False)]
        return keras.Sequential(parts)

    layer = layers.MixtureOfExperts([expert() for _ in range(4)], token_axes=1, top_k=1)
    (found,) = inspection.summarize(keras.Sequential([keras.Input((8, 8, 1)), layer]))
    router, convolution, dense = 64 * 4, 6 * 6 * 3 * 3 * 3, 6 * 6 * 3 * 2
    assert found.flops == 2 * (router + convolution + dense)
