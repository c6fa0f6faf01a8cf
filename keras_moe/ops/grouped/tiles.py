"""Engine that loops over tiles of rows, for XLA on CPUs.

A few sizes of tiles are compiled, each with a loop of its own whose trips depend on the data, and a
group is covered by tiles of falling size. A tile may overrun its group: reads are masked, with
zeros, or ones as pre-activations; writes are overwritten by the next group or land in padding.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.grouped import blocks, tile_sizes
from keras_moe.ops.grouped.records import Gradients, Parameters, Quantized
from keras_moe.ops.grouped.steps import products_of
from keras_moe.ops.groups import row_sums


def supports(setting):
    return setting.static_shapes


def tile_dtype(setting):
    """What tiles are computed in.

    For products of narrow floats XLA on CPUs converts each operand to float32, and rounds each
    result. So a whole tile is computed in float32 there, at least.
    """
    narrow = setting.dtype in ("bfloat16", "float16")
    return "float32" if narrow and setting.platform == "cpu" else setting.dtype


class _ForwardCarry(NamedTuple):
    """What the loop over tiles writes: the outputs of all rows, and what is saved of them."""

    outputs: Any
    saved: list


class _BackwardCarry(NamedTuple):
    """What the loop over tiles writes and sums in the backward pass."""

    row_gradients: Any
    weight_gradients: Any
    kernel_gradients: list
    bias_gradients: list


def forward(setting, step, tokens, parameters, groups, keep):
    layout = _Layout(groups, tile_dtype(setting))

    def compute(tile, products, carry):
        outputs, saved = step.forward(tile.gather(tokens), products, keep)
        return _ForwardCarry(
            tile.write(carry.outputs, outputs), list(map(tile.write, carry.saved, saved))
        )

    buffers = _ForwardCarry(
        layout.buffer(step.output_width),
        [layout.buffer(width) for width in (step.saved_widths if keep else ())],
    )
    return tuple(layout.for_each_tile(parameters, compute, buffers))


def backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient):
    layout = _Layout(groups, tile_dtype(setting))
    padded_weights = ops.expand_dims(ops.pad(row_weights, (0, layout.padding)), 1)

    def compute(tile, products, carry):
        output_gradient = tile.gather(gradient)
        row_gradient, factors = step.backward(
            tile.gather(tokens),
            products,
            # Not zeros, where an activation may have no derivative: NaN times 0 is NaN.
            [tile.read(buffer, past_end=1.0) for buffer in saved],
            output_gradient * tile.read(padded_weights),
        )
        weight_gradient = row_sums(output_gradient, tile.read(outputs))
        return _BackwardCarry(
            tile.write(carry.row_gradients, row_gradient),
            tile.write(carry.weight_gradients, weight_gradient),
            [
                tile.add_to_expert(total, _narrow_first(*pair))
                for total, pair in zip(
                    carry.kernel_gradients, parameters.factors_of_kernels(factors)
                )
            ],
            [
                tile.add_to_expert(total, _column_sums(right))
                for total, (_, right) in zip(carry.bias_gradients, factors)
            ],
        )

    sums = layout.for_each_tile(
        parameters,
        compute,
        _BackwardCarry(
            layout.buffer(tokens.shape[1]),
            ops.zeros((layout.num_rows, 1), "float32"),
            [ops.zeros(_narrow_shape(kernel), "float32") for kernel in parameters.kernels],
            [ops.zeros(bias.shape, "float32") for bias in parameters.biases],
        ),
    )
    return Gradients(
        sums.row_gradients,
        groups.at_assignments(sums.weight_gradients[:, 0]),
        Parameters(
            [
                ops.cast(_upright(total, kernel), kernel.dtype)
                for total, kernel in zip(sums.kernel_gradients, parameters.kernels)
            ],
            [
                ops.cast(total, bias.dtype)
                for total, bias in zip(sums.bias_gradients, parameters.biases)
            ],
        ),
    )


class _Layout:
    """Where groups and tiles lie; sizes are computed once for a pass.

    Behind the rows of all groups is padding for a tile that overruns the last one.
    """

    def __init__(self, groups, dtype):
        self.dtype = dtype
        self.sizes = groups.sizes
        self.tile_sizes = tile_sizes.tile_sizes(groups.num_rows(), groups.sizes.shape[0])
        self.padding = self.tile_sizes[-1]
        self.has_few_rows = blocks.are_few(groups.num_rows())
        self.num_rows = groups.num_rows() + self.padding
        self._ends = ops.cumsum(groups.sizes)
        self._token_of_row = ops.pad(groups.token_of_row(), (0, self.padding))

    def buffer(self, width):
        """Zeros for all rows."""
        return ops.zeros((self.num_rows, width), self.dtype)

    def for_each_tile(self, parameters, compute, carry):
        """`carry = compute(tile, products, carry)` for the tiles of every expert with rows."""
        # Reading the kernels of an expert costs as much as a few rows. For a few tokens, as in
        # decoding, most experts have none.
        has_rows = self.sizes > 0
        busy_first = ops.argsort(ops.logical_not(has_rows))

        def group(number, carry):
            expert = ops.cast(ops.take(busy_first, number), "int32")
            products = _products(parameters, expert, self.dtype, self.has_few_rows)
            size = ops.take(self.sizes, expert)
            group_start = ops.take(self._ends, expert) - size

            def at(offset, length, carry):
                start = group_start + offset
                inside = ops.expand_dims(ops.arange(length, dtype="int32") < size - offset, 1)
                tokens = backend.slice_at(self._token_of_row, (start,), (length,))
                tile = _Tile(expert, start, length, inside, tokens, self.dtype)
                return compute(tile, products, carry)

            return _cover(size, self.tile_sizes, at, carry)

        return ops.fori_loop(0, ops.sum(ops.cast(has_rows, "int32")), group, carry)


class _Tile(NamedTuple):
    """Some rows of one expert: `length` is static, other numbers depend on data.

    Everything that is read has the `dtype` that is computed in.
    """

    expert: Any
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

    def add_to_expert(self, stacked, part):
        """Add to the expert's entry of a tensor (E, ...), in place under XLA."""
        total = _at(stacked, self.expert) + ops.cast(part, stacked.dtype)
        return ops.slice_update(stacked, _start(stacked, self.expert), ops.expand_dims(total, 0))

    def _mask(self, rows, past_end):
        return ops.where(
            self.inside, ops.cast(rows, self.dtype), ops.full((), past_end, self.dtype)
        )


