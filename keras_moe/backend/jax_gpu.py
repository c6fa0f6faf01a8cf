"""Grouped products on GPUs: Pallas kernels that Triton compiles.

Every tile of rows belongs to one group: it begins at the group's first row or a multiple of the
tile's length after it. Rows that it overruns are masked, so no two programs write the same row.
Rows after the last group may hold anything, NaN included.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas.triton import CompilerParams, load, store

# Tiles of rows that share the tiles of a kernel while they are in the L2 cache.
_BAND = 16


class _Tile(NamedTuple):
    """The tile of a program: (rows, columns), in steps of `depth` along the contracted axis."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class _Span(NamedTuple):
    """A part of an axis, and which of its indices exist; None where all do, for sure."""

    index: Any
    mask: Any


def product(rows, kernels, sizes, *, transposed, interpret=False):
    """See `jax_products`. Each tile of a kernel is converted to the dtype of the rows."""
    count, depth = rows.shape
    experts, width = kernels.shape[0], kernels.shape[1 if transposed else 2]
    tile = _product_tile((count, depth, width, experts), rows.dtype, kernels.dtype)
    visits = _visits(sizes, count, tile.rows)
    kernel = functools.partial(
        _product_kernel, tile=tile, depth=depth, width=width, transposed=transposed
    )
    programs = visits[0].shape[0] * pl.cdiv(width, tile.columns)
    shape = jax.ShapeDtypeStruct((count, width), rows.dtype)
    call = _call(kernel, programs, shape, tile, interpret, "grouped_product")
    return call(*visits, rows, kernels)


def outer(left, right, sizes, *, dtype, interpret=False):
    """See `jax_products`. Sums are in float32, and zero where a group is empty."""
    (count, depth), width, experts = left.shape, right.shape[1], sizes.shape[0]
    tile = _outer_tile((count, depth, width, experts), left.dtype)
    kernel = functools.partial(_outer_kernel, tile=tile, depth=depth, width=width)
    programs = experts * pl.cdiv(depth, tile.rows) * pl.cdiv(width, tile.columns)
    shape = jax.ShapeDtypeStruct((experts, depth, width), dtype)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    call = _call(kernel, programs, shape, tile, interpret, "grouped_outer")
    return call(ends - sizes, ends, left, right)


def _call(kernel, programs, shape, tile, interpret, name):
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    capabilities = [getattr(device, "compute_capability", "") for device in gpus]
    # AMD's are names, not numbers.
    if any(float(each) < 8.0 for each in capabilities if each.replace(".", "").isdigit()):
        raise NotImplementedError("Triton needs a GPU of compute capability 8.0 or newer.")
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=shape,
        compiler_params=CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=name,
    )


def _product_tile(shape, dtype, kernel_dtype):
    """The tile of `product` for `shape` (R, D, H, E).

    - Half precision: a tile of tokamax's table for the H100, which nobody ran here. Four stages of
      loads are 64 KB of shared memory, of the 99 KB that the smallest GPUs have. Kernels of another
      dtype need wider stages, and room for the converted tile beside them.
    - float32 runs without tensor cores: 64 sums a thread in four warps, at a depth whose operands
      fit into the registers beside them; half of it beside converted operands.
    - Tiles of rows are no longer than half a mean group, as the last tile of a group is half empty.
    """
    count, depth, width, experts = shape
    exact = dtype == jnp.float32
    converted = jnp.dtype(kernel_dtype) != jnp.dtype(dtype)
    rows = _fit(pl.cdiv(count, 2 * experts), 64 if exact and converted else 128)
    columns, steps = _fit(width, 64 if exact else 128), _fit(depth, 16 if exact else 32)
    return _Tile(rows, columns, steps, 4, 3 if exact or converted else 4)


def _outer_tile(shape, dtype):
    """The tile of `outer`; rows are the contracted axis. See `_product_tile`.

    In half precision four stages are 96 KB. An H100 was fastest with five, which the smallest GPUs
    cannot hold.
    """
    count, depth, width, experts = shape
    exact = dtype == jnp.float32
    rows, columns = _fit(depth, 128), _fit(width, 64 if exact else 256)
    steps = _fit(pl.cdiv(count, experts), 16 if exact else 32)
    return _Tile(rows, columns, steps, 4 if rows * columns <= 128 * 128 else 8, 3 if exact else 4)


def _fit(size, most):
    """The power of two that holds `size`, as Triton needs, at least 16, as tensor cores do."""
    return max(min(pl.next_power_of_2(size), most), 16)


