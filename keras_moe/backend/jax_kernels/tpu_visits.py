"""The order in which TPU kernels visit rows.

Rows are cut into tiles of a fixed height; a *visit* is one pair of a tile and a group that share
rows. Visits run in the order of the groups, so those of one group, and those of one tile, follow
each other.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


class Visits(NamedTuple):
    """Rows where groups start and end (E,), and the group and the tile of each visit."""

    starts: Any
    ends: Any
    group: Any
    tile: Any


def plan_visits(sizes, num_rows, tile_rows, with_empty_groups=False):
    """The visits, and how many of them there are: a scalar on the device, at least 1.

    An empty group has one visit without rows if `with_empty_groups`, otherwise none.
    """
    num_groups, num_tiles = sizes.shape[0], pl.cdiv(num_rows, tile_rows)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = ends - sizes
    first_tile = starts // tile_rows
    lengths = (ends - 1) // tile_rows - first_tile + 1
    lengths = jnp.where(sizes > 0, lengths, int(with_empty_groups))
    visit_ends = jnp.cumsum(lengths, dtype=jnp.int32)
    # Each group but the first adds one visit at most: to a tile that it shares, or without rows.
    visit = jnp.arange(num_tiles + num_groups - 1, dtype=jnp.int32)
    group = jnp.sum(visit_ends <= visit[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    # A sum over one-hot rows, as gathers are slow on TPUs.
    is_group = group[:, None] == jnp.arange(num_groups, dtype=jnp.int32)
    shift = first_tile - (visit_ends - lengths)
    tile = visit + jnp.sum(jnp.where(is_group, shift, 0), axis=1)
    # Empty groups may start after the last row, and unused visits are anywhere.
    tile = jnp.clip(tile, 0, num_tiles - 1)
    return Visits(starts, ends, group, tile), jnp.maximum(visit_ends[-1], 1)


def block_spec(shape, index, visit_axis):
    """A block at `index(group, tile, *others)`, with the other two positions in the grid."""

    def block_index(*arguments):
        position, visits = list(arguments[:3]), Visits(*arguments[3:])
        visit = position.pop(visit_axis)
        return index(visits.group[visit], visits.tile[visit], *position)

    return pl.BlockSpec(shape, block_index)


def rows_of_visit(visits, visit, tile_rows):
    """The rows [start, end) of a visit's tile that belong to its group."""
    starts, ends, group, tile = visits
    first = tile[visit] * tile_rows
    start = jnp.maximum(starts[group[visit]] - first, 0)
    return start, jnp.minimum(ends[group[visit]] - first, tile_rows)


def begins_group(visits, visit):
    """Whether a visit is the first one of its group."""
    group = visits[2]
    return (visit == 0) | (group[visit] != group[jnp.maximum(visit - 1, 0)])


def for_each_strip(start, end, tiles, compute):
    """`compute(first_row, num_rows, is_covered)` for strips that contain rows [start, end).

    A covered strip lies within these rows. Others are small, as some of their rows are not used.
    """
    # Without rows there is no strip, even if they would begin within one.
    end = jnp.where(start < end, end, 0)

    def borders(start, end):
        def border(index, _):
            compute(pl.multiple_of(index * tiles.border, tiles.border), tiles.border, False)

        _loop(start, end, tiles.border, border)

    if tiles.strip == tiles.border:
        borders(start, end)
        return

    def strip(index, _):
        first = pl.multiple_of(index * tiles.strip, tiles.strip)
        past_end = first + tiles.strip
        is_covered = (start <= first) & (past_end <= end)

        @pl.when(is_covered)
        def _covered():
            compute(first, tiles.strip, True)

        @pl.when(~is_covered)
        def _borders():
            borders(jnp.maximum(start, first), jnp.minimum(end, past_end))

    _loop(start, end, tiles.strip, strip)


def _loop(start, end, length, body):
    # Not `//`: its code for negative numbers cannot be compiled without a TPU.
    lax.fori_loop(lax.div(start, length), lax.div(end + (length - 1), length), body, None)


def for_each_chunk(length, chunk, body):
    """`body(slice)` for all chunks of an axis; `chunk` divides `length`."""
    if chunk == length:
        body(pl.ds(0, length))
        return
    lax.fori_loop(
        0, length // chunk, lambda i, _: body(pl.ds(pl.multiple_of(i * chunk, chunk), chunk)), None
    )
