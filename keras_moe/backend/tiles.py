"""A loop over tiles of rows, for XLA on CPUs, and for few rows in TensorFlow's graphs.

There is one loop over the experts that have rows, and in it one over the tiles of such a group;
their trips depend on the data. The last tile of a group may overrun it: reads are masked, with
zeros, or ones for buffers; writes are overwritten by the next group or land in padding.
"""

import math
import os
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe.backend.layouts import AllRows
from keras_moe.backend.padded import most_tiles, tile_length

# Of all experts together: with so few rows integer kernels are converted in blocks. Each tile of an
# expert converts its kernel again: with more rows that would happen too often.
MAX_BLOCK_ROWS = 128

# Entries of a block of a kernel, 256 KB in float32.
BLOCK_ENTRIES = 2**16


# Rows of one width, and copies of kernels, of so many numbers each stay in the cache.
MAX_BATCHED = 2**20


def layout_on_cpu(backend, problem):
    """Return a loop over tiles, or for small problems on several cores all tiles at once.

    XLA divides a batch of small products among the cores, but a loop over them uses one core.
    """
    num_rows, dtype = problem.plan.num_rows(), keras.backend.standardize_dtype(problem.tokens.dtype)
    kernels = [kernel for kernel, _ in problem.maps.values()]
    are_floats = dtype == "float32" and all(kernel.bits is None for kernel in kernels)
    if are_floats and isinstance(num_rows, int) and num_cores() > 1:
        num_experts = kernels[0].shape[0]
        length = tile_length(num_rows, num_experts, "cpu")
        num_tiles = most_tiles(num_rows, num_experts, length)
        sizes = [num_tiles * math.prod(kernel.shape[1:]) for kernel in kernels]
        sizes += [num_rows * max(kernel.shape[1:]) for kernel in kernels]
        # A copy of a kernel should serve more than a few rows.
        if length >= 16 and max(sizes) <= MAX_BATCHED:
            return AllRows(backend, problem, "cpu")
    return TileLoop(backend, problem)


