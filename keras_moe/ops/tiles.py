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
MAX_BLOCK_ROWS = 128

# Entries of a block of a kernel, 256 KB in float32.
BLOCK_ENTRIES = 2**16


def forward(problem, save):
    network = problem.network

    def compute(tile, maps, carry):
        rows = tile.gather(problem.tokens)
        outputs, saved = forward_part(network, rows, tile, maps, problem.key)
        return list(map(tile.write, carry, [outputs, *(saved if save else ())]))

    widths = [network.output_width, *(network.saved_widths if save else ())]
    buffers = [_buffer(problem, width) for width in widths]
    outputs, *saved = _for_each_tile(problem, compute, buffers)
    return outputs, saved


def backward(problem, row_weights, outputs, saved, gradient):
    padding = (0, _length(problem))
    padded_weights = ops.expand_dims(ops.pad(row_weights, padding), 1)

    def compute(tile, maps, carry):
        of_rows, of_weights, of_maps = carry
        rows, output_gradient = tile.gather(problem.tokens), tile.gather(gradient)
        # Not zeros, where an activation may have no derivative: NaN times 0 is NaN.
        output, *of_tile = (tile.read(buffer, past_end=1.0) for buffer in (outputs, *saved))
        weighted = output_gradient * tile.read(padded_weights)
        row_gradient, factors = backward_part(problem, rows, tile, maps, of_tile, output, weighted)
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
        _buffer(problem, problem.tokens.shape[1]),
        ops.zeros((problem.plan.num_rows() + _length(problem), 1), "float32"),
        keras.tree.map_structure(_zeros_for_sum, problem.trained()),
    )
    of_rows, of_weights, totals = _for_each_tile(problem, compute, buffers)
    return of_rows, of_weights, keras.tree.map_structure(_like, totals, problem.trained())


def _length(problem):
    return tile_length(problem.plan.num_rows(), problem.plan.num_experts)


def _buffer(problem, width):
    """Zeros for all rows, and for a tile that overruns the last group."""
    return ops.zeros((problem.plan.num_rows() + _length(problem), width), _dtype(problem))


def _dtype(problem):
    """The dtype that tiles are computed in."""
    # For products of narrow floats XLA on CPUs would convert each operand, and round each result.
    dtype = dtype_of(problem.tokens)
    is_narrow = dtype in ("bfloat16", "float16")
    return "float32" if is_narrow and problem.platform == "cpu" else dtype


def _for_each_tile(problem, compute, carry):
    """`carry = compute(tile, maps, carry)` for the tiles of every expert with rows."""
    sizes, length, dtype = problem.plan.sizes, _length(problem), _dtype(problem)
    token_of_row = ops.pad(problem.plan.token_of_row(), (0, length))
    # Reading the kernels of an expert costs as much as a few rows. For a few tokens, as in
    # decoding, most experts have none.
    has_rows = sizes > 0
    busy_first = ops.cast(ops.argsort(~has_rows), "int32")
    ends = ops.cumsum(sizes)
    num_tiles = ceil_divide(sizes, length)

    def group(number, carry):
        expert = backend.gather_rows(busy_first, number)
        end = backend.gather_rows(ends, expert)
        first = end - backend.gather_rows(sizes, expert)
        maps = {name: _of_expert(problem, each, expert) for name, each in problem.maps.items()}

        def nth_tile(i, carry):
            start = first + i * length
            rows = start + ops.arange(length, dtype="int32")
            tokens = backend.slice_at(token_of_row, (start,), (length,))
            inside = ops.expand_dims(rows < end, 1)
            return compute(_Tile(expert, start, inside, tokens, dtype), maps, carry)

        return ops.fori_loop(0, backend.gather_rows(num_tiles, expert), nth_tile, carry)

    return ops.fori_loop(0, ops.sum(ops.cast(has_rows, "int32")), group, carry)


def _of_expert(problem, linear, expert):
    """The linear map of one expert. Cast per expert on use: idle ones are never cast."""
    num_rows = problem.plan.num_rows()
    in_blocks = isinstance(num_rows, int) and num_rows <= MAX_BLOCK_ROWS

    def stored(weight):
        entry = linears.part_of(weight, lambda stack: _at(stack, expert))
        # Packed integers are multiplied faster as they are, and others for few rows.
        stays = isinstance(entry, Int4Kernel) or (in_blocks and isinstance(entry, Int8Kernel))
        return entry if stays else linears.as_floats(entry, _dtype(problem))

    return linears.Linear(*(None if each is None else stored(each) for each in linear))


class _Tile(NamedTuple):
    """Some rows of one expert. Everything that is read has the `dtype` that is computed in."""

    expert: Any
    start: Any
    inside: Any
    token_of_row: Any
    dtype: str

    def product(self, rows, kernel, bias=None, transposed=False):
        if isinstance(kernel, Int8Kernel) and not transposed:
            products = _multiply_in_blocks(rows, kernel.values) * ops.cast(kernel.scale, rows.dtype)
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
        past_end = ops.full((), past_end, self.dtype)
        return ops.where(self.inside, ops.cast(rows, self.dtype), past_end)


def _multiply_in_blocks(rows, kernel):
    """`rows @ kernel` of few rows (n, D), n static, with an int8 kernel (D, H).

    XLA would convert the whole kernel to floats first, which for few rows takes longer than the
    product. Converted in blocks of some rows of the kernel, the floats stay in the cache.
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


def _of_tile(field, left, right):
    """The part of a gradient that a tile adds."""
    if field == "bias":
        return ops.sum(ops.cast(right, "float32"), axis=0)
    # On CPUs XLA computes A^T B at half the speed where A is wider than B. Such gradients are
    # summed transposed. Transposing the sum costs less than transposing each part.
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
    a mean group costs `(mean / L + 1 / 2) * (L + 8)`, the least at `4 * sqrt(mean)`; measured, no
    other power of two was more than 5% faster. There is one length only, as each is compiled.

    From 128 rows on no tile holds more than an eighth of them: some seven intermediate values of a
    tile exist at once in the backward pass, most of the memory where experts are few. The number of
    rows is a tensor where it is not known at compile time.
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
