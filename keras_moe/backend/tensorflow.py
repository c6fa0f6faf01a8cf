"""TensorFlow primitives."""

import contextlib
import itertools
import threading

import tensorflow as tf

# No public name leads to these operations; Keras imports them from here as well.
from tensorflow.compiler.tf2xla.python import xla

from keras_moe._internal.keras_internals import current_model
from keras_moe.backend.one_hot import count_integers as count_integers
from keras_moe.backend.one_hot import take_columns as take_columns

# So many entries of a kernel are converted at once, to be multiplied in the cache.
CPU_BLOCK = 2**17

# Of large kernels a block is larger, as each takes some operations.
MOST_BLOCKS = 64


def compiles_static_shapes():
    """Whether the current trace is compiled by XLA, which fixes every shape."""
    return tf.__internal__.get_enclosing_xla_context() is not None


def current_platform():
    """The platform of the process: that of its fastest device."""
    types = {device.device_type for device in tf.config.list_logical_devices()}
    return next((name for name in ("tpu", "gpu") if name.upper() in types), "cpu")


def on_its_platform(function, *operands):
    """`function(platform, *operands)` for the platform of the process.

    TensorFlow does not tell for which device a function is traced.
    """
    return function(current_platform(), *operands)


def differentiable(forward, backward, inputs, context):
    """The output of `forward`, whose gradient for `inputs` is computed by `backward`.

    `forward(inputs, context, keep)` returns `(output, saved)`; where `keep` is False, there is no
    backward pass, and nothing need be saved. `backward(inputs, context, saved, gradient)` returns
    gradients in the structure of `inputs`. `inputs` and `context` are structures of tensors; those
    of `context` have no gradient.
    """

    # A variable would be taken for one that `forward` uses besides its inputs.
    context = tf.nest.map_structure(tf.convert_to_tensor, context)

    @tf.custom_gradient
    def function(*tensors):
        inputs_again = tf.nest.pack_sequence_as(inputs, tensors)
        # TensorFlow does not tell whether there will be a gradient.
        output, saved = forward(inputs_again, context, keep=True)

        def gradient(upstream):
            return tuple(tf.nest.flatten(backward(inputs_again, context, saved, upstream)))

        return output, gradient

    return function(*map(tf.convert_to_tensor, tf.nest.flatten(inputs)))


def compile_once(function):
    """The function itself: `tf.function` compiles what it is part of."""
    return function


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


def unstack_sizes(sizes, num_rows):
    """The entries of `sizes` (E,) one by one, then how many of the rows are behind the last group.

    They are sizes for `split_rows`, and bounds of slices.
    """
    return [*tf.unstack(sizes), num_rows - tf.reduce_sum(sizes)]


def split_rows(rows, sizes):
    """The rows of each of the groups that stand one behind another, of all rows (R, ...).

    Args:
        rows: (R, ...).
        sizes: list of what `unstack_sizes` gave.
    """
    # ONNX and LiteRT split by constants only.
    bounds = [0, *itertools.accumulate(sizes)]
    return [rows[start:end] for start, end in itertools.pairwise(bounds)]


def join_rows(parts):
    """Parts of rows (R, ...) one behind another, all of one dtype."""
    return tf.concat(parts, 0)


def knows_sizes():
    """Whether the entries of sizes are known integers."""
    return False


