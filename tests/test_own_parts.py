"""Routers, banks, layers and functions of a user's own that are unusual, and right."""

import keras
import numpy as np
import pytest
from backends import BACKEND, FAST_MODE, compiled
from layer_checks import D, E, array, moe, normal

from keras_moe import layers, ops, routers

X = normal(6, D)


class HiddenRouter(routers.TopKRouter):
    """Its kernel has another height than the tokens."""

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.hidden = keras.layers.Dense(5, activation="relu")
        self.hidden.build(tokens_shape)

    def kernel_shape(self, features):
        return 5, self.num_experts

    def project(self, tokens):
        return keras.ops.matmul(self.hidden(tokens), self.kernel)


class PairRouter(routers.LogitRouter):
    """Two logits an expert, of which the larger counts, and no `top_k`."""

    max_top_k = 2

    def kernel_shape(self, features):
        return features, 2 * self.num_experts

    def route(self, tokens, mask, training):
        logits, mask = self.logits(tokens, mask, training)
        pairs = keras.ops.reshape(logits, (-1, self.num_experts, 2))
        return ops.top_k_routing(keras.ops.max(pairs, -1), 2, mask=mask)


class EqualBank(layers.ExpertBank):
    """A bank without weights, whose shapes are what NumPy gives."""

    def build(self, tokens_shape):
        pass

    def compute_output_shape(self, tokens_shape):
        return (*tokens_shape[:-1], np.int64(tokens_shape[-1]))

    def call(self, tokens, plan):
        return 2 * tokens


@pytest.mark.parametrize("router", [HiddenRouter, PairRouter])
def test_a_router_has_a_kernel_of_any_shape(router):
    assert moe(router=router(E))(X).shape == X.shape


def test_a_bank_without_weights_serves_layers_of_any_width():
    bank = EqualBank(E)
    assert moe(bank, router_losses=())(X).shape == X.shape
    assert moe(bank, router_losses=())(X[:, :3]).shape == (6, 3)


def test_a_regularizer_returns_a_number_an_expert_or_none_of_its_own():
    def of_each(kernel):
        return keras.ops.sum(keras.ops.square(kernel), (1, 2))

    layer = moe(layers.FeedForwardExperts(E, 4, kernel_regularizer=of_each), router_losses=())
    layer(X)
    kernels = (layer.experts.up_kernel, layer.experts.down_kernel)
    expected = sum(np.sum(array(kernel) ** 2) for kernel in kernels)
    np.testing.assert_allclose(np.sum(array(sum(layer.losses))), expected, rtol=1e-5)
    other = moe(layers.FeedForwardExperts(E, 4, kernel_regularizer=lambda kernel: 0))
    other(X)
    assert array(sum(other.losses)) == 0


def test_a_sequence_length_is_a_tensor():
    # What is compiled takes it for an unknown number.
    route = compiled(
        lambda logits, length: ops.expert_choice_routing(logits, 1.0, None, length).counts,
        "eager" if BACKEND == "jax" else FAST_MODE,
    )
    np.testing.assert_array_equal(
        route(normal(6, E), np.array(3, "int32")),
        array(ops.expert_choice_routing(normal(6, E), 1.0, None, 3).counts),
    )


@pytest.mark.backends("tensorflow")
def test_a_layer_inside_may_lose_its_rank():
    import tensorflow as tf

    class OfNumPy(keras.layers.Layer):
        def call(self, inputs):
            return tf.numpy_function(lambda rows: 2 * rows, [inputs], tf.float32)

        def build(self, inputs_shape):
            pass

        def compute_output_shape(self, inputs_shape):
            return inputs_shape

    bank = layers.LayerExperts([OfNumPy() for _ in range(E)])
    for layer in (moe(shared_expert=OfNumPy()), moe(bank)):
        model = keras.Sequential([keras.Input((D,)), layer])
        assert model.predict(X, verbose=0).shape == X.shape