def _products(parameters, expert, dtype, has_few_rows):
    """Products with the kernels of one expert. Cast per expert on use: idle ones are never cast."""

    def of_expert(parameter):
        return _at(parameter, expert)

    weights = parameters.take(of_expert, dtype)

    def project(rows, number):
        kernel, bias = weights.of(number)
        of_all = parameters.all_kernels[number]
        if has_few_rows and isinstance(of_all, Quantized):
            product = blocks.multiply(rows, of_all.values, expert)
            product = product * ops.cast(of_expert(of_all.scale), dtype)
        else:
            product = ops.matmul(rows, kernel)
        return product if bias is None else product + bias

    def pull(gradient, number):
        return ops.matmul(gradient, ops.transpose(weights.all_kernels[number]))

    return products_of(project, pull)


# On CPUs XLA computes A^T B at half the speed where A is wider than B. Such gradients are summed
# transposed. Exchanging the axes of the sums costs less than exchanging those of each part.


def _narrow_first(*factors):
    left, right = sorted(factors, key=lambda rows: rows.shape[1])
    return ops.matmul(ops.transpose(left), right)


def _narrow_shape(kernel):
    experts, *shape = kernel.shape
    return experts, *sorted(shape)


def _upright(total, kernel):
    return total if total.shape == kernel.shape else ops.transpose(total, (0, 2, 1))


def _column_sums(values):
    return ops.sum(ops.cast(values, "float32"), axis=0)


def _cover(size, lengths, compute_at, carry):
    """`carry = compute_at(offset, length, carry)` for tiles of falling length that cover rows."""
    longest = lengths[-1]
    # Near its end even a long group may be cheaper without the longest tile.
    num_longest = ops.maximum(size // longest - 2, 0)
    rest = size - num_longest * longest
    start = 0
    covers = tile_sizes.cheapest_covers(lengths, tile_sizes.TILE_OVERHEAD)
    for length, trips_by_rest in zip(reversed(lengths), reversed(covers)):
        trips = ops.take(ops.convert_to_tensor(trips_by_rest), rest)
        if length == longest:
            trips = trips + num_longest
        # The offset depends on `i` even where `i` is always 0: XLA hoists what does not depend on
        # the loop out of it, and would compute the tiles of all sizes.
        carry = ops.fori_loop(
            0,
            trips,
            lambda i, carry, start=start, length=length: compute_at(
                start + i * length, length, carry
            ),
            carry,
        )
        start = start + trips * length
    return carry


def _at(stacked, expert):
    """Entry `expert` of a tensor (E, ...)."""
    part = backend.slice_at(stacked, _start(stacked, expert), (1, *stacked.shape[1:]))
    return ops.squeeze(part, 0)


def _start(stacked, expert):
    return (expert, *[0] * (len(stacked.shape) - 1))
