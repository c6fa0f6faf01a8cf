"""One forward or one forward and backward pass of a layer, compiled, on every backend."""

import keras
import numpy as np


def compiled_step(layer, inputs, backward=True, jit=True, training=True):
    """A function that runs one pass and waits for its end.

    Called without arguments it runs on `inputs`, and with a tensor from `to_tensor` on that.

    The backward pass computes the loss and the gradients of the inputs and of all weights, router
    losses included; without the loss a compiler would leave out the twin's last product. On PyTorch
    the pass runs eagerly: Keras does not compile there by default.

    Args:
        layer: a built Keras layer.
        inputs: NumPy array.
        backward: whether gradients are computed.
        jit: whether TensorFlow compiles with XLA; without it runs as a graph.
        training: passed to the layer.
    """
    build = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[keras.backend.backend()]
    return build(layer, inputs, backward, jit, training)


def to_tensor(layer, inputs):
    """What a step of the layer takes."""
    return keras.ops.cast(keras.ops.convert_to_tensor(inputs), layer.compute_dtype)


def cotangent(shape, dtype):
    """What the output is multiplied by to get a scalar: fixed, so that no gradient is trivial."""
    values = np.random.default_rng(1).standard_normal(shape).astype("float32")
    return keras.ops.cast(keras.ops.convert_to_tensor(values), dtype)


def _tensorflow(layer, inputs, backward, jit, training):
    import tensorflow as tf

    x = to_tensor(layer, inputs)
    weight = cotangent(layer.compute_output_shape(x.shape), layer.compute_dtype)
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

    def run(x=x):
        result = step(x, weight)
        tf.reshape(tf.nest.flatten(result)[0], -1)[:1].numpy()  # waits, and copies little

    return run


def jax_function(layer, inputs, backward, training):
    """The jitted pass and its arguments, for timing as well as for cost analysis."""
    import jax

    x = to_tensor(layer, inputs)
    weight = cotangent(layer.compute_output_shape(x.shape), layer.compute_dtype)
    trainable = [variable.value for variable in layer.trainable_variables]
    fixed = [variable.value for variable in layer.non_trainable_variables]

    def loss(trainable, x, fixed, weight):
        outputs, _, losses = layer.stateless_call(
            trainable, fixed, x, training=training, return_losses=True
        )
        return (outputs * weight).astype("float32").sum() + sum(losses, 0.0)

    def forward(trainable, x, fixed, weight):
        return layer.stateless_call(trainable, fixed, x, training=training)[0]

    function = jax.value_and_grad(loss, argnums=(0, 1)) if backward else forward
    return jax.jit(function), (trainable, x, fixed, weight)


def _jax(layer, inputs, backward, jit, training):
    import jax

    function, (trainable, x, *others) = jax_function(layer, inputs, backward, training)
    return lambda x=x: jax.block_until_ready(function(trainable, x, *others))


def _torch(layer, inputs, backward, jit, training):
    import torch

    x = to_tensor(layer, inputs)
    weight = cotangent(layer.compute_output_shape(x.shape), layer.compute_dtype)
    variables = [variable.value for variable in layer.trainable_variables]

    def compute(x):
        if not backward:
            with torch.no_grad():
                layer(x, training=training)
            return
        inputs = x.detach().requires_grad_()
        outputs = layer(inputs, training=training)
        loss = (outputs * weight).float().sum() + sum(layer.losses, 0.0)
        torch.autograd.grad(loss, [inputs, *variables])

    def run(x=x):
        compute(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return run
