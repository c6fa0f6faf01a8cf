"""TensorFlow primitives."""

import operator

import tensorflow as tf

# No public name leads to these operations; Keras imports them from here as well.
from tensorflow.compiler.tf2xla.python import xla

from keras_moe.backend import tensorflow_replicas
from keras_moe.backend.base import (
    StaticBackend,
    is_any_derivative,
    named_platform,
    refuse_second_derivative,
    split_rows,
)
from keras_moe.backend.layouts import AllRows
from keras_moe.backend.tiles import ChunksAndTiles

# Where kernels are converted, a loop skips those of experts without rows. With more rows for an
# expert, on average, it is faster to compute experts side by side.
MAX_CONVERTED_ROWS = 16


class TensorFlowBackend(StaticBackend):
    devices = tensorflow_replicas.TensorFlowDevices()
    # `tf.sort` is made from `top_k`, which XLA compiles to a slower sort of pairs.
    sort = staticmethod(xla.sort)
    # With 256 rows a step takes 30% longer for some T, D and H.
    longest_gated_tile = 128

    def needs_static_shapes(self):
        # No public name tells whether XLA compiles what is traced.
        return tf.__internal__.get_enclosing_xla_context() is not None

    def platform_of(self, tensor):
        # TensorFlow does not tell for which device a function is traced.
        types = {device.device_type for device in tf.config.list_logical_devices()}
        found = next((name for name in ("tpu", "gpu") if name.upper() in types), "cpu")
        return named_platform() or found

    def control_dependency(self, tensor, value):
        # At the end of data of unknown length, TensorFlow without XLA runs what a step computes
        # without a batch.
        with tf.control_dependencies([tensor]):
            return tf.identity(value)

    def differentiable(self, forward, backward, inputs, context):
        if is_any_derivative():
            return forward(inputs, context, save=False)[0]
        # Values, as `custom_gradient` refuses variables that `forward` reads besides its inputs,
        # and tapes watch even those that are frozen.
        context = tf.nest.map_structure(
            lambda each: None if each is None else tf.stop_gradient(each), context
        )

        @tf.custom_gradient
        def function(*tensors):
            # Hidden from outer tapes, which would record the loops, which have no gradient.
            hidden = tf.nest.pack_sequence_as(inputs, [*map(tf.stop_gradient, tensors)])
            # TensorFlow does not tell whether there will be a gradient.
            output, saved = forward(hidden, context, save=True)

            @tf.custom_gradient
            def gradient(upstream, *tensors):
                gradients = backward(hidden, context, saved, tf.stop_gradient(upstream))
                return tf.nest.flatten(gradients), refuse_second_derivative

            # The gradient of a gather of rows is sparse.
            return output, lambda upstream: gradient(tf.convert_to_tensor(upstream), *tensors)

        return function(*map(tf.convert_to_tensor, tf.nest.flatten(inputs)))

    def vjp(self, function, inputs):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(inputs)
            output, others = function(*inputs)
            recorded = tf.identity(inputs[0])

        def pullback(cotangent):
            gradients = tape.gradient(output, inputs, output_gradients=cotangent)
            has_none = all(gradient is None for gradient in gradients)
            if has_none and tape.gradient(recorded, inputs[0]) is None:
                raise NotImplementedError(
                    "Networks of experts must have a gradient that a `tf.GradientTape` records. "
                    "Received: none. Under `tf.autodiff.ForwardAccumulator`, where tapes record "
                    "nothing, call the layer inside of `keras_moe.ops.any_derivative()`."
                )
            return [
                tf.zeros_like(each) if gradient is None else gradient
                for each, gradient in zip(inputs, gradients)
            ]

        return others, pullback

    def matmul(self, left, right, transposed=False):
        # Without a transposed copy.
        products = tf.matmul(left, tf.cast(right, left.dtype), transpose_b=transposed)
        # Vectorized, as in `GradientTape.jacobian`, a product of no rows has no columns either.
        return tf.reshape(products, (-1, products.shape[1]))

    def layout(self, problem, platform):
        if self.needs_static_shapes():
            return super().layout(problem, platform)
        plan, num_rows = problem.plan, problem.plan.num_rows()
        most = plan.num_experts * MAX_CONVERTED_ROWS
        has_few_rows = isinstance(num_rows, int) and num_rows <= most
        dtypes = {tf.as_dtype(each.kernel.values.dtype) for each in problem.maps.values()}
        is_converted = dtypes != {problem.tokens.dtype}
        is_traced = tf.is_symbolic_tensor(plan.sizes) and not is_any_derivative()
        if platform == "cpu" and is_traced and has_few_rows and is_converted:
            return ChunksAndTiles  # as in decoding
        return AllRows

    def product(self, rows, kernels, sizes, transposed=False, platform=None):
        if self.needs_static_shapes() or is_any_derivative():
            return super().product(rows, kernels, sizes, transposed, platform)
        # One operation for all experts, which copies nothing. A slice for each takes five to trace.
        lists = kernels.apply(tf.unstack)
        of_experts = (lists.apply(operator.itemgetter(e)) for e in range(kernels.shape[0]))
        (*groups, others), _ = self.split_groups(rows, sizes)
        pairs = zip(groups, of_experts)
        products = [_multiply(*each, transposed) for each in pairs if each[0].shape[0] != 0]
        padding = tf.zeros((tf.shape(others)[0], kernels.shape[1 if transposed else 2]), rows.dtype)
        return tf.concat([*products, padding], 0)

    def outer(self, left, right, sizes, dtype, platform=None):
        if self.needs_static_shapes() or is_any_derivative():
            return super().outer(left, right, sizes, dtype, platform)
        groups = zip(*(self.split_groups(rows, sizes)[0][:-1] for rows in (left, right)))
        return tf.cast(tf.stack([tf.matmul(*each, transpose_a=True) for each in groups]), dtype)

    def split_groups(self, rows, sizes):
        is_known = not tf.is_symbolic_tensor(sizes)
        numbers = sizes.numpy().tolist() if is_known else tf.unstack(sizes)
        numbers = [*numbers, tf.shape(rows)[0] - tf.reduce_sum(sizes)]
        return split_rows(rows, numbers), numbers

    def gather_rows(self, tensor, indices):
        if tensor.shape[0] == 0:  # XLA would lose the axis of indices
            return tf.zeros((*indices.shape, *tensor.shape[1:]), tensor.dtype)
        return tf.gather(tensor, indices)

    def slice_at(self, tensor, start, shape):
        # `tf.slice` wants a start that is known at compile time: where it depends on data,
        # TensorFlow would silently turn the data into a constant and compile again for every batch.
        read = xla.dynamic_slice if self.needs_static_shapes() else tf.slice
        return tf.ensure_shape(read(tensor, tf.stack(start), tf.constant(shape)), shape)

    def add_at(self, tensor, indices, rows):
        if tensor.shape[0] == 0:  # as above, which TensorFlow refuses
            return tensor
        return tf.tensor_scatter_nd_add(tensor, tf.expand_dims(indices, 1), rows)

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


def _multiply(rows, kernel, transposed):
    is_known = rows.shape[0] is not None
    if is_known or transposed or kernel.bits == 4 or kernel.values.dtype == rows.dtype:
        return kernel.multiply(rows, transposed=transposed)
    # Converting a kernel takes too long for an expert without rows: there only its first row is
    # converted. LiteRT fails to multiply no rows by it, so there is one of zeros.
    size = tf.shape(rows)[0]
    number = tf.where(size > 0, rows.shape[1], 1)
    some = tf.pad(rows[:, :number], ((0, tf.maximum(1 - size, 0)), (0, 0)))
    return kernel._replace(values=kernel.values[:number]).multiply(some)[:size]
