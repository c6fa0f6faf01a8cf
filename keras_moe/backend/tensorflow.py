"""TensorFlow primitives."""

import tensorflow as tf

# No public name leads to these operations; Keras imports them from here as well.
from tensorflow.compiler.tf2xla.python import xla


def compiles_static_shapes():
    """Whether the current trace is compiled by XLA, which fixes every shape."""
    return tf.__internal__.get_enclosing_xla_context() is not None


def differentiable(forward, backward, inputs, context):
    """`forward(inputs, context)[0]`, whose gradient for `inputs` is computed by `backward`.

    `forward` returns `(output, saved)`; `backward(inputs, context, saved, gradient)` returns one
    gradient for each input. `context` holds integer tensors, which have no gradient.
    """

    @tf.custom_gradient
    def function(*inputs):
        output, saved = forward(inputs, context)

        def gradient(upstream):
            return tuple(backward(inputs, context, saved, upstream))

        return output, gradient

    return function(*inputs)


def vjp(function, inputs):
    """`function(*inputs)` and its pullback, for functions of tensors only."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = function(*inputs)

    def pullback(cotangent):
        return tape.gradient(output, inputs, output_gradients=cotangent)

    return output, pullback


def gather_rows(tensor, indices):
    """Rows of `tensor` (R, ...) at integer `indices` of any shape."""
    return tf.gather(tensor, indices)


def unstack_sizes(sizes):
    """The entries of `sizes` (E,) one by one, usable as bounds of a slice."""
    return tf.unstack(sizes)


def stack_entries(entries, like):
    """Tensors of the shapes and dtypes of `like`, (E, ...), from their entries.

    Args:
        entries: iterable of pairs: a number below E, and one entry (...) for each of the tensors.
            There is one pair for each number, in their order.
        like: list of tensors.
    """
    columns = zip(*(parts for _, parts in entries))
    return [tf.cast(tf.stack(parts), tensor.dtype) for parts, tensor in zip(columns, like)]


def slice_at(tensor, start, shape):
    """The part of `tensor` of a static `shape` that begins at the indices `start`."""
    # `tf.slice` wants a start that is known at compile time: where it depends on data, TensorFlow
    # would silently turn the data into a constant and compile again for every batch.
    return xla.dynamic_slice(tensor, tf.stack(start), tf.constant(shape))


def scan(step, carry, xs):
    """`carry, y = step(carry, x)` along the first axis of `xs`: the last carry and all `y`.

    Every `y` has the dtype of the last of `xs`.
    """
    length = tf.shape(xs[0])[0]
    outputs = tf.TensorArray(xs[-1].dtype, size=length)

    def body(i, carry, outputs):
        carry, output = step(carry, [tf.gather(x, i) for x in xs])
        return i + 1, carry, outputs.write(i, output)

    # Without a bound on the trips XLA cannot size the stack that the gradient needs.
    _, carry, outputs = tf.while_loop(
        lambda i, *_: i < length, body, (0, carry, outputs), maximum_iterations=length
    )
    return carry, outputs.stack()


def sort(integers):
    """A vector of integers in ascending order."""
    # `tf.sort` is made from `top_k`, which XLA compiles to a slower sort of pairs.
    return xla.sort(integers)


def sum_over_replicas(values):
    """The sum of `values` over the replicas of a `tf.distribute` strategy."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return values
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, values)
