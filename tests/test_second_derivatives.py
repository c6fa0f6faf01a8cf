"""Second derivatives equal those of a plain formula, and a gradient penalty trains."""

import numpy as np
import pytest
from backends import BACKEND, MODES, _compile, _on_arrays, assert_close
from keras import ops

from keras_moe import layers, routers

T, D, H, E = 6, 4, 5, 3


def first_gradients(function, inputs):
    """Gradients of a scalar function of a list of tensors, which can be differentiated."""
    if BACKEND == "jax":
        import jax

        return jax.grad(function)(inputs)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = function(inputs)
        return tape.gradient(value, inputs)
    import torch

    if not any(tensor.requires_grad for tensor in inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    return list(torch.autograd.grad(function(inputs), inputs, create_graph=True))


def second_derivatives(function):
    """From lists of arrays to the product of all second derivatives with some directions."""

    def along(inputs, directions):
        def slope(inputs):
            gradients = first_gradients(function, inputs)
            return sum(ops.sum(g * d) for g, d in zip(gradients, directions))

        return first_gradients(slope, inputs)

    return along


def bank(gated):
    cls = layers.GatedExperts if gated else layers.FeedForwardExperts
    return cls(E, H, activation="tanh", use_bias=True)


def mixture(router, gated):
    layer = layers.MixtureOfExperts(bank(gated), router)
    layer.build((None, D))
    return layer


def plain(layer, x, values):
    """The layer as a formula, on other values of its weights."""
    names = [variable.path.split("/")[-1] for variable in layer.trainable_variables]
    print(names)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("router", ["top_k", "dense"])
def test_it(mode, gated, router):
    layer = mixture(
        routers.TopKRouter(E, 2) if router == "top_k" else routers.DenseRouter(E), gated
    )
    rng = np.random.default_rng(0)
    values = [rng.normal(size=v.shape).astype("float32") for v in layer.trainable_variables]
    inputs = [rng.normal(size=(T, D)).astype("float32"), *values]
    directions = [rng.normal(size=each.shape).astype("float32") for each in inputs]
    names = [v.path.split("/")[-1] for v in layer.trainable_variables]
    state = [v.value for v in layer.non_trainable_variables]

    def ours(inputs):
        x, *values = inputs
        y, _ = layer.stateless_call(values, state, x)
        return ops.sum(y**3)

    def formula(inputs):
        x, *values = inputs
        w = dict(zip(names, values))
        probs = ops.softmax(x @ w["kernel"])
        if router == "top_k":
            indices = ops.top_k(probs, 2)[1]
            chosen = ops.sum(ops.one_hot(indices, E), axis=1)
            weights = probs * chosen
            weights = weights / ops.sum(weights, axis=-1, keepdims=True)
        else:
            weights = probs
        hidden = ops.einsum("td,edh->teh", x, w["up_kernel"]) + w["up_bias"]
        if gated:
            gate = ops.einsum("td,edh->teh", x, w["gate_kernel"]) + w["gate_bias"]
            hidden = ops.tanh(gate) * hidden
        else:
            hidden = ops.tanh(hidden)
        y = ops.einsum("teh,ehd->ted", hidden, w["down_kernel"]) + w["down_bias"]
        return ops.sum(ops.einsum("ted,te->td", y, weights) ** 3)

    expected = _on_arrays(second_derivatives(formula))(inputs, directions)
    actual = _on_arrays(_compile(second_derivatives(ours), mode))(inputs, directions)
    for name, one, other in zip(["x", *names], actual, expected):
        print(name, np.abs(one - other).max(), np.abs(other).max())
        assert_close(one, other, tolerance=1e-4)
