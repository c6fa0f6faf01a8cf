"""Engine that loops over tiles of rows, for XLA on CPUs, and for few rows in TensorFlow's graphs.

There is one loop over the experts that have rows, and in it one over the tiles of such a group;
their trips depend on the data. The last tile of a group may overrun it: reads are masked, with
zeros, or ones for saved values; writes are overwritten by the next group or land in padding.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe.backend import backend
from keras_moe.ops import linears
from keras_moe.ops.linears import Int4Kernel, Int8Kernel
from keras_moe.ops.networks import backward_part, dtype_of, forward_part
from keras_moe.ops.plans import row_sums
from keras_moe.ops.sorting import ceil_divide

# Of all experts together: with so few rows integer kernels are converted in blocks. Each tile of an
# expert converts its kernel again: with more rows that would happen too often.
MOST_BLOCK_ROWS = 128

# Entries of a block of a kernel, 256 KB in float32.
BLOCK_ENTRIES = 2**16


def forward(problem, save):
    layout, network = _Layout(problem), problem.network

    def compute(tile, maps, carry):
        rows = tile.gather(problem.tokens)
        outputs, saved = forward_part(network, rows, tile, maps, problem.key)
        return list(map(tile.write, carry, [outputs, *(saved if save else ())]))

    widths = [network.output_width, *(network.saved_widths if save else ())]
    outputs, *saved = layout.for_each_tile(compute, list(map(layout.buffer, widths)))
    return outputs, saved


def backward(problem, row_weights, outputs, saved, gradient):
    layout = _Layout(problem)
    padded_weights = ops.expand_dims(ops.pad(row_weights, (0, layout.length)), 1)

    def compute(tile, maps, carry):
        of_rows, of_weights, of_maps = carry
        output_gradient, output = tile.gather(gradient), tile.read(outputs, past_end=1.0)
        row_gradient, factors = backward_part(
            problem.network,
            tile.gather(problem.tokens),
            tile,
            maps,
            # Not zeros, where an activation may have no derivative: NaN times 0 is NaN.
            [tile.read(buffer, past_end=1.0) for buffer in saved],
            output,
            output_gradient * tile.read(padded_weights),
            problem.key,
        )
        return (
            tile.write(of_rows, row_gradient),
            tile.write(of_weights, row_sums(output_gradient, output)),
            {
                name: {
                    field: tile.add_to_expert(total, _of_tile(field, *factors[name][field]))
                    for field, total in totals.items()
                }
                for name, totals in of_maps.items()
            },
        )

    buffers = (
        layout.buffer(problem.tokens.shape[1]),
        ops.zeros((layout.num_rows, 1), "float32"),
        keras.tree.map_structure(_zeros_for_sum, problem.trained()),
    )
    of_rows, of_weights, totals = layout.for_each_tile(compute, buffers)
    return of_rows, of_weights, keras.tree.map_structure(_like, totals, problem.trained())


def tile_dtype(dtype, platform):
    """The dtype that tiles are computed in.

    For products of narrow floats XLA on CPUs converts each operand to float32, and rounds each
    result. So a whole tile is computed in float32 there, at least.
    """
    return "float32" if dtype in ("bfloat16", "float16") and platform == "cpu" else dtype


class _Layout:
    """Where groups and tiles lie; numbers of groups are computed once for a pass.

    After the rows of all groups comes padding for a tile that overruns the last one.
    """

    def __init__(self, problem):
        self.dtype = tile_dtype(dtype_of(problem.tokens), problem.platform)
        self.maps, self.sizes = problem.maps, problem.plan.sizes
        num_rows = problem.plan.num_rows()
        self.length = tile_length(num_rows, problem.plan.num_experts)
        self.in_blocks = isinstance(num_rows, int) and num_rows <= MOST_BLOCK_ROWS
        self.num_rows = num_rows + self.length
        self._token_of_row = ops.pad(problem.plan.token_of_row(), (0, self.length))

    def buffer(self, width):
        """Zeros for all rows."""
        return ops.zeros((self.num_rows, width), self.dtype)

    def for_each_tile(self, compute, carry):
        """`carry = compute(tile, maps, carry)` for the tiles of every expert with rows."""
        # Reading the kernels of an expert costs as much as a few rows. For a few tokens, as in
        # decoding, most experts have none.
        has_rows = self.sizes > 0
        busy_first = ops.cast(ops.argsort(ops.logical_not(has_rows)), "int32")
        ends = ops.cumsum(self.sizes)
        num_tiles = ceil_divide(self.sizes, self.length)

        def group(number, carry):
            expert = backend.gather_rows(busy_first, number)
            end = backend.gather_rows(ends, expert)
            first = end - backend.gather_rows(self.sizes, expert)
            maps = {name: self._of_expert(each, expert) for name, each in self.maps.items()}

            def nth_tile(i, carry):
                start = first + i * self.length
                rows = start + ops.arange(self.length, dtype="int32")
                tokens = backend.slice_at(self._token_of_row, (start,), (self.length,))
                inside = ops.expand_dims(rows < end, 1)
                return compute(_Tile(expert, start, inside, tokens, self.dtype), maps, carry)

            return ops.fori_loop(0, backend.gather_rows(num_tiles, expert), nth_tile, carry)

        return ops.fori_loop(0, ops.sum(ops.cast(has_rows, "int32")), group, carry)

    def _of_expert(self, linear, expert):
        """The linear map of one expert. Cast per expert on use: idle ones are never cast."""

        def stored(weight):
            if isinstance(weight, Int8Kernel) and self.in_blocks:
                return _Blocks(weight, expert)
            entry = linears.part_of(weight, lambda stack: _at(stack, expert))
            is_packed = isinstance(entry, Int4Kernel)  # is multiplied faster as it is
            return entry if is_packed else linears.as_floats(entry, self.dtype)

        return linears.Linear(*(None if each is None else stored(each) for each in linear))


class _Tile(NamedTuple):
    """Some rows of one expert. Everything that is read has the `dtype` that is computed in."""

    expert: Any
    start: Any
    inside: Any
    token_of_row: Any
    dtype: str

    def product(self, rows, kernel, bias=None, transposed=False):
        if isinstance(kernel, _Blocks):
            products = kernel.multiply(rows, transposed)
        else:
            products = linears.multiply(rows, kernel, transposed)
        return products if bias is None else products + bias

    def row_numbers(self):
        return self.start + ops.arange(self.inside.shape[0], dtype="int32")

    def gather(self, tokens):
        """The tokens of the rows, zeros past the end of the group."""
        return self._mask(backend.gather_rows(tokens, self.token_of_row), 0.0)

    def read(self, buffer, past_end=0.0):
        """The rows of a buffer, `past_end` past the end of the group."""
        rows = backend.slice_at(buffer, (self.start, 0), (self.inside.shape[0], buffer.shape[1]))
        return self._mask(rows, past_end)

    def write(self, buffer, rows):
        return backend.update_at(buffer, (self.start, 0), rows)

    def add_to_expert(self, stacked, part):
        """Add to the expert's entry of a tensor (E, ...), in place under XLA."""
        total = _at(stacked, self.expert) + ops.cast(part, stacked.dtype)
        return backend.update_at(stacked, _start(stacked, self.expert), ops.expand_dims(total, 0))

    def _mask(self, rows, past_end):
        return ops.where(
            self.inside, ops.cast(rows, self.dtype), ops.full((), past_end, self.dtype)
        )


