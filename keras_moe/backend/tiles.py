"""Chunks of experts and tiles of rows, for XLA, and for kernels that TensorFlow's graphs convert.

A chunk is the first rows of some experts, the same number for each, in one batched product. What
is left is computed in a loop over the experts that have more rows, and in it one over the tiles of
such a group; their trips depend on the data. On CPUs few rows are only in the loop, and so are all
if groups are very uneven. On GPUs one chunk has all experts.

A buffer has the wide rows of all experts, then the rest of each group. The last tile of a group may
overrun it: it reads other rows there, which are masked in sums and gradients; what it writes is
overwritten by the next group or lands in padding.
"""

import operator
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe.backend.layouts import Layout
from keras_moe.backend.padded import tile_length

# Up to so many rows in all, each tile converts int8 kernels in blocks. With more rows they are
# converted once for each expert.
MAX_BLOCK_ROWS = 128

# Entries of a block of a kernel, 256 KB in float32.
BLOCK_ENTRIES = 2**16

# With fewer rows for an expert, on average, most experts have none, or a single tile.
MIN_WIDE_ROWS = 8

# The widest rows of a chunk have about so many numbers, 2 MB in float32, which stay in the cache.
CHUNK_ENTRIES = 2**19

# With more numbers for an expert, on average, the loop is as fast, and takes less memory.
MAX_WIDE_ENTRIES = 2**19

# On GPUs an expert has this many times its mean rows in the chunk: in a loop each trip waits for
# the host.
GPU_WIDE = 1.25

# The largest part of all rows that is computed in the loop if the others are in chunks.
MAX_REST = 1 / 4


