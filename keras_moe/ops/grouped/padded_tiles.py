"""Rows cut into a fixed number of tiles of one expert each; what is missing in a tile is padding.

Axes: R rows, E experts, N tiles of B rows.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe.backend import backend


class PaddedTiles(NamedTuple):
    """Which rows are where. All shapes are fixed, whatever the loads.

    - `expert` (N,) int32: the expert of each tile, E where a tile is empty.
    - `row` (N, B) int32: the row at each place, 0 at padding.
    - `inside` (N, B) bool: False at padding.
    - `place_of_row` (R,) int32: the place of each row, counted over all tiles, 0 for rows behind
      the last group.
    - `is_served` (R,) bool: False for rows behind the last group.
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
        """Rows (R, ...) of tiles (N, B, ...), zeros behind the last group."""
        flat = ops.reshape(tiles, (-1, *tiles.shape[2:]))
        return _where(self.is_served, backend.gather_rows(flat, self.place_of_row))


def pad_tiles(sizes, num_rows, length):
    """The `PaddedTiles` of groups that stand one behind another.

    There are `R // B + E` tiles at most, and never more than rows, where their number is known.

    Args:
        sizes: (E,) int32.
        num_rows: R.
        length: B, an integer.
    """
    num_experts = sizes.shape[0]
    num_tiles = num_rows // length + num_experts
    if isinstance(num_rows, int):
        num_tiles = min(num_rows, num_tiles)
    tiles_of_expert = (sizes + length - 1) // length
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
