"""Grouped products as batched products of padded tiles.

Each tile has a copy of its expert's kernel. All operations are `keras.ops` with derivatives of any
order. Shapes are static where the number of rows is. Axes: R rows, E experts, N tiles of B rows.
"""

from typing import Any, NamedTuple

from keras import ops


def product(rows, kernels, sizes, transposed=False, platform=None):
    """Multiply each group of rows (R, D) by its kernel (E, D, H), or its transpose: (R, H)."""
    tiles = _pad_tiles(rows, sizes, platform)
    expert = ops.minimum(tiles.expert, sizes.shape[0] - 1)
    values = kernels.apply(lambda stack: ops.take(stack, expert, axis=0)).floats(rows.dtype)
    values = ops.transpose(values, (0, 2, 1)) if transposed else values
    return tiles.join(ops.matmul(tiles.cut(rows), values))


def outer(left, right, sizes, dtype, platform=None):
    """Return `left^T right` of each group, (E, D, H), for (R, D) and (R, H), summed in float32."""
    num_experts, tiles = sizes.shape[0], _pad_tiles(left, sizes, platform)
    parts = ops.matmul(ops.transpose(tiles.cut(left), (0, 2, 1)), tiles.cut(right))
    parts = ops.cast(parts, "float32")
    # Empty tiles are summed into a spare expert.
    return ops.cast(ops.segment_sum(parts, tiles.expert, num_experts + 1)[:num_experts], dtype)


def tile_length(num_rows, num_experts, platform=None):
    """Return the number of rows of a tile, a power of two.

    A tile costs about `overhead` rows more than it has, as its kernel is read and gradients are
    summed, and the last tile of a group is half padding. So a mean group in tiles of B rows costs
    `(mean / B + 1 / 2) * (B + overhead)`, the least at `B = sqrt(2 * overhead * mean)`. Memory is
    slow relative to products on accelerators: there a kernel costs about 120 rows.
    """
    if platform == "cpu":  # with at least 8 tiles, to save memory
        overhead, num_experts, shortest, longest = 8, max(num_experts, 8), 4, 256
    else:
        overhead, shortest, longest = 120, 8, 512
    mean = num_rows / num_experts if isinstance(num_rows, int) else 256
    # The power of two that is nearest in ratio.
    length = 2 ** (round((4 * overhead * mean) ** 0.5).bit_length() - 1)
    return min(max(length, shortest), longest)


def most_tiles(num_rows, num_experts, length):
    """Return the largest number of tiles that groups of R rows together can need, at least 1."""
    if not isinstance(num_rows, int):
        return num_rows // length + num_experts
    # They need most where each group has a row, and further rows fill tiles.
    num_groups = min(num_experts, num_rows)
    return max((num_rows - num_groups) // length + num_groups, 1)


def _pad_tiles(rows, sizes, platform):
    num_rows = ops.shape(rows)[0]
    return pad_tiles(sizes, num_rows, tile_length(num_rows, sizes.shape[0], platform))


class PaddedTiles(NamedTuple):
    """The place of each row in the tiles."""

    expert: Any  # (N,) int32, of each tile, E where a tile is empty
    row: Any  # (N, B) int32, at each place, 0 at padding
    inside: Any  # (N, B) bool, False at padding
    place_of_row: Any  # (R,) int32, counted over all tiles, 0 past the last group
    is_served: Any  # (R,) bool, False past the last group

    def cut(self, rows, padding=0):
        """Cut rows (R, ...) into tiles (N, B, ...), with a given number as padding."""
        if rows.shape[0] == 0:  # Every place of a tile reads a row.
            rows = ops.pad(rows, ((0, 1), *[(0, 0)] * (len(rows.shape) - 1)))
        return _where(self.inside, ops.take(rows, self.row, axis=0), padding)

    def join(self, tiles):
        """Join tiles (N, B, ...) to rows (R, ...), with zeros past the last group."""
        flat = ops.reshape(tiles, (-1, *tiles.shape[2:]))
        return _where(self.is_served, ops.take(flat, self.place_of_row, axis=0))


def pad_tiles(sizes, num_rows, length):
    """Return the `PaddedTiles` of `length` rows for groups of sizes (E,) int32.

    There is one tile at least: XLA of TensorFlow differentiates no loop of length 0.
    """
    num_experts = sizes.shape[0]
    num_tiles = most_tiles(num_rows, num_experts, length)
    tiles_of_expert = (sizes + length - 1) // length
    last_tiles, ends = ops.cumsum(tiles_of_expert), ops.cumsum(sizes)
    first_tiles, starts = last_tiles - tiles_of_expert, ends - sizes

    tile = ops.arange(num_tiles, dtype="int32")
    expert = interval(tile, last_tiles)
    known = ops.minimum(expert, num_experts - 1)
    first_row = ops.take(starts, known) + (tile - ops.take(first_tiles, known)) * length
    row = ops.expand_dims(first_row, 1) + ops.arange(length, dtype="int32")
    is_full = ops.expand_dims(expert < num_experts, 1)
    inside = (row < ops.expand_dims(ops.take(ends, known), 1)) & is_full

    number = ops.arange(num_rows, dtype="int32")
    expert_of_row = interval(number, ends)
    known = ops.minimum(expert_of_row, num_experts - 1)
    place = ops.take(first_tiles, known) * length + number - ops.take(starts, known)
    is_served = expert_of_row < num_experts
    row, place = ops.where(inside, row, 0), ops.where(is_served, place, 0)
    return PaddedTiles(expert, row, inside, place, is_served)


def interval(values, ends):
    """Return the interval of each value: the number of `ends` at or below it."""
    return ops.sum(ops.cast(ends <= ops.expand_dims(values, -1), "int32"), axis=-1)


def _where(condition, values, other=0):
    axes = range(len(condition.shape), len(values.shape))
    other = ops.cast(other, values.dtype)
    return ops.where(ops.expand_dims(condition, list(axes)), values, other)
