"""Gradient checkpointing: equal to the plain step in all it computes and in all it changes."""

import functools

import keras
import numpy as np
import pytest
from backends import QUICK_JIT, assert_close, gradients, to_numpy
from layer_checks import normal

from keras_moe import layers, routers

D, H, E, LENGTH = 8, 16, 4, 6


def mixture(capacity_factor=1.0, **kwargs):
    """A layer with every kind of state: a moving bias, noise, a capacity, dropout."""
    return layers.MixtureOfExperts(
        layers.GatedExperts(E, H),
        router=routers.TopKRouter(
            E, balancer="loss_free", input_jitter=0.1, logit_noise=0.5, use_bias=True, seed=1
        ),
        router_losses=["load_balance", "router_z"],
        capacity_factor=capacity_factor,
        shared_expert=keras.Sequential(
            [keras.layers.Dense(D, kernel_regularizer="l2"), keras.layers.Dropout(0.3, seed=2)]
        ),
        **kwargs,
    )


def block(**kwargs):
    return layers.TransformerEncoderBlock(2, mixture(), dropout=0.2, **kwargs)


def balanced(**kwargs):
    return layers.MixtureOfExperts(
        layers.FeedForwardExperts(E, H), routers.TopKRouter(E, balancer="loss_free"), **kwargs
    )


def model_of(make, mode):
    keras.utils.set_random_seed(3)
    ids = keras.Input((LENGTH,), dtype="int32")
    hidden = keras.layers.Embedding(20, D, mask_zero=True)(ids)
    if mode == "larger_than":
        scope = keras.RematScope(mode, output_size_threshold=10)
    else:
        scope = keras.RematScope(mode, layer_names=["recomputed"])
    with scope:
        layer = make(name="recomputed")
    return keras.Model(ids, keras.layers.Dense(1)(layer(hidden)))


@functools.cache
def trained(make, mode, jit_compile):
    model = model_of(make, mode)
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit_compile)
    generator = np.random.default_rng(0)
    x = generator.integers(0, 20, (8, LENGTH)).astype("int32")
    y = generator.normal(size=(8, LENGTH, 1)).astype("float32")
    history = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return history.history["loss"], [to_numpy(each) for each in model.variables]


CASES = [
    (mixture, "list_of_layers", "auto"),
    (block, "list_of_layers", QUICK_JIT),
    (balanced, "full", QUICK_JIT),
    (balanced, "larger_than", QUICK_JIT),
]


@pytest.mark.parametrize("make, mode, jit_compile", CASES)
def test_a_training_equals_the_plain_one(make, mode, jit_compile):
    """Losses, weights, counters, the selection bias and the states of random draws."""
    losses, variables = trained(make, None, jit_compile)
    losses_again, variables_again = trained(make, mode, jit_compile)
    assert_close(np.array(losses_again), np.array(losses))
    for each, again in zip(variables, variables_again):
        assert_close(again, each, scale=1.0)


def test_remat_of_a_stateless_call():
    """`keras.remat` takes functions without effects."""
    layer = mixture()
    layer.build((None, LENGTH, D))
    layer(normal(2, LENGTH, D))  # builds the shared expert
    state = [keras.ops.copy(variable.value) for variable in layer.non_trainable_variables]

    def loss(remat, *tensors):
        *weights, inputs = tensors

        def call(*tensors):
            *weights, inputs = tensors
            outputs, _, losses = layer.stateless_call(
                weights, state, inputs, training=True, return_losses=True
            )
            return outputs, sum(losses)

        outputs, extra = remat(call)(*weights, inputs)
        return keras.ops.sum(outputs**2) + extra

    weights = to_numpy([variable.value for variable in layer.trainable_variables])
    plain, again = (
        gradients(functools.partial(loss, remat), [*weights, normal(2, LENGTH, D)])
        for remat in (lambda call: call, keras.remat)
    )
    for one, other in zip(again, plain):
        assert_close(one, other)


def checkpointed(layer, inputs, **kwargs):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(layer, inputs, use_reentrant=False, **kwargs)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("make", [mixture, block])
def test_checkpoint_of_torch(make):
    import torch

    def step(call):
        keras.utils.set_random_seed(3)
        layer = make()
        inputs = keras.ops.convert_to_tensor(normal(4, LENGTH, D)).requires_grad_()
        layer(inputs)
        for _ in range(2):
            outputs = call(layer, inputs, training=True)
            loss = (outputs**2).sum() + sum(layer.losses)
            weights = [variable.value for variable in layer.trainable_variables]
            gradients = torch.autograd.grad(loss, [inputs, *weights])
        return to_numpy([outputs, loss, *gradients, *map(to_numpy, layer.variables)])

    plain = step(lambda layer, inputs, **kwargs: layer(inputs, **kwargs))
    for again, each in zip(step(checkpointed), plain):
        assert_close(again, each, scale=max(1.0, np.max(np.abs(each), initial=0.0)))


@pytest.mark.backends("torch")
@pytest.mark.parametrize("make", [mixture, block])
@pytest.mark.parametrize("told", [{}, {"training": False}], ids=["not told", "told"])
def test_checkpoint_of_torch_without_training(make, told):
    import torch

    layer = make()
    inputs = keras.ops.convert_to_tensor(normal(2, LENGTH, D)).requires_grad_()
    layer(inputs)  # builds it

    def gradient(call):
        return torch.autograd.grad(call(layer, inputs, **told).sum(), inputs)[0]

    for is_trained in (False, True):
        if is_trained:
            layer(inputs.detach(), training=True)
        expected = gradient(lambda layer, inputs, **told: layer(inputs, **told))
        assert_close(to_numpy(gradient(checkpointed)), to_numpy(expected))
