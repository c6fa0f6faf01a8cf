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

# The widest rows of a chunk have about so many numbers, 2 MB in float32, which stay in the cache.
CHUNK_ENTRIES = 2**19

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
        self.backend, self.plan, self.sizes = backend, plan, plan.sizes
        self.num_rows, self.num_experts = plan.num_rows(), plan.sizes.shape[0]
        self.length = tile_length(self.num_rows, self.num_experts, "cpu")
        self.dtype = computed_dtype(problem.tokens)
        self.starts = ops.cumsum(self.sizes) - self.sizes
        self.num_wide = num_wide_rows(problem)
        self.rest, self.num_skipped, first, self.num_places = self.sizes, 0, 0, self.num_rows
        if self.num_wide:
            # A row of few numbers costs something, too.
            number = CHUNK_ENTRIES // (self.num_wide * max(widest(problem), 128))
            # In pairs, so that the products of a chunk keep more than one core busy.
            number = min(number // 2 * 2 + 2, self.num_experts)
            self.chunk_size = next(n for n in range(number, 0, -1) if self.num_experts % n == 0)
            most = int(MAX_REST * self.num_rows)
            rest = ops.maximum(self.sizes - self.num_wide, 0)
            self.is_even = ops.sum(rest) <= most
            self.rest = ops.where(self.is_even, rest, self.sizes)
            self.num_skipped = ops.where(self.is_even, self.num_wide, 0)  # rows of a group
            num_wide = self.num_wide * self.num_experts
            first = ops.where(self.is_even, num_wide, 0)
            self.num_places = max(num_wide + most, self.num_rows)
        self.places = first + ops.cumsum(self.rest) - self.rest
        overrun = max(self.length, self.num_wide)
        self.assignments = ops.pad(plan.assignment_of_row, (0, overrun))

    def of_assignments(self, values):
        return ops.reshape(ops.transpose(values), (-1,))

    def at_assignments(self, buffer):
        return ops.transpose(ops.reshape(buffer, ops.shape(self.plan.experts)[::-1]))

    def run(self, function, maps, by_token, by_row, widths, trained, weights=None):
        entry, sizes, length = self.backend.gather_rows, self.rest, self.length
        # Reading the kernels of an expert costs as much as a few rows. For a few tokens, as in
        # decoding, most experts have none.
        has_rows = sizes > 0
        busy_first = ops.cast(ops.argsort(~has_rows), "int32")
        num_tiles = (sizes + length - 1) // length
        by_row = [*by_row] if weights is None else [self.of_assignments(weights), *by_row]

        def compute(part, own_maps, carry):
            sums, buffers, totals = carry
            rows = [*map(part.gather, by_token), *map(part.read, by_row)]
            row_weights = () if weights is None else (rows.pop(len(by_token)),)
            (summed, *outputs), factors = function(part, own_maps, *rows)
            return (
                part.add_to_tokens(sums, summed, *row_weights),
                list(map(part.write, buffers, outputs)),
                {
                    (name, field): part.add_gradient(total, field, *factors[name])
                    for (name, field), total in totals.items()
                },
            )

        def nth_chunk(number, carry):
            first = number * self.chunk_size
            sizes, starts = (
                ops.expand_dims(self.backend.slice_at(each, (first,), (self.chunk_size,)), 1)
                for each in (self.sizes, self.starts)
            )
            rank = ops.arange(self.num_wide, dtype="int32")
            row, inside = (ops.reshape(each, (-1,)) for each in (starts + rank, rank < sizes))
            numbers = entry(self.assignments, row)
            chunk = _Chunk(self, first, row, numbers, inside, first * self.num_wide)
            own_maps = {name: chunk.of_experts(each) for name, each in maps.items()}
            return compute(chunk, own_maps, carry)

        def group(number, carry):
            expert = entry(busy_first, number)
            first, first_place = entry(self.starts, expert), entry(self.places, expert)
            own_maps = {name: self._of_expert(each, expert) for name, each in maps.items()}

            def nth_tile(i, carry):
                rank = i * length + ops.arange(length, dtype="int32")
                inside = rank < entry(sizes, expert)
                start = first + self.num_skipped + i * length
                numbers = self.backend.slice_at(self.assignments, (start,), (length,))
                row, place = first + self.num_skipped + rank, first_place + i * length
                tile = _Tile(self, expert, row, numbers, inside, place)
                return compute(tile, own_maps, carry)

            return ops.fori_loop(0, entry(num_tiles, expert), nth_tile, carry)

        sums = ops.zeros((ops.shape(by_token[0])[0], widths[0]), "float32")
        # A tile may overrun the last row.
        buffers = [
            ops.zeros((self.num_places + length, width), self.dtype)
            if width
            else ops.zeros((ops.size(self.plan.experts),), "float32")
            for width in widths[1:]
        ]
        totals = {key: ops.zeros(each.shape, "float32") for key, each in trained.items()}
        carry = sums, buffers, totals
        if self.num_wide:
            num_chunks = ops.where(self.is_even, self.num_experts // self.chunk_size, 0)
            carry = ops.fori_loop(0, num_chunks, nth_chunk, carry)
        num_busy = ops.sum(ops.cast(has_rows, "int32"))
        sums, buffers, totals = ops.fori_loop(0, num_busy, group, carry)
        totals = {key: ops.cast(total, trained[key].dtype) for key, total in totals.items()}
        return sums, buffers, totals

    def _of_expert(self, linear_map, expert):
        """The linear map of one expert. Cast per expert on use: idle ones are never cast."""
        few_rows = isinstance(self.num_rows, int) and self.num_rows <= MAX_BLOCK_ROWS
        linear_map = linear_map.apply(lambda stack: _at(self.backend, stack, expert))
        # Products with int4 are faster without a conversion first, with int8 only for few rows.
        bits = linear_map.kernel.bits
        return linear_map if bits == 4 or (few_rows and bits == 8) else self.as_floats(linear_map)

    def as_floats(self, linear_map):
        kernel, bias = linear_map
        kernel = kernel._replace(values=kernel.floats(self.dtype), scale=None)
        return linear_map._replace(
            kernel=kernel, bias=None if bias is None else ops.cast(bias, self.dtype)
        )


class _Tile(NamedTuple):
    """Some rows of one expert. Everything that is read has the dtype that is computed in."""

    layout: Any
    expert: Any
    row: Any  # (n,) int32, rows of the plan
    numbers: Any  # (n,) int32, their assignments
    inside: Any  # (n,) bool, False past the end of a group
    place: Any  # of the first row in buffers

    def product(self, rows, kernels, bias=None, transposed=False):
        if kernels.bits == 8 and not transposed:
            products = _multiply_in_blocks(self.layout.backend, rows, kernels.values)
            products = products * ops.cast(kernels.scale, rows.dtype)
            return products if bias is None else products + bias
        return kernels.multiply(rows, bias, transposed)

    def row_numbers(self):
        # Whatever the layout: random draws go by them.
        return self.row

    def gather(self, tokens):
        """The tokens of the rows, zeros past the end of the group."""
        return self._mask(self.layout.backend.gather_rows(tokens, self._token()), 0.0)

    def read(self, buffer):
        """The rows of a buffer, ones past the end of the group."""
        # Not zeros, where an activation may have no derivative: NaN times 0 is NaN.
        if len(buffer.shape) == 1:
            rows = self.layout.backend.gather_rows(buffer, self.numbers)
            return self._mask(ops.expand_dims(rows, 1), 1.0)
        shape = (self.inside.shape[0], buffer.shape[1])
        return self._mask(self.layout.backend.slice_at(buffer, (self.place, 0), shape), 1.0)

    def write(self, buffer, rows):
        if len(buffer.shape) == 1:
            added = ops.where(self.inside, ops.cast(rows[:, 0], buffer.dtype), 0.0)
            return self.layout.backend.add_at(buffer, self.numbers, added)
        rows = ops.cast(rows, buffer.dtype)
        return self.layout.backend.update_at(buffer, (self.place, 0), rows)

    def add_to_tokens(self, sums, rows, weights=None):
        rows = ops.cast(rows, "float32")
        rows = rows if weights is None else rows * weights
        rows = ops.where(ops.expand_dims(self.inside, 1), rows, 0.0)
        return self.layout.backend.add_at(sums, self._token(), rows)

    def add_gradient(self, total, field, left, right):
        """Add the tile's part of a gradient to the expert's entry, in place under XLA."""
        if field == "bias":
            part = ops.sum(ops.cast(right, "float32"), axis=0)
        else:
            part = self.layout.backend.product_over_rows(left, right)
        entry = _at(self.layout.backend, total, self.expert) + ops.cast(part, total.dtype)
        start = _start(total, self.expert)
        return self.layout.backend.update_at(total, start, ops.expand_dims(entry, 0))

    def _token(self):
        return self.numbers % ops.shape(self.layout.plan.experts)[0]

    def _mask(self, rows, past_end):
        past_end = ops.full((), past_end, self.layout.dtype)
        inside = ops.expand_dims(self.inside, 1)
        return ops.where(inside, ops.cast(rows, self.layout.dtype), past_end)


class _Chunk(_Tile):
    """The wide rows of neighbouring experts, from `expert` on."""

    def of_experts(self, linear_map):
        backend, number = self.layout.backend, self.layout.chunk_size

        def part(stack):
            return backend.slice_at(stack, _start(stack, self.expert), (number, *stack.shape[1:]))

        return self.layout.as_floats(linear_map.apply(part))

    def product(self, rows, kernels, bias=None, transposed=False):
        values = kernels.values
        values = ops.transpose(values, (0, 2, 1)) if transposed else values
        products = ops.matmul(self._by_expert(rows), values)
        products = products if bias is None else products + ops.expand_dims(bias, 1)
        return ops.reshape(products, (-1, products.shape[2]))

    def add_gradient(self, total, field, left, right):
        """Write the gradient of the experts' entries."""
        left, right = self._by_expert(left), self._by_expert(right)
        if field == "bias":
            part = ops.sum(ops.cast(right, "float32"), axis=1)
        else:
            part = self.layout.backend.product_over_rows(left, right)
        part, start = ops.cast(part, total.dtype), _start(total, self.expert)
        return self.layout.backend.update_at(total, start, part)

    def _by_expert(self, rows):
        return ops.reshape(rows, (self.layout.chunk_size, self.layout.num_wide, rows.shape[1]))


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
