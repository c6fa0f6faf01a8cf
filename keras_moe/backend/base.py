"""The interface to a framework."""

import contextlib
import itertools

from keras import ops

from keras_moe.backend import padded
from keras_moe.backend.devices import Devices


class Backend(Devices):
    """Abstract: the primitives that need a framework's own calls. All else is `keras.ops`."""

    # What is computed, or traced to be compiled

    def compiles_static_shapes(self):
        """Whether the code being traced needs every shape fixed."""
        raise NotImplementedError

    def is_exporting(self):
        """Whether the code is traced into a program that has no gradients and changes no state."""
        return False

    def recomputation(self):
        """None, "possible" if a backward pass may make this call again, or "running" if it does."""
        return None

    def current_platform(self):
        """The platform that this process computes on: "cpu", "gpu" or "tpu"."""
        raise NotImplementedError

    def on_its_platform(self, function, *operands):
        """`function(platform, *operands)`, perhaps traced for all platforms, compiled for one."""
        return function(self.current_platform(), *operands)

    def without_autocast(self, tensor):
        """A context in which no operation on a tensor computes in a smaller dtype than its own."""
        return contextlib.nullcontext()

    # Programs

    def compile_once(self, function):
        """The function, compiled for each first argument, which is hashable, and for all shapes."""
        return function

    def jit_when_eager(self, function):
        """The function, compiled as a whole where it would be compiled operation by operation.

        It must depend on its arguments only, not on a scope or `floatx`: tensors, and bools,
        numbers or strings that do not change from step to step.
        """
        return function

    def control_dependency(self, tensor, value):
        """A value that is computed only where the tensor is."""
        return value

    # Gradients

    def differentiable(self, forward, backward, inputs, context, reference=None):
        """The output of `forward`, whose gradient for `inputs` is computed by `backward`.

        Second derivatives and forward mode come from `reference`, which is slower; so does the
        output in `torch.func` and in `tf.vectorized_map`.

        Args:
            forward: `forward(inputs, context, save)` returns `(output, saved)`. Unless `save`,
                there is no backward pass.
            backward: `backward(inputs, context, saved, gradient)` returns the gradients.
            inputs: structure of tensors.
            context: structure of tensors that have no gradient, and of None.
            reference: `reference(inputs, context)` computes the output in operations that have
                derivatives of any order. None: `forward` does.
        """
        raise NotImplementedError

    def attach_gradient(self, value, inputs, transpose):
        """The value, as a function of `inputs`: their gradient is `transpose` of the value's."""
        raise NotImplementedError

    def vjp(self, function, inputs):
        """For `function(*inputs) -> output, others`: the others, and the pullback of the output."""
        raise NotImplementedError

    # Grouped products: two bilinear functions, each the transpose of the other

    def product(self, rows, kernels, sizes, transposed=False, platform=None):
        """Each group of rows (R, D) by its kernel (E, D, H), or by its transpose: (R, H).

        It has derivatives of any order. Rows past the last group may be anything. `kernels` are of
        `ops.linears`, `sizes` (E,) int32; `platform` is the one that is compiled for.
        """
        # In operations that a framework differentiates any number of times.
        if self.compiles_static_shapes() or kernels.scale is not None:
            return padded.product(rows, kernels, sizes, transposed)
        *parts, rest = self.split_groups(rows, sizes)[0]
        kernels = kernels.floats(rows.dtype)
        kernels = ops.unstack(ops.transpose(kernels, (0, 2, 1)) if transposed else kernels)
        products = [ops.matmul(*each) for each in zip(parts, kernels)]
        padding = (ops.shape(rest)[0], products[0].shape[1])
        return ops.concatenate([*products, ops.broadcast_to(ops.zeros_like(rest[:, :1]), padding)])

    def outer(self, left, right, sizes, dtype, platform=None):
        """For each group `left^T right`, (E, D, H), of (R, D) and (R, H); zero without rows."""
        return padded.outer(left, right, sizes)

    @staticmethod
    def multiply(kernel, rows, bias=None, transposed=False, output=None):
        """The method `multiply` of `ops.linears.Kernel`."""
        values = ops.cast(kernel.values, rows.dtype)
        scale = None if kernel.scale is None else ops.cast(kernel.scale, rows.dtype)
        if transposed:
            rows = rows if scale is None else rows * scale
            return ops.matmul(rows, ops.transpose(values))
        product = ops.matmul(rows, values)
        product = product if scale is None else product * scale
        return product if bias is None else product + bias

    def layout(self, problem, platform):
        """How the rows of an `ops.networks.Problem` are computed, see `layouts`."""
        raise NotImplementedError

    # Rows, choices and counts

    def gather_rows(self, tensor, indices):
        """Rows of a tensor (R, ...) at integer indices of any shape, all of which exist."""
        raise NotImplementedError

    def argmax(self, scores):
        """Index of the largest entry of the last axis, int32; the first of equals."""
        # Under XLA two plain reductions are several times as fast as one of pairs.
        best = ops.max(scores, axis=-1, keepdims=True)
        number = scores.shape[-1]
        return ops.min(ops.where(scores >= best, ops.arange(number, dtype="int32"), number), -1)

    # One-hot rows are never stored by a compiler, and the gradient of a choice by one is a product,
    # where a gather's is a scatter.

    def take_columns(self, matrix, columns):
        """Entries (T, K) of a matrix (T, E) at integer columns (T, K), 0 at columns outside."""
        chosen = _one_hot(columns, matrix.shape[1])
        return ops.sum(ops.where(chosen, ops.expand_dims(matrix, 1), 0.0), axis=-1)

    def count_integers(self, integers, number):
        """How often each of 0, ..., `number` - 1 is in a vector of integers, (number,) int32."""
        return ops.sum(ops.cast(_one_hot(integers, number), "int32"), axis=0)

    def argsort(self, integers, bound):
        """A stable order of integers (N,) from 0 to `bound` - 1, int32."""
        return ops.cast(ops.argsort(integers), "int32")

    def larger_size(self, least, size):
        """The larger of two sizes that may not be known while tracing."""
        return ops.maximum(least, size)

    def split_groups(self, rows, sizes):
        """The rows of each group, and last those past all groups; a list of their numbers."""
        raise NotImplementedError

    # Loops over static shapes

    def slice_at(self, tensor, start, shape):
        """The part of a tensor that begins at indices `start`, of a static shape."""
        raise NotImplementedError

    def update_at(self, tensor, start, part):
        """The tensor, with a part of it, which begins at indices `start`, replaced."""
        return ops.slice_update(tensor, start, part)

    def scan(self, step, carry, xs):
        """`carry, y = step(carry, x)` along the first axis of `xs`: the last carry and all `y`.

        Every `y` has the dtype of the last of `xs`. The loop has a gradient.
        """
        raise NotImplementedError


def split_rows(rows, sizes):
    """Consecutive parts of rows (R, ...)."""
    # ONNX and LiteRT split by constants only.
    bounds = [0, *itertools.accumulate(sizes)]
    return [rows[start:end] for start, end in itertools.pairwise(bounds)]


def packed_order(sort, integers, bound):
    """A stable order by a sort of plain integers, none of which are equal."""
    number = ops.shape(integers)[0]
    return sort(integers * number + ops.arange(number, dtype="int32")) % number


def _one_hot(integers, number):
    return ops.expand_dims(ops.cast(integers, "int32"), -1) == ops.arange(number, dtype="int32")