def multiply_groups(rows, sizes, experts, kernels, bias=None, transposed=False):
    """One group of rows through the affine map of its expert.

    Args:
        rows: (R, D), or (R, H) if `transposed`.
        sizes: list of one size, R.
        experts: list of one number, that of the expert; a tensor in `loop_over_groups`.
        kernels: `Kernels` of all experts.
        bias: (E, H) or None.
        transposed: whether to multiply by the transposed kernel.

    Returns:
        (R, H), or (R, D), in the dtype of the rows.
    """
    (size,), (expert,), scale = sizes, experts, kernels.scale
    if scale is not None and transposed:
        rows *= tf.cast(scale[expert], rows.dtype)
    if transposed or not kernels.converts:
        kernel = tf.cast(kernels.of(expert), rows.dtype)
        product = tf.matmul(rows, kernel, transpose_b=transposed)
    elif tf.is_tensor(expert):
        product = _product_in_blocks(rows, kernels.of(expert))
    else:
        # An operation on all of a kernel is too long for an expert without rows: there only the
        # first row is converted. LiteRT fails to multiply no rows by it, so there is one of zeros.
        length = tf.where(size > 0, rows.shape[1], 1)
        some = tf.pad(rows[:, :length], ((0, tf.maximum(1 - size, 0)), (0, 0)))
        product = tf.matmul(some, tf.cast(kernels.of(expert, length), rows.dtype))[:size]
    if scale is not None and not transposed:
        product *= tf.cast(scale[expert], rows.dtype)
    return product if bias is None else product + tf.cast(bias[expert], rows.dtype)