def _visits(sizes, rows, tile):
    """The group of each tile of rows, its first row and the end of the group: three (V,) int32.

    V is the most tiles that any sizes need. Tiles after the last one begin past their group.
    """
    experts = sizes.shape[0]
    groups = min(experts, rows)
    visit = jnp.arange((rows - groups) // tile + groups, dtype=jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    tiles = (sizes + (tile - 1)) // tile
    tile_ends = jnp.cumsum(tiles, dtype=jnp.int32)
    groups_before = jnp.sum(visit[:, None] >= tile_ends, axis=1, dtype=jnp.int32)
    group = jnp.minimum(groups_before, experts - 1)
    first = (ends - sizes)[group] + (visit - (tile_ends - tiles)[group]) * tile
    return group, first, ends[group]


def _place(program, rows, columns):
    """The tile (row, column) of a program, among `rows` by `columns` tiles.

    Column by column in bands of rows, the programs at work form a square: they read the fewest
    different tiles, and most reads hit the L2 cache.
    """
    band = _BAND * columns
    first = lax.div(program, band) * _BAND
    height = jnp.minimum(rows - first, _BAND)
    inside = lax.rem(program, band)
    return first + lax.rem(inside, height), lax.div(inside, height)


def _product_kernel(*refs, tile, depth, width, transposed):
    group_ref, first_ref, end_ref, rows_ref, kernel_ref, output_ref = refs
    columns = pl.cdiv(width, tile.columns)
    visit, column = _place(pl.program_id(0), pl.num_programs(0) // columns, columns)
    group, first, end = group_ref[visit], first_ref[visit], end_ref[visit]
    own = _span(first, tile.rows, end)
    column_span = _span(column * tile.columns, tile.columns, width)

    def step(index, total):
        span = _span(index * tile.depth, tile.depth, depth)
        left = _load(rows_ref, own, span)
        spans = (column_span, span) if transposed else (span, column_span)
        right = _load(kernel_ref, *spans, at=(group,)).astype(left.dtype)
        return total + _dot(left, right, (1, 1 if transposed else 0))

    # Tiles after the last one have nothing to do.
    @pl.when(first < end)
    def _():
        total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        total = lax.fori_loop(0, pl.cdiv(depth, tile.depth), step, total)
        _store(output_ref, total, own, column_span)


def _outer_kernel(start_ref, end_ref, left_ref, right_ref, output_ref, *, tile, depth, width):
    rows, columns = pl.cdiv(depth, tile.rows), pl.cdiv(width, tile.columns)
    group = lax.div(pl.program_id(0), rows * columns)
    row, column = _place(lax.rem(pl.program_id(0), rows * columns), rows, columns)
    row_span = _span(row * tile.rows, tile.rows, depth)
    column_span = _span(column * tile.columns, tile.columns, width)
    start, end = start_ref[group], end_ref[group]

    def step(index, total):
        span = _span(start + index * tile.depth, tile.depth, end)
        left, right = _load(left_ref, span, row_span), _load(right_ref, span, column_span)
        return total + _dot(left, right, (0, 0))

    steps = lax.div(end - start + (tile.depth - 1), tile.depth)
    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = lax.fori_loop(0, steps, step, total)
    _store(output_ref, total, row_span, column_span, at=(group,))


def _span(first, size, end):
    whole = isinstance(end, int) and end % size == 0
    mask = None if whole else first + jnp.arange(size, dtype=jnp.int32) < end
    return _Span(pl.ds(first, size), mask)


def _part(ref, spans, at):
    """The view of `ref` at the indices `at`, then `spans`, and its mask or None."""
    shape = [span.index.size for span in spans]
    masks = [
        span.mask.reshape([-1 if i == axis else 1 for i in range(len(spans))])
        for axis, span in enumerate(spans)
        if span.mask is not None
    ]
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), shape) if masks else None
    index = (*at, *(span.index for span in spans))
    return ref.at[index], mask


def _load(ref, *spans, at=()):
    """A tile; zero where the masks say no, whatever the memory holds there."""
    view, mask = _part(ref, spans, at)
    return load(view, mask=mask, other=None if mask is None else 0)


def _store(ref, tile, *spans, at=()):
    view, mask = _part(ref, spans, at)
    store(view, tile.astype(ref.dtype), mask=mask)


def _dot(left, right, contracted):
    """The product in float32; float32 operands avoid tensor cores, which would round to TF32."""
    exact = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        right,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
