"""The interface to a framework."""

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe._internal.checks import check_choice
from keras_moe.backend import padded, tiles
from keras_moe.backend.layouts import AllRows

# Below all other scores, and above minus infinity.
LOW = float(np.finfo("float32").min)

# Not a context variable, which `torch.compile` and `torch.export` cannot read.
_of_thread = threading.local()


@contextlib.contextmanager
def platform(name: str) -> Iterator[None]:
    """Trace for a platform that this process does not run on.

    TensorFlow and JAX trace for the devices of the process, so a program that is exported on a CPU
    for a GPU or TPU is exported inside this context; PyTorch does not need it. A function that was
    traced before is not traced again. What is traced for a TPU is compiled for a TPU, or for a CPU,
    where it is slow; what is traced for a CPU or GPU may be compiled for any platform.

    Args:
        name: String. `"cpu"`, `"gpu"` or `"tpu"`.

    Raises:
        ValueError: If `name` is none of these.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts)
    >>> with keras_moe.ops.platform("cpu"):
    ...     outputs = layer(keras.random.normal((8, 16)))
    >>> outputs.shape
    (8, 16)
    """
    check_choice("name", name, ("cpu", "gpu", "tpu"))
    outer, _of_thread.name = named_platform(), name
    try:
        yield
    finally:
        _of_thread.name = outer


def named_platform():
    """The platform that an enclosing `platform` names, or None."""
    return getattr(_of_thread, "name", None)


@contextlib.contextmanager
def any_derivative() -> Iterator[None]:
    """Compute in operations that have derivatives of any order, forward mode and `vmap`.

    Outside of this context a bank of experts has its own backward pass, which is faster and takes
    less memory. Second derivatives, as of gradient penalties and Hessians, and forward mode raise
    an error there, and so do `torch.func` and `torch.vmap`: JAX names a `custom_vjp` in some of
    them, PyTorch `setup_context`, a storage or forward AD. Call the layer inside; its derivatives
    may be taken outside. A function that was traced before is not traced again.

    Example:

    >>> layer = keras_moe.layers.MixtureOfExperts(num_experts=4, hidden_dim=32)
    >>> with keras_moe.ops.any_derivative():
    ...     outputs = layer(keras.random.normal((8, 16)))
    >>> outputs.shape
    (8, 16)
    """
    outer, _of_thread.any_derivative = is_any_derivative(), True
    try:
        yield
    finally:
        _of_thread.any_derivative = outer


def is_any_derivative():
    """Return True inside of `any_derivative`."""
    return getattr(_of_thread, "any_derivative", False)


def refuse_second_derivative(*_, **__):
    raise NotImplementedError(
        "A layer of experts whose derivative is differentiated again must be called inside of "
        "`keras_moe.ops.any_derivative()`. Received: a second derivative of a call outside of it"
    )