def num_wide_rows(problem, platform):
    """Return how many rows of each expert are computed in a chunk; 0 for none."""
    num_rows, num_experts = problem.plan.num_rows(), problem.plan.sizes.shape[0]
    has_integers = any(linear.kernel.bits is not None for linear in problem.maps.values())
    if has_integers or not isinstance(num_rows, int) or num_rows < MIN_WIDE_ROWS * num_experts:
        return 0
    mean = num_rows / num_experts
    if platform == "cpu" and mean * problem.widest > MAX_WIDE_ENTRIES:
        return 0
    # A router that has learned nothing gives groups of about this spread.
    number = mean + mean**0.5 if platform == "cpu" else GPU_WIDE * mean
    # No expert serves more rows than there are tokens.
    return min(int(number) // 8 * 8 + 8, problem.plan.num_tokens)


class ChunksAndTiles(Layout):
    """Chunks and tiles; see `layouts.AllRows` for the methods."""

    def __init__(self, backend, platform, problem):
        plan = problem.plan
        self.backend, self.plan, self.sizes = backend, plan, plan.sizes
        self.num_rows, self.num_experts = plan.num_rows(), plan.sizes.shape[0]
        self.length = tile_length(self.num_rows, self.num_experts, platform)
        if len(problem.maps) > 2:
            self.length = min(self.length, backend.longest_gated_tile)
        self.dtype = computed_dtype(problem.tokens, platform)
        self.starts = ops.cumsum(self.sizes) - self.sizes
        self.num_wide = num_wide_rows(problem, platform)
        self.rest, self.num_skipped, first, self.num_places = self.sizes, 0, 0, self.num_rows
        if self.num_wide:
            # A row of few numbers costs something, too.
            number = CHUNK_ENTRIES // (self.num_wide * max(problem.widest, 128))
            # An even number, if it divides E: products of two experts keep two cores busy.
            number = min(number // 2 * 2 + 2, self.num_experts)
            self.chunk_size = next(n for n in range(number, 0, -1) if self.num_experts % n == 0)
            rest, most = ops.maximum(self.sizes - self.num_wide, 0), int(MAX_REST * self.num_rows)
            self.is_even = ops.sum(rest) <= most
            if platform == "gpu":
                self.chunk_size, most, self.is_even = self.num_experts, self.num_rows, True
            self.rest = ops.where(self.is_even, rest, self.sizes)
            self.num_skipped = ops.where(self.is_even, self.num_wide, 0)  # rows of a group
            num_wide = self.num_wide * self.num_experts
            first = ops.where(self.is_even, num_wide, 0)
            self.num_places = max(num_wide + most, self.num_rows)
        self.places = first + ops.cumsum(self.rest) - self.rest
        overrun = max(self.length, self.num_wide)
        self.assignment_of_row = ops.pad(plan.assignment_of_row, (0, overrun))
        self.weight_of_assignment = ops.reshape(ops.transpose(problem.weights), (-1,))

    def for_each_part(self, function, maps, carry):
        entry, length = self.backend.gather_rows, self.length

        def nth_chunk(number, carry):
            first, size = number * self.chunk_size, self.chunk_size
            own_maps = {name: self._of_experts(each, first, size) for name, each in maps.items()}
            chunk = self._part(first, size, 0, self.num_wide, first * self.num_wide)
            return function(chunk, own_maps, carry)

        if self.num_wide and self.is_even is True:
            carry = nth_chunk(0, carry)
        elif self.num_wide:
            num_chunks = ops.where(self.is_even, self.num_experts // self.chunk_size, 0)
            carry = ops.fori_loop(0, num_chunks, nth_chunk, carry)

        # Reading the kernels of an expert costs as much as a few rows. For a few tokens, as in
        # decoding, most experts have none.
        has_rows, expert = self.rest > 0, ops.arange(self.num_experts, dtype="int32")
        # In the order of their groups, as the last tile of each overruns the next group.
        busy_first = ops.argsort(ops.where(has_rows, expert, expert + self.num_experts))
        busy_first = ops.cast(busy_first, "int32")
        num_tiles = (self.rest + length - 1) // length

        def nth_group(number, carry):
            expert = entry(busy_first, number)
            own_maps = {name: self._of_experts(each, expert, 1) for name, each in maps.items()}

            def nth_tile(i, carry):
                skipped = self.num_skipped + i * length
                place = entry(self.places, expert) + i * length
                return function(self._part(expert, 1, skipped, length, place), own_maps, carry)

            return ops.fori_loop(0, entry(num_tiles, expert), nth_tile, carry)

        return ops.fori_loop(0, ops.sum(ops.cast(has_rows, "int32")), nth_group, carry)

    def sums(self, width):
        return ops.zeros((ops.shape(self.plan.experts)[0], width), "float32")

    def buffer(self, width):
        # The last tile may overrun the rows.
        return ops.zeros((self.num_places + self.length, width), self.dtype)

    def gradient(self, trained):
        return ops.zeros(trained.shape, "float32")

    def _part(self, expert, number, skipped, length, place):
        """Some rows of each of `number` experts from `expert` on, in buffers from `place` on."""
        starts, sizes = (
            ops.expand_dims(self.backend.slice_at(each, (expert,), (number,)), 1)
            for each in (self.starts, self.sizes)
        )
        rank = skipped + ops.arange(length, dtype="int32")
        row, inside = (ops.reshape(each, (-1,)) for each in (starts + rank, rank < sizes))
        assignment = self.backend.gather_rows(self.assignment_of_row, row)
        return _Part(self, expert, number, row, assignment, ops.expand_dims(inside, 1), place)

    def _of_experts(self, linear_map, expert, number):
        """The linear map of some experts. In the loop idle experts are never cast."""
        few_rows = isinstance(self.num_rows, int) and self.num_rows <= MAX_BLOCK_ROWS
        linear_map = linear_map.apply(lambda stack: self._slice(stack, expert, number))
        # Products with int4 are faster without a conversion first, with int8 only for few rows.
        is_used_as_it_is = linear_map.kernel.bits in ((4, 8) if few_rows else (4,))
        return linear_map if is_used_as_it_is else linear_map.floats(self.dtype)

    def _slice(self, stack, expert, number):
        return self.backend.slice_at(stack, _start(stack, expert), (number, *stack.shape[1:]))


class _Part(NamedTuple):
    """The same number of rows of each of some experts, in the dtype that is computed in."""

    layout: Any
    expert: Any  # the first
    number: int  # of experts
    row: Any  # (n,) int32, rows of the plan
    assignment: Any  # (n,) int32
    inside: Any  # (n, 1) bool, False past the end of a group
    place: Any  # of the first row in buffers

    def product(self, rows, kernels, bias=None, transposed=False):
        if kernels.bits is None:
            values = kernels.values
            values = ops.transpose(values, (0, 2, 1)) if transposed else values
            products = ops.matmul(self._by_expert(rows), values)
            products = products if bias is None else products + ops.expand_dims(bias, 1)
            return ops.reshape(products, (-1, products.shape[2]))
        kernel, bias = kernels.apply(operator.itemgetter(0)), None if bias is None else bias[0]
        if kernel.bits == 4 or transposed:
            return kernel.multiply(rows, bias, transposed)
        products = _multiply_in_blocks(self.layout.backend, rows, kernel.values)
        products = products * ops.cast(kernel.scale, rows.dtype)
        return products if bias is None else products + bias

    def row_numbers(self):
        return self.row

    def gather(self, tokens):
        rows = self.layout.backend.gather_rows(tokens, self._token())
        # Sums and gradients are masked, too, but XLA on CPUs is faster where it fuses a gather.
        return self._mask(ops.cast(rows, self.layout.dtype))

    def weights(self):
        layout = self.layout
        weights = layout.backend.gather_rows(layout.weight_of_assignment, self.assignment)
        return ops.expand_dims(weights, 1)

    def read(self, buffer):
        shape = (self.inside.shape[0], buffer.shape[1])
        return self.layout.backend.slice_at(buffer, (self.place, 0), shape)

    def write(self, buffer, rows):
        return ops.slice_update(buffer, (self.place, 0), ops.cast(rows, buffer.dtype))

    def add_to_sums(self, sums, rows, weighted=False):
        rows = ops.cast(rows, sums.dtype)
        rows = rows * self.weights() if weighted else rows
        return self.layout.backend.add_at(sums, self._token(), self._mask(rows))

    def add_to_assignments(self, values, rows):
        return self.layout.backend.add_at(values, self.assignment, self._mask(rows)[:, 0])

    def add_gradient(self, total, field, left, right):
        # In place under XLA.
        backend, right = self.layout.backend, self._by_expert(self._mask(right))
        if field == "bias":
            added = ops.sum(ops.cast(right, "float32"), axis=1)
        else:  # both, as 0 times NaN is NaN
            added = backend.product_over_rows(self._by_expert(self._mask(left)), right)
        entries = self.layout._slice(total, self.expert, self.number)
        entries = entries + ops.cast(added, total.dtype)
        return ops.slice_update(total, _start(total, self.expert), entries)

    def _by_expert(self, rows):
        return ops.reshape(rows, (self.number, -1, rows.shape[1]))

    def _token(self):
        return self.assignment % ops.shape(self.layout.plan.experts)[0]

    def _mask(self, rows):
        """Rows with zeros past the ends of groups."""
        return ops.where(self.inside, rows, ops.zeros((), rows.dtype))


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


def computed_dtype(tokens, platform):
    """The dtype that tiles are computed in."""
    # For products of narrow floats XLA on CPUs would convert each operand, and round each result.
    dtype = keras.backend.standardize_dtype(tokens.dtype)
    return "float32" if platform == "cpu" and dtype in ("bfloat16", "float16") else dtype


def _start(stacked, expert):
    return (expert, *[0] * (len(stacked.shape) - 1))
