"""Driver of a grouped operation that takes rows in blocks of fixed sizes.

For compilers that fix every shape. A few sizes of blocks are compiled, a loop with a dynamic trip
count stands for each, and a group is covered by blocks of falling size. A block may reach past the
end of its group. There it reads zeros, or ones as pre-activations, and what it writes is either
overwritten by the next group, or lies behind the last one, where nobody looks.
"""

import functools
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.ops.groups import row_sums

# What a block costs besides its rows, in rows: its kernels are read and the sums of their gradients
# read and written. Measured 25 on a CPU for kernels of 256 x 1024, and more for larger ones.
BLOCK_OVERHEAD = 24


def forward(step, tokens, kernels, biases, groups, keep):
    dtype = backend.block_dtype(tokens.dtype)

    def group(expert, for_each_block, carry):
        projections = _projections(kernels, biases, expert, dtype)

        def block(block, carry):
            output, saved = step.forward(block.gather(tokens), projections)
            return tuple(map(block.write, carry, (output, *(saved if keep else ()))))

        return for_each_block(block, carry)

    widths = (step.output_width, *(step.saved_widths if keep else ()))
    num_rows = _num_rows_with_room(groups)
    carry = tuple(ops.zeros((num_rows, width), dtype) for width in widths)
    output, *saved = _for_each_group(groups, dtype, group, carry)
    return output, saved


def backward(step, tokens, row_weights, kernels, biases, groups, outputs, saved, gradient):
    dtype = backend.block_dtype(tokens.dtype)
    num_rows = _num_rows_with_room(groups)
    room = num_rows - ops.shape(row_weights)[0]
    padded_weights = ops.expand_dims(ops.pad(row_weights, (0, room)), 1)

    def group(expert, for_each_block, carry):
        projections = _projections(kernels, biases, expert, dtype)

        def block(block, carry):
            row_gradients, weight_gradients, kernel_gradients, bias_gradients = carry
            output_gradient = block.gather(gradient)
            row_gradient, factors = step.backward(
                block.gather(tokens),
                projections,
                # Not zeros: there an activation may have no slope, and NaN times 0 is NaN.
                [block.read(buffer, past_end=1.0) for buffer in saved],
                output_gradient * block.read(padded_weights),
            )
            weight_gradient = row_sums(output_gradient, block.read(outputs))
            return (
                block.write(row_gradients, row_gradient),
                block.write(weight_gradients, weight_gradient),
                [
                    _add_at(total, expert, _narrow_first(*pair))
                    for total, pair in zip(kernel_gradients, factors)
                ],
                [
                    _add_at(total, expert, _column_sums(right))
                    for total, (_, right) in zip(bias_gradients, factors)
                ],
            )

        return for_each_block(block, carry)

    row_gradient, weight_gradient, kernel_gradients, bias_gradients = _for_each_group(
        groups,
        dtype,
        group,
        (
            ops.zeros((num_rows, tokens.shape[1]), dtype),
            ops.zeros((num_rows, 1), "float32"),
            [ops.zeros(_narrow_shape(kernel), "float32") for kernel in kernels],
            [ops.zeros(bias.shape, "float32") for bias in biases],
        ),
    )
    return (
        row_gradient,
        weight_gradient[:, 0],
        *(
            ops.cast(_upright(total, kernel), kernel.dtype)
            for total, kernel in zip(kernel_gradients, kernels)
        ),
        *(ops.cast(total, bias.dtype) for total, bias in zip(bias_gradients, biases)),
    )


class _Projection(NamedTuple):
    """The affine map of one expert."""

    kernel: Any
    bias: Any

    def __call__(self, rows):
        product = ops.matmul(rows, self.kernel)
        return product if self.bias is None else product + self.bias

    def pull(self, gradient):
        return ops.matmul(gradient, ops.transpose(self.kernel))


def _projections(kernels, biases, expert, dtype):
    """The maps of one expert, converted where they are used: most of many experts may not be."""

    def of_expert(parameter):
        return ops.cast(_at(parameter, expert), dtype)

    return [
        _Projection(of_expert(kernel), None if bias is None else of_expert(bias))
        for kernel, bias in zip_longest(kernels, biases)
    ]


class _Block(NamedTuple):
    """Some rows of one group: `length` is static, other numbers may depend on data.

    All that is read has the `dtype` that is computed in.
    """

    start: Any
    length: int
    inside: Any
    token_of_row: Any
    dtype: str

    def gather(self, tokens):
        """The tokens of the rows, zeros past the end of the group."""
        return self._mask(backend.gather_rows(tokens, self.token_of_row), 0.0)

    def read(self, buffer, past_end=0.0):
        """The rows of a buffer, `past_end` past the end of the group."""
        rows = backend.slice_at(buffer, (self.start, 0), (self.length, buffer.shape[1]))
        return self._mask(rows, past_end)

    def write(self, buffer, rows):
        return ops.slice_update(buffer, (self.start, 0), rows)

    def _mask(self, rows, past_end):
        return ops.where(
            self.inside, ops.cast(rows, self.dtype), ops.full((), past_end, self.dtype)
        )


# On CPUs XLA computes A^T B at half the speed where A is wider than B. Such gradients are summed
# transposed. Exchanging the axes of the sums costs less than exchanging those of each part.


