"""Chunks of experts and tiles of rows, for XLA on CPUs, and for few rows in TensorFlow's graphs.

The first rows of all experts are batched products, some experts at a time: a chunk, in which each
has as many rows. Then there is one loop over the experts that have more rows, and in it one over
the tiles of such a group; their trips depend on the data. Few rows are only in the loop, and so are
all if groups are very uneven.

A buffer has the wide rows of all experts, then the rest of each group. The last tile of a group may
overrun it: reads are masked, with zeros, or ones for buffers; writes are overwritten by the next
group or land in padding.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe.backend.padded import tile_length

# Of all experts together: with so few rows integer kernels are converted in blocks. Each tile of an
# expert converts its kernel again: with more rows that would happen too often.
MAX_BLOCK_ROWS = 128

# Entries of a block of a kernel, 256 KB in float32.
BLOCK_ENTRIES = 2**16

# With fewer rows for an expert, on average, most experts have none, or a single tile.
MIN_WIDE_ROWS = 8

# The widest rows of a chunk have about so many numbers, 512 KB in float32, which stay in the cache.
CHUNK_ENTRIES = 2**17

# With more numbers for an expert, on average, the loop is as fast, and takes less memory.
MAX_WIDE_ENTRIES = 2**19

# The largest part of all rows that is computed in the loop if the others are in chunks.
MAX_REST = 1 / 4


def num_wide_rows(problem):
    """Return how many rows of each expert are computed in a chunk; 0 for none."""
    num_rows, num_experts = problem.plan.num_rows(), problem.plan.sizes.shape[0]
    if any(linear.kernel.bits is not None for linear in problem.maps.values()):
        return 0
    if not isinstance(num_rows, int) or num_rows < MIN_WIDE_ROWS * num_experts:
        return 0
    # A router that has learned nothing gives groups of about this spread.
    mean = num_rows / num_experts
    if mean * widest(problem) > MAX_WIDE_ENTRIES:
        return 0
    # No expert serves more rows than there are tokens.
    return min(int(mean + mean**0.5) // 8 * 8 + 8, problem.plan.num_tokens)


def widest(problem):
    return max(max(linear.kernel.shape[1:]) for linear in problem.maps.values())


class ChunksAndTiles:
    """See `layouts`."""

    def __init__(self, backend, problem):
        plan = problem.plan
        self.backend, self.sizes, self.num_rows = backend, plan.sizes, plan.num_rows()
        self.num_experts = self.sizes.shape[0]
        self.length = tile_length(self.num_rows, self.num_experts, "cpu")
        self.dtype = computed_dtype(problem.tokens)
        self.starts = ops.cumsum(self.sizes) - self.sizes
        self.num_wide = num_wide_rows(problem)
        if self.num_wide:
            number = CHUNK_ENTRIES // (self.num_wide * widest(problem))
            # In pairs, so that the products of a chunk keep more than one core busy.
            self.chunk_size = min(number // 2 * 2 + 2, self.num_experts)
            self.length = max(self.length // 2, 1)
            self.plan = self._place_rows(plan)
        else:
            self.rest, self.num_skipped, self.places = self.sizes, 0, self.starts
            self.num_places = self.num_rows + self.length
            numbers = ops.pad(plan.assignment_of_row, (0, self.length))
            self.plan = plan._replace(assignment_of_row=numbers)
        self.token_of_place = self.plan.token_of_row()

    def _place_rows(self, plan):
        """Return the plan with rows as they lie in buffers."""
        gather, num_wide = self.backend.gather_rows, self.num_wide * self.num_experts
        most = int(MAX_REST * self.num_rows)
        rest = ops.maximum(self.sizes - self.num_wide, 0)
        self.is_even = ops.sum(rest) <= most
        self.rest = ops.where(self.is_even, rest, self.sizes)
        self.num_skipped = ops.where(self.is_even, self.num_wide, 0)  # rows of a group
        first = ops.where(self.is_even, num_wide, 0)
        self.places = first + ops.cumsum(self.rest) - self.rest
        self.num_places = max(num_wide + most, self.num_rows) + self.length

        expert, row = ops.maximum(plan.experts, 0), plan.row_of_assignment
        rank = row - gather(self.starts, expert)
        place = gather(self.places, expert) + rank - self.num_skipped
        place = ops.where(rank < self.num_skipped, expert * self.num_wide + rank, place)
        # What has no row is written to the last place, which is padding.
        flat = ops.reshape(ops.transpose(ops.where(row >= 0, place, self.num_places - 1)), (-1, 1))
        numbers = ops.arange(ops.shape(flat)[0], dtype="int32")
        return plan._replace(
            row_of_assignment=ops.where(row >= 0, place, -1),
            assignment_of_row=ops.scatter_update(
                ops.zeros((self.num_places,), "int32"), flat, numbers
            ),
        )

    def to_buffer(self, rows):
        return rows  # of `self.plan`

    def to_rows(self, buffer):
        return buffer

    def run(self, function, maps, by_token, by_row, widths, trained):
        entry, sizes, length = self.backend.gather_rows, self.rest, self.length
        # Reading the kernels of an expert costs as much as a few rows. For a few tokens, as in
        # decoding, most experts have none.
        has_rows = sizes > 0
        busy_first = ops.cast(ops.argsort(~has_rows), "int32")
        num_tiles = (sizes + length - 1) // length

        def compute(part, own_maps, carry):
            buffers, totals = carry
            rows = [*map(part.gather, by_token), *map(part.read, by_row)]
            outputs, factors = function(part, own_maps, *rows)
            return list(map(part.write, buffers, outputs)), {
                (name, field): part.add_gradient(total, field, *factors[name, field])
                for (name, field), total in totals.items()
            }

        def nth_chunk(number, carry):
            # The last one may overlap: its experts are written again.
            first = ops.minimum(number * self.chunk_size, self.num_experts - self.chunk_size)
            own_sizes = self.backend.slice_at(self.sizes, (first,), (self.chunk_size,))
            inside = ops.arange(self.num_wide, dtype="int32") < ops.expand_dims(own_sizes, 1)
            chunk = _Chunk(self, first, first * self.num_wide, ops.reshape(inside, (-1, 1)))
            own_maps = {name: chunk.of_experts(each) for name, each in maps.items()}
            return compute(chunk, own_maps, carry)

        def group(number, carry):
            expert = entry(busy_first, number)
            first = entry(self.places, expert)
            end = first + entry(sizes, expert)
            own_maps = {name: self._of_expert(each, expert) for name, each in maps.items()}

            def nth_tile(i, carry):
                start = first + i * length
                inside = start + ops.arange(length, dtype="int32") < end
                tile = _Tile(self, expert, start, ops.expand_dims(inside, 1))
                return compute(tile, own_maps, carry)

            return ops.fori_loop(0, entry(num_tiles, expert), nth_tile, carry)

        buffers = [ops.zeros((self.num_places, width), self.dtype) for width in widths]
        totals = {  # kernels as `_kernel_gradient` computes them
            key: ops.zeros((each.shape[0], *sorted(each.shape[1:])), "float32")
            for key, each in trained.items()
        }
        carry = buffers, totals
        if self.num_wide:
            num_chunks = -(-self.num_experts // self.chunk_size)
            num_chunks = ops.where(self.is_even, num_chunks, 0)
            carry = ops.fori_loop(0, num_chunks, nth_chunk, carry)
        num_busy = ops.sum(ops.cast(has_rows, "int32"))
        buffers, totals = ops.fori_loop(0, num_busy, group, carry)
        return buffers, {key: _like(total, trained[key]) for key, total in totals.items()}

    def _of_expert(self, linear_map, expert):
        """The linear map of one expert. Cast per expert on use: idle ones are never cast."""
        few_rows = isinstance(self.num_rows, int) and self.num_rows <= MAX_BLOCK_ROWS
        linear_map = linear_map.apply(lambda stack: _at(self.backend, stack, expert))
        # Products with int4 are faster without a conversion first, with int8 only for few rows.
        bits = linear_map.kernel.bits
        as_it_is = bits == 4 or (few_rows and bits == 8)
        return linear_map if as_it_is else linear_map.floats(self.dtype)


class _Tile(NamedTuple):
    """Some rows of one expert. Everything that is read has the dtype that is computed in."""

    layout: Any
    expert: Any
    start: Any  # place of the first row
    inside: Any  # (n, 1) bool, False past the end of a group

    def product(self, rows, kernels, bias=None, transposed=False):
        if kernels.bits == 8 and not transposed:
            products = _multiply_in_blocks(self.layout.backend, rows, kernels.values)
            products = products * ops.cast(kernels.scale, rows.dtype)
            return products if bias is None else products + bias
        return kernels.multiply(rows, bias, transposed)

    def row_numbers(self):
        # Those of the plan, whatever the layout: random draws go by them.
        entry = self.layout.backend.gather_rows
        moved = entry(self.layout.starts - self.layout.places, self.expert)
        first = self.start + moved + self.layout.num_skipped
        return first + ops.arange(self.layout.length, dtype="int32")

    def gather(self, tokens):
        """The tokens of the rows, zeros past the end of the group."""
        backend, length = self.layout.backend, self.inside.shape[0]
        token_of_row = backend.slice_at(self.layout.token_of_place, (self.start,), (length,))
        return self._mask(backend.gather_rows(tokens, token_of_row), 0.0)

    def read(self, buffer):
        """The rows of a buffer, ones past the end of the group."""
        # Not zeros, where an activation may have no derivative: NaN times 0 is NaN.
        shape = (self.inside.shape[0], buffer.shape[1])
        return self._mask(self.layout.backend.slice_at(buffer, (self.start, 0), shape), 1.0)

    def write(self, buffer, rows):
        rows = ops.cast(rows, buffer.dtype)
        return self.layout.backend.update_at(buffer, (self.start, 0), rows)

    def add_gradient(self, total, field, left, right):
        """Add the tile's part of a gradient to the expert's entry, in place under XLA."""
        if field == "bias":
            part = ops.sum(ops.cast(right, "float32"), axis=0)
        else:
            part = _kernel_gradient(left, right)
        entry = _at(self.layout.backend, total, self.expert) + ops.cast(part, total.dtype)
        start = _start(total, self.expert)
        return self.layout.backend.update_at(total, start, ops.expand_dims(entry, 0))

    def _mask(self, rows, past_end):
        past_end = ops.full((), past_end, self.layout.dtype)
        return ops.where(self.inside, ops.cast(rows, self.layout.dtype), past_end)


class _Chunk(_Tile):
    """The wide rows of neighbouring experts, from `expert` on."""

    def of_experts(self, linear_map):
        backend, number = self.layout.backend, self.layout.chunk_size

        def part(stack):
            return backend.slice_at(stack, _start(stack, self.expert), (number, *stack.shape[1:]))

        return linear_map.apply(part).floats(self.layout.dtype)

    def product(self, rows, kernels, bias=None, transposed=False):
        values = kernels.values
        values = ops.transpose(values, (0, 2, 1)) if transposed else values
        products = ops.matmul(self._by_expert(rows), values)
        products = products if bias is None else products + ops.expand_dims(bias, 1)
        return ops.reshape(products, (-1, products.shape[2]))

    def row_numbers(self):
        layout = self.layout
        starts = layout.backend.slice_at(layout.starts, (self.expert,), (layout.chunk_size,))
        numbers = ops.arange(layout.num_wide, dtype="int32")
        return ops.reshape(ops.expand_dims(starts, 1) + numbers, (-1,))

    def add_gradient(self, total, field, left, right):
        """Write the gradient of the experts' entries."""
        left, right = self._by_expert(left), self._by_expert(right)
        if field == "bias":
            part = ops.sum(ops.cast(right, "float32"), axis=1)
        else:
            part = _kernel_gradient(left, right)
        part, start = ops.cast(part, total.dtype), _start(total, self.expert)
        return self.layout.backend.update_at(total, start, part)

    def _by_expert(self, rows):
        return ops.reshape(rows, (self.layout.chunk_size, self.layout.num_wide, rows.shape[1]))


def _kernel_gradient(left, right):
    # On CPUs XLA computes A^T B at half the speed where A is wider than B. Such gradients are
    # summed transposed. Transposing the sum costs less than transposing each part.
    narrow, wide = sorted((left, right), key=lambda rows: rows.shape[-1])
    return ops.matmul(ops.swapaxes(narrow, -1, -2), wide)


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
