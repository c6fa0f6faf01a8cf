"""Engine that loops over tiles of rows, for XLA on CPUs.

There is one loop over the experts that have rows, and in it one over the tiles of such a group;
their trips depend on the data. The last tile of a group may overrun it: reads are masked, with
zeros, or ones as pre-activations; writes are overwritten by the next group or land in padding.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.assignments import ceil_divide
from keras_moe.ops.grouped.records import Packed, Quantized
from keras_moe.ops.grouped.steps import products_of
from keras_moe.ops.groups import row_sums

# Of all experts together: with so few rows integer kernels are converted in blocks. Each tile of an
# expert converts its kernel again: with more rows that would happen too often.
MOST_BLOCK_ROWS = 128

# Entries of a block of a kernel, 256 KB in float32.
BLOCK_ENTRIES = 2**16


def supports(setting):
    return setting.static_shapes


def tile_dtype(setting):
    """The dtype that tiles are computed in.

    For products of narrow floats XLA on CPUs converts each operand to float32, and rounds each
    result. So a whole tile is computed in float32 there, at least.
    """
    narrow = setting.dtype in ("bfloat16", "float16")
    return "float32" if narrow and setting.platform == "cpu" else setting.dtype


def forward(setting, step, tokens, parameters, groups, keep):
    layout = _Layout(groups, tile_dtype(setting))

    def compute(tile, products, carry):
        outputs, saved = step.forward(tile.gather(tokens), products, keep)
        return list(map(tile.write, carry, [outputs, *saved]))

    widths = [step.output_width, *(step.saved_widths if keep else ())]
    outputs, *saved = layout.for_each_tile(parameters, compute, list(map(layout.buffer, widths)))
    return outputs, saved


def backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient):
    layout = _Layout(groups, tile_dtype(setting))
    padded_weights = ops.expand_dims(ops.pad(row_weights, (0, layout.length)), 1)

    def compute(tile, products, carry):
        of_rows, of_weights, of_trained = carry
        output_gradient = tile.gather(gradient)
        row_gradient, factors = step.backward(
            tile.gather(tokens),
            products,
            # Not zeros, where an activation may have no derivative: NaN times 0 is NaN.
            [tile.read(buffer, past_end=1.0) for buffer in saved],
            output_gradient * tile.read(padded_weights),
        )
        return (
            tile.write(of_rows, row_gradient),
            tile.write(of_weights, row_sums(output_gradient, tile.read(outputs))),
            [
                {
                    name: tile.add_to_expert(total, _OF_TILE[name](*pair))
                    for name, total in totals.items()
                }
                for totals, pair in zip(of_trained, factors)
            ],
        )

    buffers = (
        layout.buffer(tokens.shape[1]),
        ops.zeros((layout.num_rows, 1), "float32"),
        keras.tree.map_structure(_zeros_for_sum, parameters.trained),
    )
    of_rows, of_weights, totals = layout.for_each_tile(parameters, compute, buffers)
    of_trained = keras.tree.map_structure(_like, totals, parameters.trained)
    return of_rows, groups.at_assignments(of_weights[:, 0]), of_trained


class _Layout:
    """Where groups and tiles lie; numbers of groups are computed once for a pass.

    After the rows of all groups comes padding for a tile that overruns the last one.
    """

    def __init__(self, groups, dtype):
        self.dtype = dtype
        self.sizes = groups.sizes
        num_rows = groups.num_rows()
        self.length = tile_length(num_rows, groups.sizes.shape[0])
        self.in_blocks = isinstance(num_rows, int) and num_rows <= MOST_BLOCK_ROWS
        self.num_rows = num_rows + self.length
        self._token_of_row = ops.pad(groups.token_of_row(), (0, self.length))

    def buffer(self, width):
        """Zeros for all rows."""
        return ops.zeros((self.num_rows, width), self.dtype)

    def for_each_tile(self, parameters, compute, carry):
        """`carry = compute(tile, products, carry)` for the tiles of every expert with rows."""
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
            products = _products(parameters, expert, self.dtype, self.in_blocks)

            def nth_tile(i, carry):
                start = first + i * self.length
                rows = start + ops.arange(self.length, dtype="int32")
                tokens = backend.slice_at(self._token_of_row, (start,), (self.length,))
                inside = ops.expand_dims(rows < end, 1)
                return compute(_Tile(expert, start, inside, tokens, self.dtype), products, carry)

            return ops.fori_loop(0, backend.gather_rows(num_tiles, expert), nth_tile, carry)

        return ops.fori_loop(0, ops.sum(ops.cast(has_rows, "int32")), group, carry)


class _Tile(NamedTuple):
    """Some rows of one expert. Everything that is read has the `dtype` that is computed in."""

    expert: Any
    start: Any
    inside: Any
    token_of_row: Any
    dtype: str

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


def _products(parameters, expert, dtype, in_blocks):
    """Products with the kernels of one expert. Cast per expert on use: idle ones are never cast."""

    def of_expert(parameter):
        return _at(parameter, expert)

    projections = parameters.take(of_expert, dtype)
    stored = [kernel for kernel, _, _ in parameters.projections]

    def project(rows, number):
        kernel, bias, _ = projections[number]
        if in_blocks and isinstance(stored[number], Quantized):
            values, scale = stored[number]
            product = multiply_in_blocks(rows, values, expert) * ops.cast(of_expert(scale), dtype)
        elif isinstance(stored[number], Packed):
            product = stored[number].multiply(rows, of_expert)
        else:
            product = ops.matmul(rows, kernel)
        return product if bias is None else product + bias

    def pull(gradient, number):
        if isinstance(stored[number], Packed):
            return stored[number].multiply(gradient, of_expert, transposed=True)
        return ops.matmul(gradient, ops.transpose(projections[number].kernel))

    return products_of(project, pull)


def multiply_in_blocks(rows, kernels, expert):
    """`rows @ kernels[expert]` of few rows (n, D), n static, with int8 kernels (E, D, H).

    XLA converts a whole kernel to floats before it multiplies. For few rows that takes longer than
    the product. Converted in blocks of some rows of the kernel, one after another, the floats stay
    in the cache.
    """
    (num_rows, depth), width = rows.shape, kernels.shape[2]
    # The sum of the products is read and written for each block, so a block is not shorter.
    length = min(max(BLOCK_ENTRIES // width, num_rows), depth)
    num_blocks, rest = divmod(depth, length)

    def add_product(start, length, total):
        columns = backend.slice_at(rows, (0, start), (num_rows, length))
        block = backend.slice_at(kernels, (expert, start, 0), (1, length, width))
        return total + ops.matmul(columns, ops.cast(ops.squeeze(block, 0), rows.dtype))

    total = ops.fori_loop(
        0,
        num_blocks,
        lambda number, total: add_product(number * length, length, total),
        ops.zeros((num_rows, width), rows.dtype),
    )
    return add_product(num_blocks * length, rest, total) if rest else total


# On CPUs XLA computes A^T B at half the speed where A is wider than B. Such gradients are summed
# transposed. Exchanging the axes of the sums costs less than exchanging those of each part.


def _narrow_first(*factors):
    left, right = sorted(factors, key=lambda rows: rows.shape[1])
    return ops.matmul(ops.transpose(left), right)


def _zeros_for_sum(parameter):
    experts, *shape = parameter.shape
    return ops.zeros((experts, *sorted(shape)), "float32")


def _like(total, parameter):
    """The sum of a parameter's gradients, with its axes and dtype."""
    upright = total if total.shape == parameter.shape else ops.transpose(total, (0, 2, 1))
    return ops.cast(upright, parameter.dtype)


# The gradients of a tile, from the rows that were multiplied and the gradients of their products.
_OF_TILE = {
    "kernel": _narrow_first,
    "bias": lambda left, right: ops.sum(ops.cast(right, "float32"), axis=0),
}


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
