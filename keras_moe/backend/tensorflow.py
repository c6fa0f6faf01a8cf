"""TensorFlow primitives."""

import contextlib
import operator
import threading

import keras
import tensorflow as tf

# No public name leads to these operations; Keras imports them from here as well.
from tensorflow.compiler.tf2xla.python import xla

from keras_moe._internal.keras_internals import current_model
from keras_moe.backend.base import Backend

# So many entries of a kernel are converted at once, to be multiplied in the cache.
CPU_BLOCK = 2**17

# Of large kernels a block is larger, as each takes some operations.
MOST_BLOCKS = 64


class TensorFlowBackend(Backend):
    def compiles_static_shapes(self):
        return tf.__internal__.get_enclosing_xla_context() is not None

    def knows_sizes(self):
        return False

    def current_platform(self):
        types = {device.device_type for device in tf.config.list_logical_devices()}
        return next((name for name in ("tpu", "gpu") if name.upper() in types), "cpu")

    def on_its_platform(self, function, *operands):
        # TensorFlow does not tell for which device a function is traced.
        return function(self.current_platform(), *operands)

    def after(self, tensor, value):
        # At the end of data of unknown length, TensorFlow without XLA runs what a step computes
        # without a batch.
        with tf.control_dependencies([tensor]):
            return tf.identity(value)

    def differentiable(self, forward, backward, inputs, context, plain=None):
        plain = plain or (lambda inputs, context: forward(inputs, context, keep=False)[0])
        # A variable would be taken for one that `forward` uses besides its inputs, and tapes watch
        # those that are frozen, too.
        context = tf.nest.map_structure(tf.stop_gradient, context)
        # `tf.vectorized_map` has no rows of different sizes. No function tells that it traces.
        if "loop_body" in tf.get_current_name_scope().split("/"):
            return plain(inputs, context)

        def gradient_of_plain(upstream, *tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                output = plain(tf.nest.pack_sequence_as(inputs, tensors), context)
            gradients = tape.gradient(output, tensors, upstream, unconnected_gradients="zero")
            return [*map(tf.convert_to_tensor, gradients)]

        @tf.custom_gradient
        def function(*tensors):
            # Other tapes would record the loops, which have no gradient.
            hidden = tf.nest.pack_sequence_as(inputs, [*map(tf.stop_gradient, tensors)])
            # TensorFlow does not tell whether there will be a gradient.
            output, saved = forward(hidden, context, keep=True)

            @tf.custom_gradient
            def gradient(*upstream_and_tensors):
                upstream = tf.stop_gradient(upstream_and_tensors[0])
                gradients = tf.nest.flatten(backward(hidden, context, saved, upstream))

                def second(*cotangents):
                    with tf.GradientTape() as tape:
                        tape.watch(upstream_and_tensors)
                        again = gradient_of_plain(*upstream_and_tensors)
                    return tape.gradient(
                        again, upstream_and_tensors, cotangents, unconnected_gradients="zero"
                    )

                return gradients, second

            # That of a gather of rows is sparse.
            return output, lambda upstream: gradient(tf.convert_to_tensor(upstream), *tensors)

        return function(*map(tf.convert_to_tensor, tf.nest.flatten(inputs)))

    def activation(self, function):
        return _gelu if function is keras.activations.gelu else function

    def vjp(self, function, inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = function(*inputs)

        def pullback(cotangent):
            gradients = tape.gradient(output, inputs, output_gradients=cotangent)
            if any(gradient is None for gradient in gradients):
                raise NotImplementedError(
                    "Activations of experts must have a gradient that a `tf.GradientTape` records. "
                    "Received: none. Under `tf.autodiff.ForwardAccumulator`, where tapes record "
                    "nothing, use two tapes instead."
                )
            return gradients

        return output, pullback

    def gather_rows(self, tensor, indices):
        return tf.gather(tensor, indices)

    def sort(self, integers):
        # `tf.sort` is made from `top_k`, which XLA compiles to a slower sort of pairs.
        return xla.sort(integers)

    def slice_at(self, tensor, start, shape):
        # `tf.slice` wants a start that is known at compile time: where it depends on data,
        # TensorFlow would silently turn the data into a constant and compile again for every batch.
        return xla.dynamic_slice(tensor, tf.stack(start), tf.constant(shape))

    def scan(self, step, carry, xs):
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

    def batched_product(self, left, right):
        return tf.raw_ops.BatchMatMulV3(x=left, y=right, Tout=tf.float32)

    def entry(self, stacked, number):
        # An index that is a tensor would take five operations, and a gather would copy.
        begin = tf.reshape(number, (1,))
        return tf.strided_slice(stacked, begin, begin, (1,), shrink_axis_mask=1)

    def argmax(self, scores):
        # As in the base class; Keras's reductions ask for empty axes, in further operations.
        best = tf.reduce_max(scores, axis=-1, keepdims=True)
        number = scores.shape[-1]
        return tf.reduce_min(tf.where(scores >= best, tf.range(number), number), axis=-1)

    def unstack_sizes(self, sizes, num_rows):
        return [*tf.unstack(sizes), num_rows - tf.reduce_sum(sizes)]

    def join_rows(self, parts):
        return tf.concat(parts, 0)

    def multiply_groups(self, rows, sizes, experts, kernels, bias=None, transposed=False):
        (size,), (expert,), scale = sizes, experts, kernels.scale
        entry = self.entry if tf.is_tensor(expert) else operator.getitem
        if scale is not None and transposed:
            rows *= tf.cast(entry(scale, expert), rows.dtype)
        if transposed or not kernels.converts:
            kernel = tf.cast(kernels.of(expert), rows.dtype)
            product = tf.matmul(rows, kernel, transpose_b=transposed)
        elif kernels.is_packed and tf.is_tensor(expert):
            product = kernels.multiply(rows, expert)
        elif tf.is_tensor(expert):
            product = _product_in_blocks(rows, kernels.of(expert))
        else:
            # An operation on all of a kernel is too long for an expert without rows: there only the
            # first row is converted. LiteRT fails to multiply no rows by it, so there is one of
            # zeros.
            length = tf.where(size > 0, rows.shape[1], 1)
            some = tf.pad(rows[:, :length], ((0, tf.maximum(1 - size, 0)), (0, 0)))
            product = tf.matmul(some, tf.cast(kernels.of(expert, length), rows.dtype))[:size]
        if scale is not None and not transposed:
            product *= tf.cast(entry(scale, expert), rows.dtype)
        if bias is None:
            return product
        return product + tf.cast(entry(bias, expert), rows.dtype)

    def stacked_gradients(self, trained):
        return _StackedGradients(trained)

    def loops_over_groups(self):
        return True

    def loop_over_groups(self, function, sizes, buffers):
        ends = tf.cumsum(sizes)
        starts = ends - sizes
        busy = tf.where(sizes > 0)[:, 0]
        number = tf.shape(busy)[0]

        def body(i, *buffers):
            group = tf.gather(busy, i)
            rows = tf.range(tf.gather(starts, group), tf.gather(ends, group))
            parts, where = function(group, rows), tf.expand_dims(rows, 1)
            return i + 1, *(
                tf.tensor_scatter_nd_update(each, where, part) for each, part in zip(buffers, parts)
            )

        _, *buffers = tf.while_loop(lambda i, *_: i < number, body, (0, *buffers))
        return buffers

    def num_replicas(self):
        replica = tf.distribute.get_replica_context()
        return 1 if replica is None else replica.num_replicas_in_sync

    def sum_over_replicas(self, values):
        return self._across_replicas(
            values, lambda replica: replica.all_reduce(tf.distribute.ReduceOp.SUM, values)
        )

    def gather_over_replicas(self, values):
        return self._across_replicas(values, lambda replica: replica.all_gather(values, axis=0))

    def _across_replicas(self, values, collective):
        if self.num_replicas() == 1:
            return values
        try:
            with _other_losses_kept():
                return collective(tf.distribute.get_replica_context())
        except RuntimeError as error:
            if "merge_call" not in str(error):
                raise
            raise RuntimeError(
                "Selection biases, `GlobalLoadBalance` and `ReLURouter` sum over all replicas in "
                "the middle of a call. Received: a call in a `tf.function` or a loop within "
                "`strategy.run`. Put `tf.function` around `strategy.run`, or use `LoadBalance`."
            ) from error

    def separate_losses(self, layer):
        # Keras keeps one list in each layer and empties it when a model is called. Replicas are
        # traced in threads, and where one waits for the others in a collective operation, theirs
        # would replace or join its losses.
        layer._losses = _LossesOfThread()


def _gelu(x):
    """The exact GELU by `erf`, as on PyTorch. `erfc` is slower, and `tf2onnx` cannot write it."""
    values = tf.cast(x, "float32") if x.dtype.size < 4 else x
    # In just these operations LiteRT finds its own GELU.
    return tf.cast(0.5 * values * (1.0 + tf.math.erf(values * 0.5**0.5)), x.dtype)


def _product_in_blocks(rows, kernel):
    """`rows @ kernel`, where blocks of the kernel are converted in turn, and stay in the cache.

    Not in a loop, as `ops.grouped.tiles` does under XLA: here a trip costs more than a block.
    """
    length, width = kernel.shape
    block = max(CPU_BLOCK // width, length // MOST_BLOCKS, 1)
    if rows.dtype != tf.float32:
        block = length  # sums are rounded after each block, which narrow floats would show
    lengths = [min(block, length - start) for start in range(0, length, block)]
    products: list = []
    for part, of_kernel in zip(tf.split(rows, lengths, 1), tf.split(kernel, lengths)):
        # Blocks that are converted side by side would not stay in the cache.
        with tf.control_dependencies(products[-1:]):
            of_kernel = tf.cast(of_kernel, rows.dtype)
        products.append(tf.matmul(part, of_kernel))
    return tf.add_n(products)


class _StackedGradients:
    """Gradients expert by expert; see `stacked_gradients`."""

    def __init__(self, trained):
        self._trained = trained
        self._parts: list[dict[str, list]] = [{name: [] for name in of} for of in trained]

    def add(self, sizes, experts, factors):
        for (rows, gradient), of, parts in zip(factors, self._trained, self._parts):
            if "kernel" in of:
                product = tf.matmul(rows, gradient, transpose_a=True)
                parts["kernel"].append(tf.cast(product, of["kernel"].dtype))
            if "bias" in of:
                total = tf.reduce_sum(tf.cast(gradient, "float32"), axis=0)
                parts["bias"].append(tf.cast(total, of["bias"].dtype))

    def result(self):
        return [{name: tf.stack(each) for name, each in of.items()} for of in self._parts]


class _LossesOfThread(threading.local):
    """The methods that Keras needs of a list of losses."""

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


@contextlib.contextmanager
def _other_losses_kept():
    """Keep the losses that other layers of the model have added on this replica so far.

    Other replicas are traced inside the context, with the same lists.
    """
    model = current_model()
    layers = () if model is None else model._flatten_layers()
    lists = [(layer._losses, layer._losses[:]) for layer in layers]
    yield
    for losses, of_replica in lists:
        losses[:] = of_replica
