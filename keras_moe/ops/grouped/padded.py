"""Engine without a loop: one batched product over padded tiles, each with a copy of its kernel.

For XLA on devices that wait for the host, or run one product at a time, at each trip of a loop.
A tile that is not full has padding. Axes: R rows, E experts, N tiles of B rows.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.assignments import ceil_divide
from keras_moe.ops.grouped.steps import products_of
from keras_moe.ops.groups import row_sums


def supports(setting):
    return setting.static_shapes and setting.platform != "cpu"


def tile_length(num_rows, num_experts):
    """Rows of a tile, a power of two.

    With B rows a tile, up to E * B rows are computed in vain, and R / B kernels are copied, two
    bytes for each weight. Where a byte of memory costs as much as 240 multiplications and
    additions, as on today's accelerators, both cost the least together at B = sqrt(480 * R / E).
    The number of rows is a tensor where it is not known at compile time.
    """
    mean = num_rows / num_experts if isinstance(num_rows, int) else 256
    return 2 ** min(max(round((480 * mean) ** 0.5).bit_length() - 1, 3), 9)


def forward(setting, step, tokens, parameters, groups, keep):
    tiles = _tiles(groups)
    rows = tiles.cut(backend.gather_rows(tokens, groups.token_of_row()))
    outputs, saved = step.forward(rows, _products(parameters, tiles, setting.dtype), keep)
    return tiles.join(outputs), saved


def backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient):
    tiles = _tiles(groups)
    token_of_row = groups.token_of_row()
    output_gradient = backend.gather_rows(gradient, token_of_row)
    scaled = output_gradient * ops.cast(ops.expand_dims(row_weights, 1), setting.dtype)
    row_gradient, factors = step.backward(
        tiles.cut(backend.gather_rows(tokens, token_of_row)),
        _products(parameters, tiles, setting.dtype),
        saved,
        tiles.cut(scaled),
    )
    return (
        tiles.join(row_gradient),
        groups.at_assignments(row_sums(output_gradient, outputs)[:, 0]),
        [
            {
                name: _sum_by_expert(tiles, _OF_TILES[name](*pair), parameter)
                for name, parameter in trained.items()
            }
            for trained, pair in zip(parameters.trained, factors)
        ],
    )


def _tiles(groups):
    num_rows, num_experts = groups.num_rows(), groups.sizes.shape[0]
    return pad_tiles(groups.sizes, num_rows, tile_length(num_rows, num_experts))


def _products(parameters, tiles, dtype):
    expert = ops.minimum(tiles.expert, parameters.num_experts - 1)
    projections = parameters.take(lambda weights: backend.gather_rows(weights, expert), dtype)

    def project(rows, number):
        kernel, bias, _ = projections[number]
        product = ops.matmul(rows, kernel)
        if bias is not None:
            product = product + ops.expand_dims(bias, 1)
        # Not zeros, where an activation may have no derivative: NaN times 0 is NaN.
        return tiles.fill(product, 1.0)

    def pull(gradient, number):
        return ops.matmul(gradient, ops.transpose(projections[number].kernel, (0, 2, 1)))

    return products_of(project, pull)


# The gradients of each tile, float32, from the tiles (N, B, D) that were multiplied and the
# gradients (N, B, H) of their products.
_OF_TILES = {
    "kernel": lambda left, right: backend.batched_product(ops.transpose(left, (0, 2, 1)), right),
    "bias": lambda left, right: ops.sum(ops.cast(right, "float32"), axis=1),
}


def _sum_by_expert(tiles, parts, parameter):
    # Empty tiles are summed into a spare expert.
    num_experts = parameter.shape[0]
    totals = ops.segment_sum(parts, tiles.expert, num_experts + 1)[:num_experts]
    return ops.cast(totals, parameter.dtype)


class PaddedTiles(NamedTuple):
    """Which rows are where. All shapes are fixed, whatever the loads.

    - `expert` (N,) int32: the expert of each tile, E where a tile is empty.
    - `row` (N, B) int32: the row at each place, 0 at padding.
    - `inside` (N, B) bool: False at padding.
    - `place_of_row` (R,) int32: the place of each row, counted over all tiles, 0 for rows past the
      last group.
    - `is_served` (R,) bool: False for rows past the last group.
    """

    expert: Any
    row: Any
    inside: Any
    place_of_row: Any
    is_served: Any

    def cut(self, rows):
        """Tiles (N, B, ...) of rows (R, ...), zeros at padding."""
        return _where(self.inside, backend.gather_rows(rows, self.row))

    def fill(self, tiles, value):
        """Tiles (N, B, H) with a value at padding."""
        inside = ops.expand_dims(self.inside, 2)
        return ops.where(inside, tiles, ops.cast(value, tiles.dtype))

    def join(self, tiles):
        """Rows (R, ...) of tiles (N, B, ...), zeros past the last group."""
        flat = ops.reshape(tiles, (-1, *tiles.shape[2:]))
        return _where(self.is_served, backend.gather_rows(flat, self.place_of_row))


def pad_tiles(sizes, num_rows, length):
    """The `PaddedTiles` of B rows of consecutive groups, whose sizes are (E,) int32.

    There are `R // B + E` tiles at most, and never more than rows, where their number is known.
    """
    num_experts = sizes.shape[0]
    num_tiles = num_rows // length + num_experts
    if isinstance(num_rows, int):
        num_tiles = min(num_rows, num_tiles)
    tiles_of_expert = ceil_divide(sizes, length)
    last_tiles, ends = ops.cumsum(tiles_of_expert), ops.cumsum(sizes)
    first_tiles, starts = last_tiles - tiles_of_expert, ends - sizes

    tile = ops.arange(num_tiles, dtype="int32")
    expert = _interval(tile, last_tiles)
    known = ops.minimum(expert, num_experts - 1)
    first_row = ops.take(starts, known) + (tile - ops.take(first_tiles, known)) * length
    row = ops.expand_dims(first_row, 1) + ops.arange(length, dtype="int32")
    inside = ops.logical_and(
        row < ops.expand_dims(ops.take(ends, known), 1), ops.expand_dims(expert < num_experts, 1)
    )

    number = ops.arange(num_rows, dtype="int32")
    expert_of_row = _interval(number, ends)
    known = ops.minimum(expert_of_row, num_experts - 1)
    place = ops.take(first_tiles, known) * length + number - ops.take(starts, known)
    is_served = expert_of_row < num_experts
    return PaddedTiles(
        expert, ops.where(inside, row, 0), inside, ops.where(is_served, place, 0), is_served
    )


def _interval(values, ends):
    """For each value the number of `ends` at or below it: the interval it lies in."""
    below = ops.expand_dims(ends, 0) <= ops.expand_dims(values, 1)
    return ops.sum(ops.cast(below, "int32"), axis=1)


def _where(condition, values):
    axes = range(len(condition.shape), len(values.shape))
    return ops.where(ops.expand_dims(condition, list(axes)), values, ops.zeros((), values.dtype))
