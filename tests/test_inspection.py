"""Looking into a model: its MoE layers by name, and the routings of given data."""

import keras
import numpy as np
import pytest
from layer_checks import moe, one_hot_router

from keras_moe import inspection, layers


def two_block_model():
    inputs = keras.Input((None, 8))
    hidden = inputs
    for name in ("first", "second"):
        feedforward = moe(router=one_hot_router(top_k=2), name=name)
        hidden = layers.TransformerEncoderBlock(2, feedforward)(hidden)
    return keras.Model(inputs, hidden)


def test_layers_are_found_inside_blocks_in_order():
    assert list(inspection.moe_layers(two_block_model())) == ["first", "second"]


def test_layers_of_a_nested_model_are_in_its_order():
    inputs = keras.Input((None, 8))
    outer = keras.Model(inputs, moe(name="last")(two_block_model()(inputs)))
    assert list(inspection.moe_layers(outer)) == ["first", "second", "last"]


def test_routings_are_those_the_layer_returns():
    layer = moe(router=one_hot_router(top_k=2), name="moe")
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, layer(inputs))
    batches = [np.random.default_rng(seed).normal(size=(2, 5, 8)) for seed in range(2)]
    recorded = inspection.record_routings(model, batches)["moe"]
    for batch, routing in zip(batches, recorded, strict=True):
        _, expected = layer(batch, return_routing=True)
        for name in routing._fields:
            np.testing.assert_array_equal(
                getattr(routing, name), keras.ops.convert_to_numpy(getattr(expected, name))
            )
    assert layer.routing_listener is None


def test_what_keras_has_compiled_counts_inside_of_the_context_alone():
    model = keras.Sequential([keras.Input((8,)), moe(name="moe")])
    model.compile("sgd", "mse")
    x = np.ones((4, 8), "float32")

    def counted(compute):
        model.layers[0].reset_counts()
        compute()
        return float(np.sum(keras.ops.convert_to_numpy(model.layers[0].expert_counts)))

    for compute in (
        lambda: model.evaluate(x, x, verbose=0),
        lambda: model.predict(x, verbose=0),
    ):
        assert counted(compute) == 0
        with inspection.count_in_evaluation(model):
            assert counted(compute) == 4 * model.layers[0].router.top_k
        assert counted(compute) == 0


def test_a_failing_batch_leaves_the_model_as_it_was():
    model = two_block_model()
    with pytest.raises(ValueError):
        inspection.record_routings(model, [np.zeros((2, 5, 7))])
    assert all(layer.routing_listener is None for layer in inspection.moe_layers(model).values())


def test_a_path_leaves_out_what_all_layers_have_in_front():
    class Tower(keras.Model):
        def __init__(self):
            super().__init__()
            self.blocks = [
                layers.TransformerEncoderBlock(2, moe(name="experts"), name=f"block_{number}")
                for number in range(2)
            ]

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model = Tower()
    model(np.zeros((1, 3, 8), "float32"))
    assert list(inspection.moe_layers(model)) == ["block_0_experts", "block_1_experts"]


def test_an_array_is_not_taken_for_a_list_of_batches():
    with pytest.raises(ValueError, match=r"of shape \(2, 5, 8\). Pass `\[array\]`"):
        inspection.record_routings(two_block_model(), np.zeros((2, 5, 8)))
