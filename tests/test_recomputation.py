"""Gradient checkpointing: equal to the plain step in all it computes and in all it changes."""

import functools

import keras
import numpy as np
import pytest
from backends import QUICK_JIT, assert_close, gradients, on_one_backend, to_numpy
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


def test_masks_of_calls_with_several_tensors_are_kept():
    with keras.RematScope("list_of_layers", layer_names=["recomputed"]):
        layer = mixture(name="recomputed")
    ids, seen = keras.Input((LENGTH,), dtype="int32"), keras.Input((LENGTH, 3))
    outputs = layer(keras.layers.Embedding(20, D, mask_zero=True)(ids), router_inputs=seen)
    model = keras.Model([ids, seen], outputs)
    model.compile("sgd", "mse", jit_compile=QUICK_JIT)
    x = np.arange(2 * LENGTH).reshape(2, LENGTH) % 4
    model.fit([x, normal(2, LENGTH, 3)], normal(2, LENGTH, D), verbose=0)
    assert to_numpy(layer.expert_counts).sum() == 2 * np.sum(x > 0)


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


@on_one_backend
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


@on_one_backend
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
