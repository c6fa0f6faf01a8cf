"""One forward or one forward and backward pass of a layer, compiled, on every backend."""

import keras
import numpy as np


def compiled_step(layer, inputs, backward=True, jit=True, training=True):
    """A function that runs one pass and waits for its end.

    Called without arguments it runs on `inputs`, and with a tensor from `to_tensor` on that.

    The backward pass computes the loss and the gradients of the inputs and of all weights, router
    losses included; without the loss a compiler would leave out the twin's last product. On PyTorch
    the pass runs eagerly: Keras does not compile there by default. Without `jit` TensorFlow runs
    it as a graph.
    """
    x, weight = to_tensor(layer, inputs), cotangent(layer, inputs)
    make = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[keras.backend.backend()]
    run = make(layer, x, weight, backward, jit, training)
    return lambda x=x: run(x)


def to_tensor(layer, inputs):
    """What a step of the layer takes."""
    return keras.ops.cast(keras.ops.convert_to_tensor(inputs), layer.compute_dtype)


def cotangent(layer, inputs):
    """What the output is multiplied by to get a scalar: fixed, so that no gradient is trivial."""
    shape = layer.compute_output_shape(inputs.shape)
    return to_tensor(layer, np.random.default_rng(1).standard_normal(shape).astype("float32"))


def _tensorflow(layer, x, weight, backward, jit, training):
    import tensorflow as tf

    variables = [variable.value for variable in layer.trainable_variables]

    @tf.function(jit_compile=jit)
    def step(x, weight):
        if not backward:
            return layer(x, training=training)
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, training=training)
            loss = tf.reduce_sum(tf.cast(outputs * weight, "float32"))
            loss += sum(layer.losses, 0.0)
        return [loss, tape.gradient(loss, [x, *variables])]

    def run(x):
        result = step(x, weight)
        tf.reshape(tf.nest.flatten(result)[0], -1)[:1].numpy()  # waits, and copies little

    return run


def jax_pass(layer, backward=True, training=True):
    """A function of trainable values, inputs, other values and the cotangent."""
    import jax

    def loss(trainable, x, fixed, weight):
        outputs, _, losses = layer.stateless_call(
            trainable, fixed, x, training=training, return_losses=True
        )
        return (outputs * weight).astype("float32").sum() + sum(losses, 0.0)

    def forward(trainable, x, fixed, weight):
        return layer.stateless_call(trainable, fixed, x, training=training, return_losses=True)[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)) if backward else forward)


def jax_function(layer, inputs, backward, training):
    """`jax_pass` and its arguments, for timing as well as for analysis."""
    trainable = [variable.value for variable in layer.trainable_variables]
    fixed = [variable.value for variable in layer.non_trainable_variables]
    arguments = (trainable, to_tensor(layer, inputs), fixed, cotangent(layer, inputs))
    return jax_pass(layer, backward, training), arguments


def _jax(layer, x, weight, backward, jit, training):
    import jax

    function, (trainable, _, fixed, _) = jax_function(layer, x, backward, training)
    return lambda x: jax.block_until_ready(function(trainable, x, fixed, weight))


def _torch(layer, x, weight, backward, jit, training):
    import torch

    variables = [variable.value for variable in layer.trainable_variables]

    def run(x):
        if backward:
            inputs = x.detach().requires_grad_()
            outputs = layer(inputs, training=training)
            loss = (outputs * weight).float().sum() + sum(layer.losses, 0.0)
            torch.autograd.grad(loss, [inputs, *variables])
        else:
            with torch.no_grad():
                layer(x, training=training)
        if x.is_cuda:
            torch.cuda.synchronize()

    return run