def _product_in_blocks(rows, kernel):
    """`rows @ kernel`, where blocks of the kernel are converted in turn, and stay in the cache.

    Not in a loop, as `ops.grouped.tiles` does under XLA: here a trip costs more than a block.
    """
    length, width = kernel.shape
    # Integers of four bits are floats by now. Sums over blocks are rounded after each, which
    # bfloat16 and float16 would show.
    in_one = kernel.dtype == rows.dtype or rows.dtype != tf.float32
    block = length if in_one else max(CPU_BLOCK // width, length // MOST_BLOCKS, 1)
    lengths = [min(block, length - start) for start in range(0, length, block)]
    products: list = []
    for part, of_kernel in zip(tf.split(rows, lengths, 1), tf.split(kernel, lengths)):
        # Blocks that are converted side by side would not stay in the cache.
        with tf.control_dependencies(products[-1:]):
            of_kernel = tf.cast(of_kernel, rows.dtype)
        products.append(tf.matmul(part, of_kernel))
    return tf.add_n(products)


def loops_over_groups():
    """Whether there is a `loop_over_groups`."""
    return True


def loop_over_groups(function, sizes, buffers):
    """Fill buffers group by group, in a loop over the groups that have rows.

    Args:
        function: `function(group, start, end)` returns the rows from `start` to `end` of each
            buffer, which are those of the group; all arguments are integer tensors.
        sizes: (G,) integers, the sizes of groups that stand one behind another.
        buffers: list of tensors (R, ...).

    Returns:
        The list of filled buffers.
    """
    ends = tf.cumsum(sizes)
    busy = tf.where(sizes > 0)[:, 0]
    number = tf.shape(busy)[0]

    def body(i, *buffers):
        group = busy[i]
        start, end = ends[group] - sizes[group], ends[group]
        where = tf.expand_dims(tf.range(start, end), 1)
        parts = zip(buffers, function(group, start, end))
        return i + 1, *(tf.tensor_scatter_nd_update(buffer, where, part) for buffer, part in parts)

    _, *buffers = tf.while_loop(lambda i, *_: i < number, body, (0, *buffers))
    return buffers


class StackedGradients:
    """Gradients of stacked kernels and biases, of one expert after the other.

    Args:
        trained: list of a dict for each projection, which may have a "kernel" and a "bias".
    """

    def __init__(self, trained):
        self._trained = trained
        self._parts = [{name: [] for name in of} for of in trained]

    def add(self, sizes, experts, factors):
        """Add the gradients of one expert; each expert comes once, by itself, in order.

        Args:
            sizes, experts: not used.
            factors: for each projection its input rows, and the gradient of its output rows.
        """
        for (rows, gradient), of, parts in zip(factors, self._trained, self._parts):
            if "kernel" in of:
                product = tf.matmul(rows, gradient, transpose_a=True)
                parts["kernel"].append(tf.cast(product, of["kernel"].dtype))
            if "bias" in of:
                total = tf.reduce_sum(tf.cast(gradient, "float32"), axis=0)
                parts["bias"].append(tf.cast(total, of["bias"].dtype))

    def result(self):
        """The gradients in the structure of `trained`."""
        return [{name: tf.stack(each) for name, each in of.items()} for of in self._parts]


stacked_gradients = StackedGradients


def argmax(scores):
    """Where the largest of the last axis is, int32; the first of equals."""
    # Two plain reductions are faster than one of pairs, under XLA several times.
    best = tf.reduce_max(scores, axis=-1, keepdims=True)
    number = scores.shape[-1]
    return tf.reduce_min(tf.where(scores >= best, tf.range(number), number), axis=-1)


def has_grouped_products(platform, dtype, widths):
    """TensorFlow has no grouped product."""
    return False


def batched_product(left, right):
    """(N, D, H) float32, of (N, D, B) and (N, B, H) of any float dtype."""
    return tf.raw_ops.BatchMatMulV3(x=left, y=right, Tout=tf.float32)


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


def lacks_stable_sort():
    """Whether equals are sorted in any order."""
    return False


def sort(integers):
    """A vector of integers in ascending order."""
    # `tf.sort` is made from `top_k`, which XLA compiles to a slower sort of pairs.
    return xla.sort(integers)


def num_replicas():
    """How many replicas of a `tf.distribute` strategy share a step, an integer."""
    replica = tf.distribute.get_replica_context()
    return 1 if replica is None else replica.num_replicas_in_sync


def sum_over_replicas(values):
    """The sum of `values` over the replicas of a `tf.distribute` strategy."""
    return _across_replicas(
        values, lambda replica: replica.all_reduce(tf.distribute.ReduceOp.SUM, values)
    )


def gather_over_replicas(values):
    """The rows of `values` (R, ...) of all replicas, one behind the other."""
    return _across_replicas(values, lambda replica: replica.all_gather(values, axis=0))


def after(tensor, value):
    """A value that is computed only where the tensor is.

    At the end of data of unknown length, TensorFlow without XLA runs what a step computes without a
    batch.
    """
    with tf.control_dependencies([tensor]):
        return tf.identity(value)


def sum_of_counts(values):
    """`values`: what is added to counters is summed when they are read."""
    return values


def separate_losses(layer):
    """Give each replica a list of its own of the losses that `layer` adds.

    Keras keeps one list in each layer and empties it when a model is called. Replicas are traced in
    threads, and where one waits for the others in a collective operation, theirs would replace or
    join its losses.
    """
    layer._losses = _LossesOfThread()


class _LossesOfThread(threading.local):
    """What Keras needs of a list of losses."""

    def __init__(self):
        self._losses = []

    def extend(self, losses):
        self._losses.extend(losses)

    def clear(self):
        self._losses.clear()

    def __getitem__(self, index):
        return self._losses[index]

    def __setitem__(self, index, losses):
        self._losses[index] = losses


def _across_replicas(values, collective):
    if num_replicas() == 1:
        return values
    try:
        with _other_losses_kept():
            return collective(tf.distribute.get_replica_context())
    except RuntimeError as error:
        if "merge_call" not in str(error):
            raise
        raise RuntimeError(
            "Selection biases, `GlobalLoadBalance` and `ReLURouter` sum over all replicas in the "
            "middle of a call. Received: a call inside of a `tf.function` or a loop inside of "
            "`strategy.run`. Put `tf.function` around `strategy.run`, or use `LoadBalance`."
        ) from error


@contextlib.contextmanager
def _other_losses_kept():
    """Keep the losses that other layers of the model have added on this replica so far.

    Other replicas are traced inside of the context, with the same lists.
    """
    model = current_model()
    layers = () if model is None else model._flatten_layers()
    lists = [(layer._losses, layer._losses[:]) for layer in layers]
    yield
    for losses, of_replica in lists:
        losses[:] = of_replica
