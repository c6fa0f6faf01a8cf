"""Sizes of the tiles of TPU kernels, from static shapes and dtypes."""

from typing import NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Registers are 128 lanes wide, and rows of a narrow dtype share them in groups of up to 16.
_LANES, _SUBLANES = 128, 16
_HEIGHTS = (512, 256, 128)
# Cost of one step of the grid, as memory traffic: about a third of a microsecond.
_STEP_BYTES = 300_000
# Multiplications of numbers in one straight piece of program. They are some thousand instructions.
_UNROLLED = 2**28


class Chip(NamedTuple):
    """Fast memory (VMEM) in bytes, and the cores that share a kernel's grid."""

    vmem: int
    cores: int


class Tiles(NamedTuple):
    """Rows, depth (of a product: the contracted axis) and columns of a tile, and their parts.

    At once are computed: `strip` rows where a group covers them, `border` rows where it does not,
    chunks of the columns and, in kernel gradients, chunks of the depth.
    """

    rows: int
    depth: int
    columns: int
    strip: int
    border: int
    depth_chunk: int
    column_chunk: int


def this_chip():
    """The chip that a program is made for; the least of all chips if nothing tells.

    A process with a TPU tells, or a mesh with an abstract device in which a program is lowered.
    """
    try:
        info = pltpu.get_tpu_info()
    except (AttributeError, ValueError):
        return Chip(16 * 2**20, 2)
    return Chip(min(info.vmem_capacity_bytes, 64 * 2**20), info.num_cores)


def product_tiles(shape, row_bytes, kernel_bytes, *, num_kernels, num_planes, num_groups, chip):
    """Tiles of (R, D) times `num_kernels` kernels (D, H), with `num_planes` (R, H) moved.

    Of those that fit the cheapest ones: rows are read once for each tile of columns, and
    kernels once if a tile has their whole depth, otherwise at each visit.
    """
    num_rows, depth, columns = shape

    def cost(tiles):
        visits = pl.cdiv(num_rows, tiles.rows) + num_groups - 1
        column_tiles, steps = pl.cdiv(columns, tiles.columns), pl.cdiv(depth, tiles.depth)
        kernel_reads = num_groups if steps == 1 else visits
        return _slowness(tiles.rows, column_tiles, chip) * (
            column_tiles * num_rows * depth * row_bytes
            + kernel_reads * num_kernels * depth * columns * kernel_bytes
            + visits * column_tiles * steps * _STEP_BYTES
        )

    def vmem(tiles):
        depth_lanes, column_lanes = _lanes(tiles)
        kernel, plane = num_kernels * depth_lanes * column_lanes, tiles.rows * column_lanes
        moved = (tiles.rows * depth_lanes + num_planes * plane) * row_bytes + kernel * kernel_bytes
        sums = num_kernels * plane * 4 if tiles.depth < depth else 0
        values = (num_kernels + num_planes) * tiles.strip * tiles.column_chunk * 4
        # Factors in float32 are cut into three narrow parts, which are multiplied.
        factors = (tiles.strip + _round_up(tiles.column_chunk, _LANES)) * depth_lanes
        parts = 3 * 2 * factors if row_bytes == 4 else 0
        return 2 * moved + kernel * row_bytes + sums + values + parts

    def choices():
        for height, depth_tile, column_tile in _choices(shape):
            strip = min(height, 256)
            most = _UNROLLED // (strip * depth_tile * _passes(row_bytes))
            yield Tiles(
                height,
                depth_tile,
                column_tile,
                strip,
                min(height, 128),
                depth_tile,
                _chunk(column_tile, most),
            )

    return min((tiles for tiles in choices() if vmem(tiles) <= _usable(chip)), key=cost)


def gradient_tiles(shape, row_bytes, gradient_bytes, *, num_lefts, chip):
    """Tiles of `num_lefts` arrays (R, D) and of (R, H), whose product is summed for each group.

    Of those that fit the cheapest ones: rows of each side are read once for each tile of
    the other.
    """
    num_rows, depth, columns = shape

    def cost(tiles):
        depth_tiles, column_tiles = pl.cdiv(depth, tiles.depth), pl.cdiv(columns, tiles.columns)
        read = (num_lefts * depth * column_tiles + columns * depth_tiles) * num_rows * row_bytes
        steps = pl.cdiv(num_rows, tiles.rows) * depth_tiles * column_tiles
        slowness = _slowness(tiles.rows, depth_tiles * column_tiles, chip)
        return slowness * (read + steps * _STEP_BYTES)

    def vmem(tiles):
        depth_lanes, column_lanes = _lanes(tiles)
        rows = tiles.rows * (num_lefts * depth_lanes + column_lanes) * row_bytes
        plane = depth_lanes * column_lanes
        sums = 4 * plane if gradient_bytes < 4 else 0
        # The parts of rows that are multiplied take as much again.
        return 2 * (rows + plane * gradient_bytes) + rows * _passes(row_bytes) + sums

    def choices():
        for height, depth_tile, column_tile in _choices(shape):
            most = _UNROLLED // (height * _passes(row_bytes))
            column_chunk = _chunk(column_tile, 1024)
            yield Tiles(
                height,
                depth_tile,
                column_tile,
                height,
                min(height, 128),
                _chunk(depth_tile, most // column_chunk),
                column_chunk,
            )

    return min((tiles for tiles in choices() if vmem(tiles) <= _usable(chip)), key=cost)


def _choices(shape):
    num_rows, depth, columns = shape
    heights = [h for h in _HEIGHTS if h < 2 * num_rows] or [_round_up(num_rows, _SUBLANES)]
    return [(h, d, c) for h in heights for d in _cuts(depth) for c in _cuts(columns)]


def _cuts(length):
    """The whole axis, and even numbers of tiles of whole registers."""
    counts = range(2, pl.cdiv(length, _LANES) + 1, 2)
    return [length, *{_round_up(pl.cdiv(length, count), _LANES) for count in counts}]


def _chunk(length, most):
    """The whole axis if it is short, otherwise its largest part of whole registers, or nearly."""
    if length <= most or length % _LANES:
        return length
    # Short chunks leave a part of the matrix unit idle: of two registers on newer chips.
    parts = [part for part in range(256, max(most, 256) + 1, _LANES) if length % part == 0]
    return max(parts, default=length)


def _passes(row_bytes):
    """How many instructions a product takes: float32 is multiplied as parts of narrow numbers."""
    return 1 if row_bytes == 2 else 4


def _slowness(height, num_tiles, chip):
    """Time of a kernel, relative to that of its memory traffic.

    Cores without a tile wait for the others. The matrix unit loads kernels while it multiplies
    rows, and waits if these are few: about a third of the time with 128 rows on a v6e.
    """
    return pl.cdiv(num_tiles, chip.cores) * chip.cores / num_tiles * (1 + 16 / height)


def _lanes(tiles):
    """The depth and the columns of a tile as fast memory holds them, in whole registers."""
    return _round_up(tiles.depth, _LANES), _round_up(tiles.columns, _LANES)


def _usable(chip):
    # The rest is for values that do not fit into registers.
    return chip.vmem * 13 // 16


def _round_up(value, multiple):
    return pl.cdiv(value, multiple) * multiple