def num_cores():
    """Return the number of cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


class TileLoop:
    """See `layouts`. A buffer has a row for each row, and for a tile that overruns the last."""

    def __init__(self, backend, problem):
        plan = problem.plan
        self.backend, self.sizes, self.num_rows = backend, plan.sizes, plan.num_rows()
        self.length = tile_length(self.num_rows, self.sizes.shape[0], "cpu")
        self.dtype = computed_dtype(problem.tokens)
        self.token_of_row = ops.pad(plan.token_of_row(), (0, self.length))

    def to_buffer(self, rows):
        return ops.pad(rows, ((0, self.length), (0, 0)))

    def to_rows(self, buffer):
        return buffer  # its end is the rows of no assignment

    def run(self, function, maps, by_token, by_row, widths, trained):
        entry, sizes, length = self.backend.gather_rows, self.sizes, self.length
        # Reading the kernels of an expert costs as much as a few rows. For a few tokens, as in
        # decoding, most experts have none.
        has_rows = sizes > 0
        busy_first = ops.cast(ops.argsort(~has_rows), "int32")
        ends = ops.cumsum(sizes)
        num_tiles = (sizes + length - 1) // length

        def group(number, carry):
            expert = entry(busy_first, number)
            end = entry(ends, expert)
            first = end - entry(sizes, expert)
            maps_of_expert = {name: self._of_expert(each, expert) for name, each in maps.items()}

            def nth_tile(i, carry):
                buffers, totals = carry
                start = first + i * length
                inside = start + ops.arange(length, dtype="int32") < end
                tile = _Tile(self, expert, start, ops.expand_dims(inside, 1))
                rows = [*map(tile.gather, by_token), *map(tile.read, by_row)]
                outputs, factors = function(tile, maps_of_expert, *rows)
                return list(map(tile.write, buffers, outputs)), {
                    (name, field): tile.add_to_expert(total, field, *factors[name])
                    for (name, field), total in totals.items()
                }

            return ops.fori_loop(0, entry(num_tiles, expert), nth_tile, carry)

        num_rows = self.num_rows + length
        buffers = [ops.zeros((num_rows, width), self.dtype) for width in widths]
        totals = {  # kernels as `add_to_expert` sums them
            key: ops.zeros((each.shape[0], *sorted(each.shape[1:])), "float32")
            for key, each in trained.items()
        }
        num_busy = ops.sum(ops.cast(has_rows, "int32"))
        buffers, totals = ops.fori_loop(0, num_busy, group, (buffers, totals))
        return buffers, {key: _like(total, trained[key]) for key, total in totals.items()}

    def _of_expert(self, linear_map, expert):
        """The linear map of one expert. Cast per expert on use: idle ones are never cast."""
        few_rows = isinstance(self.num_rows, int) and self.num_rows <= MAX_BLOCK_ROWS
        kernel, bias = linear_map.apply(lambda stack: _at(self.backend, stack, expert))
        # Products with int4 are faster without a conversion first, with int8 only for few rows.
        if not (kernel.bits == 4 or (few_rows and kernel.bits == 8)):
            kernel = kernel._replace(values=kernel.floats(self.dtype), scale=None)
        bias = None if bias is None else ops.cast(bias, self.dtype)
        return linear_map._replace(kernel=kernel, bias=bias)


class _Tile(NamedTuple):
    """Some rows of one expert. Everything that is read has the dtype that is computed in."""

    layout: Any
    expert: Any
    start: Any
    inside: Any

    def product(self, rows, kernels, bias=None, transposed=False):
        if kernels.bits == 8 and not transposed:
            products = _multiply_in_blocks(self.layout.backend, rows, kernels.values)
            products = products * ops.cast(kernels.scale, rows.dtype)
            return products if bias is None else products + bias
        return kernels.multiply(rows, bias, transposed)

    def row_numbers(self):
        return self.start + ops.arange(self.layout.length, dtype="int32")

    def gather(self, tokens):
        """The tokens of the rows, zeros past the end of the group."""
        backend, length = self.layout.backend, self.layout.length
        token_of_row = backend.slice_at(self.layout.token_of_row, (self.start,), (length,))
        return self._mask(backend.gather_rows(tokens, token_of_row), 0.0)

    def read(self, buffer):
        """The rows of a buffer, ones past the end of the group."""
        # Not zeros, where an activation may have no derivative: NaN times 0 is NaN.
        shape = (self.layout.length, buffer.shape[1])
        return self._mask(self.layout.backend.slice_at(buffer, (self.start, 0), shape), 1.0)

    def write(self, buffer, rows):
        rows = ops.cast(rows, buffer.dtype)
        return self.layout.backend.update_at(buffer, (self.start, 0), rows)

    def add_to_expert(self, total, field, left, right):
        """Add the tile's part of a gradient to the expert's entry, in place under XLA."""
        if field == "bias":
            part = ops.sum(ops.cast(right, "float32"), axis=0)
        else:
            # On CPUs XLA computes A^T B at half the speed where A is wider than B. Such gradients
            # are summed transposed. Transposing the sum costs less than transposing each part.
            narrow, wide = sorted((left, right), key=lambda rows: rows.shape[1])
            part = ops.matmul(ops.transpose(narrow), wide)
        entry = _at(self.layout.backend, total, self.expert) + ops.cast(part, total.dtype)
        start = _start(total, self.expert)
        return self.layout.backend.update_at(total, start, ops.expand_dims(entry, 0))

    def _mask(self, rows, past_end):
        past_end = ops.full((), past_end, self.layout.dtype)
        return ops.where(self.inside, ops.cast(rows, self.layout.dtype), past_end)


def _multiply_in_blocks(backend, rows, kernel):
    """`rows @ kernel` of few rows (n, D), n static, with an int8 kernel (D, H).

    XLA would convert the whole kernel first. The floats of a block stay in the cache.
    """
    (num_rows, depth), width = rows.shape, kernel.shape[1]
    # The sum of the products is read and written for each block, so a block is not shorter.
    length = min(max(BLOCK_ENTRIES // width, num_rows), depth)
    num_blocks, rest = divmod(depth, length)

    def add_product(start, length, total):
        columns = backend.slice_at(rows, (0, start), (num_rows, length))
        block = backend.slice_at(kernel, (start, 0), (length, width))
        return total + ops.matmul(columns, ops.cast(block, rows.dtype))

    def nth_block(number, total):
        return add_product(number * length, length, total)

    total = ops.zeros((num_rows, width), rows.dtype)
    if backend.needs_static_shapes():
        total = ops.fori_loop(0, num_blocks, nth_block, total)
    else:  # a trip of TensorFlow's loops costs more than a block
        for number in range(num_blocks):
            total = nth_block(number, total)
    return add_product(num_blocks * length, rest, total) if rest else total


def _like(total, parameter):
    """The sum of a parameter's gradients, with its axes and dtype."""
    upright = total if total.shape == parameter.shape else ops.transpose(total, (0, 2, 1))
    return ops.cast(upright, parameter.dtype)


def computed_dtype(tokens):
    """The dtype that tiles are computed in."""
    # For products of narrow floats XLA on CPUs would convert each operand, and round each result.
    dtype = keras.backend.standardize_dtype(tokens.dtype)
    return "float32" if dtype in ("bfloat16", "float16") else dtype


def _at(backend, stacked, expert):
    """Entry `expert` of a tensor (E, ...)."""
    part = backend.slice_at(stacked, _start(stacked, expert), (1, *stacked.shape[1:]))
    return ops.squeeze(part, 0)


def _start(stacked, expert):
    return (expert, *[0] * (len(stacked.shape) - 1))
