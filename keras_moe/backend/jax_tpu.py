"""Grouped products on TPUs: Pallas kernels that visit tiles of rows.

A tile is visited once for each group that has rows in it, and a visit writes the rows of its group
only. Rows after the last group may hold anything, NaN included.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_moe.backend import padded

_LANES = 128
# Two tiles of each operand and of the result must fit into 16 MB of fast memory (VMEM).
_TILE_BYTES = 2 * 2**20


class _Visits(NamedTuple):
    start: Any  # (E,) int32, the first row of each group
    end: Any  # (E,) int32, after its last
    group: Any  # (V,) int32, of each visit
    tile: Any  # (V,) int32, of each visit


def product(rows, kernels, sizes, *, transposed, interpret=False):
    """See `jax_products`. Each tile of a kernel is converted to the dtype of the rows.

    Tiles are as deep as fits: then a kernel is read once, however many tiles of rows a group has.
    """
    # XLA keeps such kernels with their axes swapped, which needs less padding, and would copy them
    # all for a program of Pallas that reads them otherwise.
    if kernels.shape[1] % _LANES == 0 and kernels.shape[2] % _LANES:
        kernels, transposed = kernels.mT, not transposed
    (count, depth), width = rows.shape, kernels.shape[1 if transposed else 2]
    length = _length(count, sizes.shape[0])
    is_whole = depth <= min(4096, _TILE_BYTES // (length * rows.dtype.itemsize))
    step = depth if is_whole else _fit(depth, 1024)
    # Sums of several steps take more memory.
    most = (_TILE_BYTES << is_whole) // (step * kernels.dtype.itemsize)
    columns = _fit(width, min(1024, most))
    visits, number = _visits(sizes, count, length, of_empty=0)
    turn = -1 if transposed else 1
    return _call(
        functools.partial(_product_kernel, depth=depth, axis=int(transposed)),
        (pl.cdiv(width, columns), number, pl.cdiv(depth, step)),
        (visits, rows, kernels),
        [
            ((length, step), lambda c, v, s, visits: (visits.tile[v], s)),
            (
                (None, *(step, columns)[::turn]),
                lambda c, v, s, visits: (visits.group[v], *(s, c)[::turn]),
            ),
            ((length, columns), lambda c, v, s, visits: (visits.tile[v], c)),
        ],
        jax.ShapeDtypeStruct((count, width), rows.dtype),
        interpret,
        "grouped_product",
    )


def outer(left, right, sizes, *, dtype, interpret=False):
    """See `jax_products`. Sums are in float32, and zero where a group is empty."""
    (count, depth), width, experts = left.shape, right.shape[1], sizes.shape[0]
    length, lines = _length(count, experts), _fit(depth, 1024)
    columns = _fit(width, _TILE_BYTES // (1024 * jnp.dtype(dtype).itemsize))
    visits, number = _visits(sizes, count, length, of_empty=1)
    return _call(
        _outer_kernel,
        (pl.cdiv(width, columns), pl.cdiv(depth, lines), number),
        (visits, left, right),
        [
            ((length, lines), lambda c, r, v, visits: (visits.tile[v], r)),
            ((length, columns), lambda c, r, v, visits: (visits.tile[v], c)),
            ((None, lines, columns), lambda c, r, v, visits: (visits.group[v], r, c)),
        ],
        jax.ShapeDtypeStruct((experts, depth, width), dtype),
        interpret,
        "grouped_outer",
    )


def _call(kernel, grid, operands, tiles, result, interpret, name):
    """`tiles` has, for both operands and the result, a shape and the index of a program."""
    *read, written = (pl.BlockSpec(*tile) for tile in tiles)
    arrays = (*operands[1:], result)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=read,
            out_specs=written,
            scratch_shapes=[pltpu.VMEM(tiles[-1][0][-2:], jnp.float32)],
        ),
        out_shape=result,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        # XLA plans what it holds in VMEM, and what runs beside a kernel, by its cost.
        cost_estimate=pl.CostEstimate(
            flops=2 * arrays[0].size * result.shape[-1],
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
            transcendentals=0,
        ),
        interpret=interpret,
        name=name,
    )(*operands)


def _length(count, experts):
    """Rows of a tile: half a mean group, as groups share their first and last tiles with others."""
    return min(max(pl.next_power_of_2(pl.cdiv(count, 2 * experts)), 128), 256, count)


def _fit(size, most):
    """A whole axis, or the longest part of whole lanes; one that divides it, if there is any."""
    parts = range(most // _LANES * _LANES, 0, -_LANES)
    return size if size <= most else next((part for part in parts if size % part == 0), parts[0])


def _visits(sizes, count, length, of_empty):
    """The `_Visits` of all groups, as many as there can be, and their true number."""
    end = jnp.cumsum(sizes, dtype=jnp.int32)
    first = (end - sizes) // length
    visits = jnp.where(sizes > 0, (end + length - 1) // length - first, of_empty)
    last_visits = jnp.cumsum(visits, dtype=jnp.int32)
    tiles, experts = pl.cdiv(count, length), sizes.shape[0]
    visit = jnp.arange(tiles + experts - 1, dtype=jnp.int32)
    group = jnp.minimum(padded.interval(visit, last_visits), experts - 1)
    tile = visit + (first + visits - last_visits)[group]
    # An empty group may begin after the last row.
    return _Visits(end - sizes, end, group, jnp.minimum(tile, tiles - 1)), last_visits[-1]


def _product_kernel(visits, rows_ref, kernel_ref, output_ref, total_ref, *, depth, axis):
    visit, step = pl.program_id(1), pl.program_id(2)
    rows, kernel = rows_ref[...], kernel_ref[...].astype(rows_ref.dtype)
    if depth % rows.shape[1]:  # past its end, an array may seem to hold NaN
        inside = depth - step * rows.shape[1]
        rows, kernel = (
            _mask(each, lax.broadcasted_iota(jnp.int32, each.shape, contracted) < inside)
            for each, contracted in ((rows, 1), (kernel, axis))
        )

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    total_ref[...] += _dot(rows, kernel, (1, axis))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        own = _is_own(visits, visit, output_ref.shape)
        kept = output_ref[...].astype(jnp.float32)
        output_ref[...] = jnp.where(own, total_ref[...], kept).astype(output_ref.dtype)


def _outer_kernel(visits, left_ref, right_ref, output_ref, total_ref):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    group = visits.group[visit]

    @pl.when((visit == 0) | (visits.group[jnp.maximum(visit - 1, 0)] != group))
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    left, right = (
        _mask(ref[...], _is_own(visits, visit, ref.shape)) for ref in (left_ref, right_ref)
    )
    total_ref[...] += _dot(left, right, (0, 0))

    @pl.when((visit == last) | (visits.group[jnp.minimum(visit + 1, last)] != group))
    def _():
        output_ref[...] = total_ref[...].astype(output_ref.dtype)


def _is_own(visits, visit, shape):
    """Which rows of the tile belong to the group of a visit, for all columns of `shape`."""
    group = visits.group[visit]
    row = visits.tile[visit] * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return (visits.start[group] <= row) & (row < visits.end[group])


def _mask(tile, mask):
    return jnp.where(mask, tile.astype(jnp.float32), 0).astype(tile.dtype)


def _dot(left, right, contracted):
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
