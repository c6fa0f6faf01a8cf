"""Derivatives that are asked for: second ones, forward mode and `vmap`, of layers with a mask.

`test_own_experts.py` holds second derivatives against a formula.
"""

import contextlib

import numpy as np
import pytest
from backends import (
    BACKEND,
    FAST_MODE,
    MODES,
    assert_close,
    compiled,
    on_one_backend,
    to_numpy,
    unless_compiled,
)
from keras import ops
from layer_checks import normal

from keras_moe import layers, routers
from keras_moe.ops import any_derivative, platform

T, D, H, E = 6, 4, 5, 3


def derivatives(function, inputs):
    """Gradients of a scalar function of a list of tensors, which have derivatives again."""
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

    inputs = [each if each.requires_grad else each.requires_grad_() for each in inputs]
    return list(torch.autograd.grad(function(inputs), inputs, create_graph=True))


def along(function, directions):
    """The product of all second derivatives with directions, a function of a list of tensors."""

    def slope(inputs):
        pairs = zip(derivatives(function, inputs), directions)
        return sum(ops.sum(gradient * direction) for gradient, direction in pairs)

    return lambda inputs: derivatives(slope, inputs)


def mixture():
    experts = layers.FeedForwardExperts(E, H, activation="tanh")
    layer = layers.MixtureOfExperts(experts, routers.TopKRouter(E, 2))
    layer.build((None, D))
    return layer


def stateless(layer):
    """The layer as a function of tokens and the values of its trainable weights."""
    state = [variable.value for variable in layer.non_trainable_variables]
    return lambda inputs, **kwargs: layer.stateless_call(inputs[1:], state, inputs[0], **kwargs)[0]


def drawn_inputs(layer):
    shapes = [(T, D), *(variable.shape for variable in layer.trainable_variables)]
    return [normal(*shape, seed=number) for number, shape in enumerate(shapes)]


@pytest.mark.parametrize("kind", unless_compiled(["int8", "low rank", "layers"], ["layers"]))
def test_they_are_differences_of_gradients(kind):
    layer = mixture()
    if kind == "int8":
        layer.experts.quantize("int8")
    elif kind == "low rank":
        layer.experts.enable_lora(2)
    else:
        keras_layers = [layers.GatedFeedForward(H) for _ in range(E)]
        layer = layers.MixtureOfExperts(layers.LayerExperts(keras_layers))
        layer.build((None, D))
    inputs, call, mask = drawn_inputs(layer), stateless(layer), np.arange(T) < 4
    inputs[0][~mask] = np.nan
    directions, step = [normal(*each.shape) for each in inputs], 1e-3

    def loss(inputs):
        with any_derivative():
            return ops.sum(call(inputs, mask=ops.convert_to_tensor(mask)) ** 2)

    def moved(sign):
        places = [each + sign * step * way for each, way in zip(inputs, directions)]
        return compiled(lambda inputs: derivatives(loss, inputs), FAST_MODE)(places)

    mode = FAST_MODE if kind == "int8" else MODES[-1]
    actual = compiled(lambda inputs, ways: along(loss, ways)(inputs), mode)
    for each, high, low in zip(actual(inputs, directions), moved(1), moved(-1)):
        assert_close(each, (high - low) / (2 * step), tolerance=1e-2)


@pytest.mark.backends("tensorflow", "torch")
def test_vectorized_map():
    layer, inputs = mixture(), normal(2, T, D)

    def call(x):
        with any_derivative():
            return layer(x)

    output = compiled(lambda inputs: ops.vectorized_map(call, inputs), FAST_MODE)(inputs)
    for each, part in zip(output, inputs):
        assert_close(each, to_numpy(layer(part)))


@pytest.mark.backends("jax")
def test_transformations_of_jax():
    import jax

    layer = mixture()

    def plain(x):
        return ops.sum(layer(x) ** 2)

    def loss(x):
        with any_derivative():
            return plain(x)

    x, direction, step = normal(T, D), normal(T, D, seed=1), 1e-3
    places = np.stack([x - step * direction, x, x + step * direction])
    gradients = jax.jit(jax.vmap(jax.grad(plain)))(places)
    curvature = (gradients[2] - gradients[0]) / (2 * step)
    hessian = jax.jit(jax.hessian(loss))(x)
    assert_close(ops.tensordot(hessian, direction, 2), curvature, tolerance=1e-2)
    _, slope = jax.jvp(loss, (x,), (direction,))
    assert_close(slope, np.vdot(gradients[1], direction), tolerance=1e-4)
    # Outside of the context.
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(plain, (x,), (direction,))
    for name in ("cpu", "gpu", "tpu"):
        with platform(name), pytest.raises((TypeError, NotImplementedError), match="any_deriv"):
            jax.hessian(lambda x: plain(x))(x)
        with platform(name), pytest.raises(NotImplementedError, match="any_derivative"):
            jax.grad(lambda x: ops.sum(jax.grad(plain)(x) ** 2))(x)