def _narrow_first(*factors):
    left, right = sorted(factors, key=lambda rows: rows.shape[1])
    return ops.matmul(ops.transpose(left), right)


def _narrow_shape(kernel):
    experts, *shape = kernel.shape
    return experts, *sorted(shape)


def _column_sums(values):
    return ops.sum(ops.cast(values, "float32"), axis=0)


def _upright(total, kernel):
    return total if total.shape == kernel.shape else ops.transpose(total, (0, 2, 1))


def _for_each_group(groups, dtype, group, carry):
    """`carry = group(expert, for_each_block, carry)` for every expert that has rows."""
    ends = ops.cumsum(groups.sizes)
    # Reading the kernels of an expert costs as much as a few rows. For a few tokens, as in
    # decoding, most experts have none.
    has_rows = groups.sizes > 0
    busy_first = ops.argsort(ops.logical_not(has_rows))
    lengths = _block_sizes(groups)
    token_of_row = ops.pad(groups.token_of_row(), (0, lengths[-1]))

    def body(number, carry):
        expert = ops.cast(ops.take(busy_first, number), "int32")
        size = ops.take(groups.sizes, expert)
        group_start = ops.take(ends, expert) - size

        def for_each_block(compute, carry):
            def at(offset, length, carry):
                start = group_start + offset
                inside = ops.expand_dims(ops.arange(length, dtype="int32") < size - offset, 1)
                tokens = backend.slice_at(token_of_row, (start,), (length,))
                return compute(_Block(start, length, inside, tokens, dtype), carry)

            return _cover(size, lengths, at, carry)

        return group(expert, for_each_block, carry)

    return ops.fori_loop(0, ops.sum(ops.cast(has_rows, "int32")), body, carry)


def block_sizes(num_rows, num_experts):
    """The sizes of blocks, smallest first.

    Each is compiled, forward and backward, so there are few: one that holds a mean group, one of
    three quarters of it, for groups around the mean, and for what is left one of an eighth, down to
    a power of two. Below 4 rows a product is bound by reading its kernel; from 32 on smaller blocks
    gain nothing, nor do larger ones from 512 on.

    Args:
        num_rows: an integer, or a tensor where it is not known at compile time.
        num_experts: an integer.
    """
    mean = num_rows // num_experts if isinstance(num_rows, int) else 256
    smallest = 2 ** min(max((mean // 8).bit_length() - 1, 2), 5)
    largest = max(-(-min(mean, 512) // smallest), 8) * smallest
    return smallest, 3 * largest // 4 // smallest * smallest, largest


def _block_sizes(groups):
    return block_sizes(groups.num_rows(), groups.sizes.shape[0])


def _num_rows_with_room(groups):
    """The rows of all groups, and room behind them for a block that reaches past the last."""
    return groups.num_rows() + _block_sizes(groups)[-1]


def _cover(size, lengths, block, carry):
    """`carry = block(offset, length, carry)` for blocks of falling length that cover the rows."""
    longest = lengths[-1]
    # Near its end even a long group may be cheaper without the longest block.
    num_longest = ops.maximum(size // longest - 2, 0)
    rest = size - num_longest * longest
    start = 0
    covers = cheapest_covers(lengths, BLOCK_OVERHEAD)
    for length, trips_by_rest in zip(reversed(lengths), reversed(covers)):
        trips = ops.take(ops.convert_to_tensor(trips_by_rest), rest)
        if length == longest:
            trips = trips + num_longest
        # The offset depends on `i` even where `i` is always 0: XLA hoists what does not depend on
        # the loop out of it, and would compute the blocks of all sizes.
        carry = ops.fori_loop(
            0,
            trips,
            lambda i, carry, start=start, length=length: block(start + i * length, length, carry),
            carry,
        )
        start = start + trips * length
    return carry


@functools.lru_cache
def cheapest_covers(lengths, overhead):
    """How many blocks of each length cover a number of rows at the least cost.

    Args:
        lengths: tuple of the lengths of blocks, shortest first.
        overhead: what a block costs besides its rows, in rows.

    Returns:
        (number of lengths, 3 * longest length) int32: how many blocks of each length for 0 rows,
        for 1 row and so on.
    """
    costs: list = [0]
    covers: list = [np.zeros(len(lengths), "int32")]
    for rows in range(1, 3 * lengths[-1]):
        cost, last = min(
            (costs[max(rows - length, 0)] + length + overhead, number)
            for number, length in enumerate(lengths)
        )
        cover = covers[max(rows - lengths[last], 0)].copy()
        cover[last] += 1
        costs.append(cost)
        covers.append(cover)
    return np.stack(covers, axis=1)


def _at(stacked, expert):
    """Entry `expert` of a tensor (E, ...)."""
    start = (expert, *[0] * (len(stacked.shape) - 1))
    return ops.squeeze(backend.slice_at(stacked, start, (1, *stacked.shape[1:])), 0)


def _add_at(stacked, expert, part):
    """Add to entry `expert` of a tensor (E, ...), in place under XLA."""
    start = (expert, *[0] * (len(stacked.shape) - 1))
    total = _at(stacked, expert) + ops.cast(part, stacked.dtype)
    return ops.slice_update(stacked, start, ops.expand_dims(total, 0))