class Backend:
    """Operations that need a framework's own calls. Everything else is written in `keras.ops`."""

    devices: "Devices"  # that a model runs on
    activations: dict = {}  # {activation of Keras: a faster one}

    # What is computed, or traced to be compiled

    def needs_static_shapes(self):
        """Return True if the code being traced needs static shapes."""
        raise NotImplementedError

    def is_exporting(self):
        """Return True while tracing a program that has no gradients and changes no state."""
        return False

    def platform_of(self, tensor):
        """Return "cpu", "gpu" or "tpu": what `platform` names, or that of the tensor or process."""
        raise NotImplementedError

    def scope_of_call(self, layer, tensor):
        """Return a context for a call of a layer that computes in the dtype of its tensor.

        It raises if the layer is called again in a backward pass: its effects would be repeated.
        """
        return contextlib.nullcontext()

    # Programs

    def run(self, network, problem, platform=None):
        """Return the weighted sums (T, D') of an `ops.networks.Network`, computed on this device.

        It is compiled for a platform; None: that of the tokens.
        """
        platform = platform or self.platform_of(problem.tokens)
        layout_class = self.layout(problem, platform)
        layout = functools.partial(layout_class, self, platform)
        forward = functools.partial(network.forward, layout)
        if layout_class.is_differentiable:
            return forward(problem[:3], problem[3:])[0]
        backward = functools.partial(network.backward, layout)
        return self.differentiable(forward, backward, problem[:3], problem[3:])

    def jit_when_eager(self, function):
        """On JAX, compile an eager call as one program instead of one for each operation.

        The function must depend on its arguments only: tensors, and values that rarely change.
        """
        return function

    def uncompiled(self, function):
        """Return the function, which `torch.compile` calls as it is."""
        return function

    def control_dependency(self, tensor, value):
        """Return `value`, made to wait for `tensor`."""
        return value

    # Gradients

    def differentiable(self, forward, backward, inputs, context):
        """Return the output of `forward`; `backward` computes the gradients of `inputs`.

        `inputs` and `context` are structures of tensors, and the context gets no gradient. A second
        derivative raises an error. Inside of `any_derivative` the framework differentiates
        `forward`.

        Args:
            forward: `forward(inputs, context, save)` returns `(output, saved)`. If `save` is
                False, no backward pass follows, and `saved` is `()`.
            backward: `backward(inputs, context, saved, gradient)` returns the gradients.
        """
        raise NotImplementedError

    def attach_gradient(self, value, inputs, transpose):
        """Return `value`, with the gradient `g` for itself and `transpose(g)` for `inputs`."""

        @ops.custom_gradient
        def function(value, inputs):
            def gradients(*given, upstream=None):  # PyTorch is given the inputs, too
                upstream = given[0] if upstream is None else upstream
                return upstream, transpose(upstream)

            return value, gradients

        return function(value, inputs)

    def vjp(self, function, inputs):
        """Call `function(*inputs)`, which returns (output, others).

        Return others, and the pullback: a function from a gradient of the output to gradients of
        the inputs.
        """
        raise NotImplementedError

    # Grouped products: two bilinear functions, each the transpose of the other

    def product(self, rows, kernels, sizes, transposed=False, platform=None):
        """Multiply each group of rows (R, D) by its kernel (E, D, H), or its transpose: (R, H).

        Rows past the last group may be anything. `kernels` are of `ops.linears`, `sizes` (E,)
        int32; `platform` is the one that is compiled for.
        """
        return padded.product(rows, kernels, sizes, transposed, platform)

    def outer(self, left, right, sizes, dtype, platform=None):
        """Return `left^T right` of each group, (E, D, H), for (R, D) and (R, H); 0 without rows."""
        return padded.outer(left, right, sizes, dtype, platform)

    def matmul(self, left, right, transposed=False):
        """Return the product of two matrices, or of the first and the transposed second.

        The second is converted to the dtype of the first.
        """
        right = ops.cast(right, left.dtype)
        return ops.matmul(left, ops.transpose(right) if transposed else right)

    def layout(self, problem, platform):
        """Return the class of the layout of an `ops.networks.Problem`, see `layouts`.

        Inside of `any_derivative` it is `AllRows`, whose operations have all derivatives.
        """
        return AllRows

    # Rows, choices and counts

    def gather_rows(self, tensor, indices):
        """Return rows of a tensor (R, ...) at indices of any shape, all of which are valid."""
        raise NotImplementedError

    def sum_chosen_rows(self, rows, places, weights=None):
        """Return float32 sums (T, D) of the rows at places (T, K), weighted by (T, K) or by 1.

        A place of -1 has no row. All other places are distinct.
        """
        # A gather, not a scatter: tokens are written once, in order, and need no atomic adds.
        total, existing = 0.0, ops.maximum(places, 0)
        for choice in range(places.shape[1]):
            own = slice(choice, choice + 1)
            picked = ops.cast(self.gather_rows(rows, existing[:, choice]), "float32")
            picked = picked if weights is None else picked * weights[:, own]
            # `where`, not a product: a row that was never computed may hold anything, even NaN.
            total = total + ops.where(places[:, own] >= 0, picked, 0.0)
        return total

    def softmax(self, logits, axis=-1):
        """Return the softmax along an axis, where one NaN makes all scores NaN."""
        # TensorFlow's own softmax on CPUs gives the other experts a score of 0 there, which would
        # hide a broken router; and `ops.softmax` warns of a single expert.
        return ops.exp(ops.log_softmax(logits, axis=axis))

    def top_k(self, scores, number):
        """Return the best columns (T, K), int32, of scores (T, E): NaN first, of ties the first."""
        raise NotImplementedError

    def masked_fill(self, values, mask, number):
        """Return the values, with a number in place of those where a mask is True."""
        return ops.where(mask, number, values)

    # Without padding fewer operations are needed: XLA finds out itself, and PyTorch is told.

    def mark_complete(self, tensor, bound=0):
        """Note that a mask has no False, or that integers are from 0 to `bound` - 1; return it."""
        return tensor

    def is_complete(self, tensor, bound=math.inf):
        """Return True if this was noted, for this bound or a lower one."""
        return False

    def is_written(self, tensor):
        """Return True if something was written into a tensor, where frameworks have that."""
        return False

    def fill_unserved(self, values, indices, number):
        """Return the values, with a number in place of those whose index is negative."""
        if self.is_complete(indices):
            return values
        return self.masked_fill(values, indices < 0, number)

    # XLA on accelerators fuses one-hot rows with the product, and the gradient is a product, too;
    # that of a gather is a scatter. On CPUs one-hot rows would be stored, so entries are gathered.

    def take_columns(self, matrix, columns):
        """Return entries (T, K) of a matrix (T, E) at columns (T, K); 0 for invalid columns."""

        columns = ops.cast(columns, "int32")
        if self.platform_of(matrix) == "cpu":
            existing = ops.clip(columns, 0, matrix.shape[1] - 1)
            taken = ops.take_along_axis(matrix, existing, axis=1)
            return ops.where(existing == columns, taken, 0.0)
        chosen = _one_hot(columns, matrix.shape[1])
        return ops.sum(ops.where(chosen, ops.expand_dims(matrix, 1), 0.0), axis=-1)

    def count_integers(self, integers, number):
        """Count each of 0, ..., `number` - 1 in integers of any shape: (number,) int32."""

        integers = ops.cast(ops.reshape(integers, (-1,)), "int32")
        if self.platform_of(integers) == "cpu":  # one more count, of all others
            place = ops.where((integers >= 0) & (integers < number), integers, number)
            return ops.segment_sum(ops.ones_like(place), place, number + 1)[:number]
        return ops.sum(ops.cast(_one_hot(integers, number), "int32"), axis=0)

    def order_and_rank(self, integers, bound):
        """Return a stable order of integers (N,) from 0 to `bound` - 1, and each one's place in it.

        Both are int32.
        """
        raise NotImplementedError

    def larger_size(self, least, size):
        """Return the larger of two sizes, which may be unknown while tracing."""
        return ops.maximum(least, size)

    def split_groups(self, rows, sizes):
        """Return the rows of each group, then the rest, as a list; and the list of their sizes."""
        raise NotImplementedError