class _Blocks(NamedTuple):
    """The int8 kernel of one expert, for few rows.

    XLA converts a whole kernel to floats before it multiplies. For few rows that takes longer than
    the product. Converted in blocks of some rows of the kernel, one after another, the floats stay
    in the cache.
    """

    kernels: Int8Kernel
    expert: Any

    def multiply(self, rows, transposed):
        """`rows` (n, D), n static, times the kernel, or times its transpose."""
        values, scale = self.kernels
        scale = ops.cast(_at(scale, self.expert), rows.dtype)
        if transposed:
            kernel = ops.cast(_at(values, self.expert), rows.dtype)
            return ops.matmul(rows * scale, ops.transpose(kernel))
        (num_rows, depth), width = rows.shape, values.shape[2]
        # The sum of the products is read and written for each block, so a block is not shorter.
        length = min(max(BLOCK_ENTRIES // width, num_rows), depth)
        num_blocks, rest = divmod(depth, length)

        def add_product(start, length, total):
            columns = backend.slice_at(rows, (0, start), (num_rows, length))
            block = backend.slice_at(values, (self.expert, start, 0), (1, length, width))
            return total + ops.matmul(columns, ops.cast(ops.squeeze(block, 0), rows.dtype))

        def nth_block(number, total):
            return add_product(number * length, length, total)

        total = ops.zeros((num_rows, width), rows.dtype)
        if backend.compiles_static_shapes():
            total = ops.fori_loop(0, num_blocks, nth_block, total)
        else:  # a trip of TensorFlow's loops costs more than a block
            for number in range(num_blocks):
                total = nth_block(number, total)
        return (add_product(num_blocks * length, rest, total) if rest else total) * scale


def _of_tile(field, left, right):
    """The part of a gradient that a tile adds."""
    if field == "bias":
        return ops.sum(ops.cast(right, "float32"), axis=0)
    # On CPUs XLA computes A^T B at half the speed where A is wider than B. Such gradients are
    # summed transposed. Exchanging the axes of the sums costs less than those of each part.
    narrow, wide = sorted((left, right), key=lambda rows: rows.shape[1])
    return ops.matmul(ops.transpose(narrow), wide)


def _zeros_for_sum(parameter):
    experts, *shape = parameter.shape
    return ops.zeros((experts, *sorted(shape)), "float32")


def _like(total, parameter):
    """The sum of a parameter's gradients, with its axes and dtype."""
    upright = total if total.shape == parameter.shape else ops.transpose(total, (0, 2, 1))
    return ops.cast(upright, parameter.dtype)


def tile_length(num_rows, num_experts):
    """Rows of a tile, a power of two from 4 to 128.

    Besides its rows a tile costs about as much as 8 more, as its kernels are read, and the sums of
    their gradients read and written. The last tile of a group is half padding. In tiles of L rows
    a mean group costs `(mean / L + 1 / 2) * (L + 8)`, the least at `4 * sqrt(mean)`. On a CPU no
    power of two made a training step more than 5% faster (groups of 16 to 2,048 rows, kernels of
    256 x 1024 and 512 x 2048). Tiles have one length only, because each length is compiled, forward
    and backward.

    From 128 rows on no tile holds more than an eighth of them: in the backward pass some
    seven intermediate values of a tile exist at once, which would be most of the memory where
    experts are few. The number of rows is a tensor where it is not known at compile time.
    """
    mean = num_rows // max(num_experts, 8) if isinstance(num_rows, int) else 256
    # The power of two that is nearest in ratio.
    return 2 ** min(max(round((2 * 16 * mean) ** 0.5).bit_length() - 1, 2), 7)


def _at(stacked, expert):
    """Entry `expert` of a tensor (E, ...)."""
    part = backend.slice_at(stacked, _start(stacked, expert), (1, *stacked.shape[1:]))
    return ops.squeeze(part, 0)


def _start(stacked, expert):
    return (expert, *[0] * (len(stacked.shape) - 1))
