"""The interface to a framework."""

import contextlib
import itertools

from keras import ops


class Backend:
    """Abstract: the primitives that need a framework's own calls. All else is `keras.ops`.

    A primitive without a default is needed by all, or by the engines of `ops.grouped` that run on
    the framework.
    """

    # What is computed, or traced to be compiled

    def compiles_static_shapes(self):
        """Whether the code being traced needs every shape fixed."""
        raise NotImplementedError

    def knows_shapes(self):
        """Whether a size that is an integer is a known one."""
        return True

    def knows_sizes(self):
        """Whether the entries of `unstack_sizes` are known integers."""
        raise NotImplementedError

    def is_exporting(self):
        """Whether the code is traced into a program that has no gradients and changes no state."""
        return False

    def may_recompute(self):
        """Whether what is computed now may be computed again in the backward pass, unannounced."""
        return False

    def is_recomputing(self):
        """Whether the code runs again in a backward pass, unannounced."""
        return False

    def current_platform(self):
        """The platform that this process computes on: "cpu", "gpu" or "tpu"."""
        raise NotImplementedError

    def on_its_platform(self, function, *operands):
        """`function(platform, *operands)` for the platform that is compiled for.

        The first operand is a tensor. It may be traced for all platforms; one is compiled.
        """
        raise NotImplementedError

    def without_autocast(self, tensor):
        """A context in which no operation on a tensor computes in a smaller dtype than its own."""
        return contextlib.nullcontext()

    # Programs

    def compile_once(self, function):
        """The function, compiled for each first argument, which is hashable, and for all shapes."""
        return function

    def trace_once(self, function):
        """The function, whose trace inside a program is reused for arguments of equal shapes."""
        return function

    def as_one_program(self, function):
        """The function, compiled as a whole where it would be compiled operation by operation.

        It must depend on its arguments only, not on a scope or `floatx`: tensors, and bools,
        numbers or strings that do not change from step to step.
        """
        return function

    def after(self, tensor, value):
        """A value that is computed only where the tensor is."""
        return value

    # Gradients

    def differentiable(self, forward, backward, inputs, context, plain=None):
        """The output of `forward`, whose gradient for `inputs` is computed by `backward`.

        Derivatives of the gradient are those of `plain`, which is slower; so are all derivatives
        and the output in `torch.func`, in `tf.vectorized_map`, and in forward mode on PyTorch.

        Args:
            forward: `forward(inputs, context, keep)` returns `(output, saved)`. Unless `keep`,
                there is no backward pass, and nothing need be saved.
            backward: `backward(inputs, context, saved, gradient)` returns gradients in the
                structure of `inputs`.
            inputs: structure of tensors.
            context: structure of tensors that have no gradient.
            plain: `plain(inputs, context)` computes the output of operations that the framework
                differentiates any number of times. None: `forward` does.
        """
        raise NotImplementedError

    def activation(self, function):
        """The activation that experts compute for one of Keras."""
        return function

    def vjp(self, function, inputs):
        """`function(*inputs)` and its pullback, also in loops. It depends on `inputs` only."""
        raise NotImplementedError

    # Rows, choices and counts

    def gather_rows(self, tensor, indices):
        """Rows of a tensor (R, ...) at integer indices of any shape, all of which exist."""
        raise NotImplementedError

    def entry(self, stacked, number):
        """Entry of a tensor (E, ...) by its number, an integer tensor."""
        return stacked[number]

    def argmax(self, scores):
        """Index of the largest entry of the last axis, int32; the first of equals."""
        # Under XLA two plain reductions are several times as fast as one of pairs.
        best = ops.max(scores, axis=-1, keepdims=True)
        number = scores.shape[-1]
        return ops.min(ops.where(scores >= best, ops.arange(number, dtype="int32"), number), -1)

    # One-hot rows are never stored by a compiler, and the gradient of a choice by one is a product,
    # where that of a gather is a scatter.

    def take_columns(self, matrix, columns):
        """Entries (T, K) of a matrix (T, E) at integer columns (T, K), 0 at columns outside."""
        chosen = _one_hot(columns, matrix.shape[1])
        return ops.sum(ops.where(chosen, ops.expand_dims(matrix, 1), 0.0), axis=-1)

    def count_integers(self, integers, number):
        """How often each of 0, ..., `number` - 1 is in a vector of integers, (number,) int32."""
        return ops.sum(ops.cast(_one_hot(integers, number), "int32"), axis=0)

    def sort(self, integers):
        """A vector of integers in ascending order."""
        raise NotImplementedError

    def lacks_stable_sort(self):
        """Whether `ops.argsort` returns equals in any order."""
        return False

    def larger_size(self, least, size):
        """The larger of two sizes that may not be known while tracing."""
        return ops.maximum(least, size)

    # Kernels for all rows at once, for the engine `rows`

    def has_grouped_products(self, platform, dtype, widths):
        """Whether there are such kernels for a platform, a dtype of rows, and widths of rows."""
        return False

    def grouped_products(
        self, platform, rows, kernels, biases, sizes, then, extras=(), transposed=False
    ):
        """`then` of each product of all rows with the kernels of their experts, and of the extras.

        Args:
            platform: "tpu" or "gpu", whose kernels are used.
            rows: (R, D) grouped by expert.
            kernels: list of tensors (E, D, H), or (E, H, D) if `transposed`, of any float dtype.
            biases: as many tensors (E, H), or none.
            sizes: (E,) int32 sizes of the groups.
            then: elementwise function of the products and the extras, which returns a tuple. It is
                computed in float32 inside a kernel that can.
            extras: tensors (R, H).
            transposed: whether to multiply by the transposed kernels.

        Returns:
            Tuple of tensors (R, H). Rows after the last group may be anything.
        """
        raise NotImplementedError

    def grouped_kernel_gradients(self, platform, lefts, right, sizes, kernel, bias, remake=None):
        """The gradient of a kernel (E, D, H), and that of a bias (E, H) or None.

        Args:
            platform: "tpu" or "gpu", whose kernels are used.
            lefts: tuple of tensors (R, D): what was multiplied, or what `remake` computes it from.
            right: (R, H) the gradient of the products.
            sizes: (E,) int32 sizes of the groups.
            kernel: (E, D, H), for its dtype.
            bias: (E, H), for its dtype, or None.
            remake: elementwise function of the `lefts`, or None. It is computed in float32 inside a
                kernel that can.
        """
        raise NotImplementedError

    def remakes_factors(self, platform):
        """Whether `grouped_kernel_gradients` takes a function `remake`."""
        return False

    # Static shapes, for the engines `tiles` and `padded`

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

    def batched_product(self, left, right):
        """(N, D, H) float32, of (N, D, B) and (N, B, H) of any float dtype."""
        raise NotImplementedError

    # Dynamic shapes, for the engines `slices` and `loop`

    def unstack_sizes(self, sizes, num_rows):
        """List of the sizes (E,) of groups, then how many of the rows are after the last group."""
        raise NotImplementedError

    def split_rows(self, rows, sizes):
        """Consecutive parts of rows (R, ...), of a list of sizes from `unstack_sizes` or sums."""
        # ONNX and LiteRT split by constants only.
        bounds = [0, *itertools.accumulate(sizes)]
        return [rows[start:end] for start, end in itertools.pairwise(bounds)]

    def join_rows(self, parts):
        """Inverse of `split_rows`; all parts have one dtype."""
        raise NotImplementedError

    def multiply_groups(self, rows, sizes, experts, kernels, bias=None, transposed=False):
        """Consecutive groups of rows, each through the affine map of its expert.

        Args:
            rows: (R, D), or (R, H) if `transposed`.
            sizes: list of the sizes of the groups; a single one where sizes are not known.
            experts: list of the expert of each group; a tensor in `loop_over_groups`.
            kernels: `Kernels` of all experts.
            bias: (E, H) or None.
            transposed: whether to multiply by the transposed kernel.

        Returns:
            (R, H), or (R, D), in the dtype of the rows.
        """
        raise NotImplementedError

    def stacked_gradients(self, trained):
        """An object that collects gradients of stacked kernels and biases.

        Its `add(sizes, experts, factors)` takes those of some groups; `factors` has for each
        projection the rows that were multiplied, and the gradients of their products. No expert
        comes twice; where sizes are not known each comes once, by itself, in order. Its `result()`
        has the structure of `trained`, with None for what needs no gradient.

        Args:
            trained: list with a dict for each projection, which may have a "kernel" (E, D, H) and a
                "bias" (E, H).
        """
        raise NotImplementedError

    def loops_over_groups(self):
        """Whether there is a `loop_over_groups`."""
        return False

    def loop_over_groups(self, function, sizes, buffers):
        """Fill buffers group by group, in a loop over the groups that have rows.

        Args:
            function: `function(group, rows)` returns the rows of a group for each buffer, where
                `rows` (n,) are their numbers; both are integer tensors.
            sizes: (G,) integers, the sizes of consecutive groups.
            buffers: list of tensors (R, ...).

        Returns:
            List of the filled buffers.
        """
        raise NotImplementedError

    # Data-parallel replicas

    def num_replicas(self):
        """How many data-parallel replicas run this code, an integer."""
        return 1

    def sum_over_replicas(self, values):
        """The sum of what all replicas have."""
        return values

    def gather_over_replicas(self, values):
        """The rows (R, ...) of all replicas, one after the other."""
        return values

    def sum_of_counts(self, values):
        """A list of what is added to counters, summed over replicas unless reading them sums."""
        return values

    def separate_losses(self, layer):
        """Give each replica its own list of the losses that a layer adds."""

    # Processes that share experts

    def expert_processes(self):
        """The `torch_experts.ExpertParallel` that is set; None if each process has all experts."""
        return None

    def split_experts(self, experts, data, process_group):
        """An `ExpertParallel` for `keras.distribution.set_distribution`."""
        raise NotImplementedError

    # Arrays that are spread over a mesh of devices, as by `keras.distribution` on JAX

    def token_shards(self):
        """How the tokens of a batch are spread, a `jax_sharding.Shards`; None on one device."""
        return None

    def mesh_axis(self, variable):
        """The mesh axis that the first axis of a variable is split over, or None."""
        raise NotImplementedError


def _one_hot(integers, number):
    return ops.expand_dims(ops.cast(integers, "int32"), -1) == ops.arange(number, dtype="int32")