class Devices:
    """Devices that share the work; here a single one.

    Replicas run the same code on parts of a batch. Experts may be split over processes, on PyTorch,
    or over a mesh of `keras.distribution`, on JAX.
    """

    def num_replicas(self):
        return 1

    def sum(self, values):
        """Sum a tensor over all replicas."""
        return values

    def gather(self, values):
        """Concatenate the rows (R, ...) of all replicas."""
        return values

    def sum_counts(self, values):
        """Sum increments of counters, a list, unless reading a counter does so."""
        return values

    def separate_losses(self, layer):
        """Give each replica its own list of the losses that a layer adds."""

    def split_experts(self, experts, data):
        """Return the distribution of `keras_moe.distribution.expert_parallel`.

        None: one of Keras, which splits arrays over a mesh of devices.
        """

    def expert_processes(self):
        """Return the current `torch_processes.ExpertParallel`; None if experts are not split."""
        return None

    def token_shards(self):
        """Return the `jax_sharding.Shards` of a batch of tokens; None on one device."""
        return None

    def sharing(self, bank):
        """Return the devices that share the tokens and perhaps the experts of a bank, or None.

        Their `run(run, network, problem)` is `Backend.run` on all of them, by `run` on each.
        """
        return None


def _gelu(x):
    """The exact GELU by `erf`. By `erfc` it is slower on CPUs, and `tf2onnx` cannot write it."""
    values = ops.cast(x, "float32") if x.dtype in ("bfloat16", "float16") else x
    # In just these operations LiteRT finds its own GELU.
    return ops.cast(0.5 * values * (1.0 + ops.erf(values * 0.5**0.5)), x.dtype)