@pytest.mark.backends("jax")
def test_rows_without_a_group_reach_no_second_derivative_on_accelerators():
    import jax

    experts = layers.FeedForwardExperts(E, H, activation="tanh")
    layer = layers.MixtureOfExperts(experts, routers.TopPRouter(E))
    layer.build((None, D))

    def slope(x):
        with any_derivative():
            return ops.sum(jax.grad(lambda x: ops.sum(layer(x) ** 2))(x) ** 2)

    found = []
    for name in ("cpu", "gpu", "tpu"):
        with platform(name):
            # A new function, as the platform is no argument.
            found.append(jax.jit(jax.grad(lambda x: slope(x)))(normal(T, D)))
    for each in found[1:]:
        assert_close(each, found[0])


@on_one_backend
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_transformations_of_torch():
    import torch
    from torch.autograd import forward_ad

    layer, x, direction = mixture(), torch.from_numpy(normal(T, D)), torch.from_numpy(normal(T, D))

    def plain(x):
        return torch.sum(layer(x) ** 2)

    def loss(x):
        with any_derivative():
            return plain(x)

    exact = torch.autograd.functional.vhp(loss, x, direction)[1]
    assert_close(torch.tensordot(torch.func.hessian(loss)(x).detach(), direction), exact)
    slope = torch.autograd.functional.jacobian(plain, x)
    assert_close(torch.vmap(torch.func.grad(loss))(x[None])[0].detach(), slope)
    # Not `torch.func.functional_call`: it replaces parameters, which Keras's layers do not read.
    values, call = [variable.value for variable in layer.trainable_variables], stateless(layer)

    def of_values(values):
        with any_derivative():
            return torch.sum(call([x, *values]) ** 2)

    gradients = torch.func.grad(of_values)(values)
    for each, gradient in zip(gradients, torch.autograd.grad(plain(x), values)):
        assert_close(each.detach(), gradient)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, direction)
        change = forward_ad.unpack_dual(loss(dual)).tangent
    assert_close(change, torch.sum(slope * direction))
    layer.experts.trainable = False
    (again,) = torch.autograd.grad(loss(x.requires_grad_()), x, create_graph=True)
    assert_close(torch.autograd.grad(torch.sum(again * direction), x)[0], exact)
    assert not any(variable.value.requires_grad for variable in layer.experts.variables)

    # Outside of the context. A graph is kept for other layers, too.
    (slope,) = torch.autograd.grad(plain(x), x, create_graph=True)
    assert_close(slope.detach(), again.detach())
    with pytest.raises(NotImplementedError, match="any_derivative"):
        torch.autograd.grad(torch.sum(slope * direction), x)
    x, layer.experts.trainable = x.detach(), True
    for transform in (torch.func.grad, torch.vmap):
        with pytest.raises(RuntimeError, match="setup_context"):
            transform(plain)(x[None])
    with torch.no_grad(), pytest.raises(RuntimeError, match="storage"):
        torch.vmap(plain)(x[None])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        with pytest.raises(RuntimeError, match="jvp"):
            plain(dual)
        with torch.no_grad():  # Each operation by itself has one.
            assert_close(forward_ad.unpack_dual(plain(dual)).tangent, change)


@pytest.mark.backends("tensorflow")
def test_transformations_of_tensorflow():
    import tensorflow as tf

    layer, x, direction = mixture(), tf.constant(normal(T, D)), tf.constant(normal(T, D))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        output = layer(x)
        change = tf.reduce_sum(output * direction)
    jacobian = tape.jacobian(output, x)
    slope = tape.gradient(change, x)
    assert_close(tf.tensordot(direction, jacobian, 2), slope)
    for context in (any_derivative(), contextlib.nullcontext()):
        with context, contextlib.ExitStack() as outside:
            if isinstance(context, contextlib.nullcontext):
                outside.enter_context(pytest.raises(NotImplementedError, match="any_derivative"))
            with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
                outputs = layer(x)
            assert_close(tf.tensordot(jacobian, direction, 2), accumulator.jvp(outputs))
    # Of so few tokens that most experts have none.
    layer = layers.MixtureOfExperts(num_experts=8, hidden_dim=H)

    def derivative(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = layer(x)
        return tape.jacobian(output, x)

    assert_close(tf.function(derivative)(x[:3]), derivative(x[:3]))
    layer.experts.quantize("int8")
    assert_close(derivative(x[:1])[0, :, 0], derivative(x)[0, :, 0])