class StaticBackend(Backend):
    """A backend that compiles loops over static shapes."""

    activations = {keras.activations.gelu: _gelu}

    sort: Any  # of integers, compiled by XLA
    longest_gated_tile = 256  # rows, of experts with more than two linear maps

    def top_k(self, scores, number):
        # K rounds of argmax agree on ties and NaN on every backend, where top_k does not, as fast.
        # Minus infinity ranks above the columns that are taken already.
        rest = ops.where(ops.isnan(scores), float("inf"), ops.maximum(scores, LOW))
        columns = ops.arange(scores.shape[1], dtype="int32")
        chosen = [self._argmax(rest)]
        for _ in range(number - 1):
            rest = ops.where(ops.expand_dims(chosen[-1], 1) == columns, float("-inf"), rest)
            chosen.append(self._argmax(rest))
        return ops.stack(chosen, axis=1)

    def _argmax(self, scores):
        # Under XLA two plain reductions are several times as fast as one of pairs.
        best = ops.max(scores, axis=-1, keepdims=True)
        number = scores.shape[-1]
        return ops.min(ops.where(scores >= best, ops.arange(number, dtype="int32"), number), -1)

    def order_and_rank(self, integers, bound):
        number = ops.shape(integers)[0]
        # The number may be a symbol, as in an exported program.
        if self.needs_static_shapes() and isinstance(number, int) and bound * number < 2**31:
            # XLA sorts plain integers several times as fast as pairs.
            order = packed_order(self.sort, integers, bound)
        else:
            order = ops.cast(ops.argsort(integers), "int32")
        numbers = ops.arange(number, dtype="int32")
        rank = ops.scatter_update(ops.zeros_like(order), ops.expand_dims(order, 1), numbers)
        return order, rank

    def layout(self, problem, platform):
        # On a GPU a loop over few rows takes longer than copies of the kernels of their experts.
        has_tiles = platform == "gpu" and tiles.num_wide_rows(problem, platform)
        if (platform == "cpu" or has_tiles) and not is_any_derivative():
            return tiles.ChunksAndTiles
        return AllRows

    def slice_at(self, tensor, start, shape):
        """Return the slice of a tensor at indices `start`, of a static shape."""
        return ops.slice(tensor, start, shape)

    def add_at(self, tensor, indices, rows):
        """Return the tensor (R, ...) with rows (n, ...) added at indices (n,)."""
        raise NotImplementedError

    def product_over_rows(self, left, right):
        """Return `left^T right` (..., D, H), for (..., n, D) and (..., n, H)."""
        return ops.matmul(ops.swapaxes(left, -1, -2), right)

    def scan(self, step, carry, xs):
        """Return carry and stacked y of `carry, y = step(carry, x)` over the first axis of `xs`.

        Every `y` has the dtype of the last of `xs`. The loop has a gradient.
        """
        raise NotImplementedError


def split_rows(rows, sizes):
    """Split rows (R, ...) into consecutive parts of the given sizes."""
    # ONNX and LiteRT split by constants only.
    bounds = [0, *itertools.accumulate(sizes)]
    return [rows[start:end] for start, end in itertools.pairwise(bounds)]


def other_key(key, number):
    """Another key of dropout, or None, for rows whose numbers start at 0 again."""
    return None if key is None else key + ops.stack([0, number])


def packed_order(sort, integers, bound):
    """Return a stable order, by a sort of distinct integers."""
    number = ops.shape(integers)[0]
    return sort(integers * number + ops.arange(number, dtype="int32")) % number


def _one_hot(integers, number):
    return ops.expand_dims(integers, -1) == ops.arange(number, dtype="int32")
