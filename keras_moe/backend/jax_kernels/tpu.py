"""Grouped matrix products on TPUs: Pallas kernels that Mosaic compiles.

The kernel of a group is read once, and a tile that several groups share stays in fast memory (VMEM)
until each of them has written its own rows: see `tpu_visits`. Only the rows of a tile that a group
covers are computed: in strips, and at its borders in smaller strips whose other rows are masked.
Rows after the last group may hold anything, NaN included.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_moe.backend.jax_kernels import supports
from keras_moe.backend.jax_kernels.elementwise import num_outputs, split, unchanged
from keras_moe.backend.jax_kernels.tpu_tiles import gradient_tiles, product_tiles, this_chip
from keras_moe.backend.jax_kernels.tpu_visits import (
    begins_group,
    block_spec,
    for_each_chunk,
    for_each_strip,
    plan_visits,
    rows_of_visit,
)


def grouped_products(
    rows, kernels, biases, sizes, *, transposed=False, finish=None, extras=(), interpret=False
):
    """See `Backend.grouped_products`; `finish` is computed on float32 tiles.

    Kernels are converted to the dtype of the rows tile by tile.
    """
    finish = finish or unchanged
    kernels = [_readable(kernel, rows.dtype) for kernel in kernels]
    biases = [_readable(bias, jnp.float32)[:, None, :] for bias in biases]
    (num_rows, depth), columns = rows.shape, kernels[0].shape[1 if transposed else 2]
    num_results = num_outputs(finish, len(kernels) + len(extras))
    chip = this_chip()
    tiles = product_tiles(
        (num_rows, depth, columns),
        rows.dtype.itemsize,
        kernels[0].dtype.itemsize,
        num_kernels=len(kernels),
        num_planes=len(extras) + num_results,
        num_groups=sizes.shape[0],
        chip=chip,
    )
    visits, num_visits = plan_visits(sizes, num_rows, tiles.rows)
    grid = (pl.cdiv(columns, tiles.columns), num_visits, pl.cdiv(depth, tiles.depth))
    spec = functools.partial(block_spec, visit_axis=1)
    kernel_tile = (tiles.columns, tiles.depth) if transposed else (tiles.depth, tiles.columns)

    def kernel_index(group, tile, column, step):
        return (group, column, step) if transposed else (group, step, column)

    kernel = spec((None, *kernel_tile), kernel_index)
    bias = spec((None, 1, tiles.columns), lambda group, tile, column, step: (group, 0, column))
    plane = spec((tiles.rows, tiles.columns), lambda group, tile, column, step: (tile, column))
    # Kernels are multiplied as they are read if there is nothing to convert or to mask.
    is_copied = kernels[0].dtype != rows.dtype or depth % tiles.depth != 0
    copies = [pltpu.VMEM(kernel_tile, rows.dtype)] * (len(kernels) if is_copied else 0)
    sums = [pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)] * len(kernels)
    outputs = pl.pallas_call(
        functools.partial(
            _products_kernel,
            tiles=tiles,
            depth=depth,
            transposed=transposed,
            finish=finish,
            counts=(len(kernels), len(biases), len(extras), num_results, len(copies)),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=grid,
            in_specs=[
                spec((tiles.rows, tiles.depth), lambda group, tile, column, step: (tile, step)),
                *[kernel] * len(kernels),
                *[bias] * len(biases),
                *[plane] * len(extras),
            ],
            out_specs=[plane] * num_results,
            scratch_shapes=copies + (sums if grid[2] > 1 else []),
        ),
        out_shape=[jax.ShapeDtypeStruct((num_rows, columns), rows.dtype)] * num_results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=chip.vmem,
        ),
        interpret=interpret,
    )(*visits, rows, *kernels, *biases, *extras)
    return tuple(outputs)


def _products_kernel(*refs, tiles, depth, transposed, finish, counts):
    visits, (rows,), kernels, biases, extras, outputs, copies, sums = split(refs, 4, 1, *counts)
    start, end = rows_of_visit(visits, pl.program_id(1), tiles.rows)
    step = pl.program_id(2)
    # The last tile of a cut axis overruns it, and what is read there may be NaN.
    overruns = depth % tiles.depth != 0
    end_of_depth = depth - step * tiles.depth
    contracted = 1 if transposed else 0

    if copies:

        @pl.when(begins_group(visits, pl.program_id(1)) | (depth > tiles.depth))
        def _copy():
            for kernel, copy in zip(kernels, copies):
                values = kernel[...]
                if overruns:
                    values = _keep(values, contracted, 0, end_of_depth)
                copy[...] = values.astype(copy.dtype)

    def compute(first, num_rows, is_covered):
        here = pl.ds(first, num_rows)

        def chunk(columns):
            left = rows[here, :]
            if overruns:
                left = _keep(left, 1, 0, end_of_depth)
            products = [
                _dot(left, kernel[columns, :] if transposed else kernel[:, columns], 1, contracted)
                for kernel in copies or kernels
            ]
            if not sums:
                store(columns, products)
                return
            for total, product in zip(sums, products):
                total[here, columns] = product + jnp.where(step == 0, 0.0, total[here, columns])

            @pl.when(step == pl.num_programs(2) - 1)
            def _last():
                store(columns, [total[here, columns] for total in sums])

        def store(columns, products):
            if biases:
                products = [
                    product + bias[:, columns].astype(jnp.float32)
                    for product, bias in zip(products, biases)
                ]
            results = finish(
                *products, *(extra[here, columns].astype(jnp.float32) for extra in extras)
            )
            for output, result in zip(outputs, results):
                if not is_covered:
                    others = output[here, columns].astype(jnp.float32)
                    result = _keep(result, 0, start - first, end - first, others)
                output[here, columns] = result.astype(output.dtype)

        for_each_chunk(tiles.columns, tiles.column_chunk, chunk)

    for_each_strip(start, end, tiles, compute)


def grouped_kernel_gradient(
    left, right, sizes, *, dtype, with_bias=False, remake=None, interpret=False
):
    """For each group `left.T @ right` (E, D, H), and the sums (E, H) of `right` or None.

    With `remake`, `left` is a tuple of arrays, and the left factor is `remake(*left)` of float32
    tiles. Sums are in float32, and zero for empty groups.
    """
    lefts = (left,) if remake is None else left
    (num_rows, depth), columns, num_groups = lefts[0].shape, right.shape[1], sizes.shape[0]
    written = jnp.dtype(dtype) if supports("tpu", jnp.dtype(dtype).name) else jnp.dtype(jnp.float32)
    chip = this_chip()
    tiles = gradient_tiles(
        (num_rows, depth, columns),
        right.dtype.itemsize,
        written.itemsize,
        num_lefts=len(lefts),
        chip=chip,
    )
    visits, num_visits = plan_visits(sizes, num_rows, tiles.rows, with_empty_groups=True)
    spec = functools.partial(block_spec, visit_axis=2)
    plane = (tiles.depth, tiles.columns)
    out_specs = [spec((None, *plane), lambda group, tile, row, column: (group, row, column))]
    out_shape = [jax.ShapeDtypeStruct((num_groups, depth, columns), written)]
    if with_bias:
        # Each tile along the depth computes the same sums, which is cheaper than to wait for one.
        bias_tile = (None, 1, tiles.columns)
        out_specs.append(spec(bias_tile, lambda group, tile, row, column: (group, 0, column)))
        out_shape.append(jax.ShapeDtypeStruct((num_groups, 1, columns), jnp.float32))
    kernel_gradient, *bias_gradient = pl.pallas_call(
        functools.partial(
            _gradient_kernel, tiles=tiles, remake=remake, counts=(len(lefts), 1, len(out_specs))
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(depth, tiles.depth), pl.cdiv(columns, tiles.columns), num_visits),
            in_specs=[
                *[spec((tiles.rows, tiles.depth), lambda group, tile, row, column: (tile, row))]
                * len(lefts),
                spec((tiles.rows, tiles.columns), lambda group, tile, row, column: (tile, column)),
            ],
            out_specs=out_specs,
            # A float32 result is its own sum.
            scratch_shapes=[] if written == jnp.float32 else [pltpu.VMEM(plane, jnp.float32)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=chip.vmem,
        ),
        interpret=interpret,
    )(*visits, *lefts, right)
    sums = bias_gradient[0][:, 0].astype(dtype) if with_bias else None
    return kernel_gradient.astype(dtype), sums


def _gradient_kernel(*refs, tiles, remake, counts):
    visits, lefts, (right,), (output, *bias), scratch = split(refs, 4, *counts)
    visit, last_visit = pl.program_id(2), pl.num_programs(2) - 1
    start, end = rows_of_visit(visits, visit, tiles.rows)
    is_first = begins_group(visits, visit)
    total = scratch[0] if scratch else output

    @pl.when(start >= end)
    def _empty():
        for sums in (total, *bias):
            sums[...] = jnp.zeros_like(sums)

    def compute(first, num_rows, is_covered):
        here = pl.ds(first, num_rows)
        # The first strip of a group overwrites the sums of the group before.
        begins = is_first & (first <= start)

        def inside(values):
            return values if is_covered else _keep(values, 0, start - first, end - first)

        def left_values(lines):
            values = [left[here, lines] for left in lefts]
            if remake is None:
                return inside(values[0])
            made = remake(*(value.astype(jnp.float32) for value in values))
            return inside(made.astype(values[0].dtype))

        def add(ref, index, values):
            ref[index] = values + jnp.where(begins, 0.0, ref[index])

        def chunk(columns):
            right_values = inside(right[here, columns])
            if bias:
                column_sums = jnp.sum(right_values.astype(jnp.float32), axis=0, keepdims=True)
                add(bias[0], (slice(None), columns), column_sums)

            def product(lines):
                add(total, (lines, columns), _dot(left_values(lines), right_values, 0, 0))

            for_each_chunk(tiles.depth, tiles.depth_chunk, product)

        for_each_chunk(tiles.columns, tiles.column_chunk, chunk)

    for_each_strip(start, end, tiles, compute)

    if scratch:
        group = visits[2]
        ends_group = group[visit] != group[jnp.minimum(visit + 1, last_visit)]

        @pl.when(ends_group | (visit == last_visit))
        def _store():
            output[...] = total[...].astype(output.dtype)


def _dot(left, right, left_axis, right_axis):
    is_float32 = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _keep(values, axis, start, end, others=0.0):
    """`values` at indices [start, end) of an axis, elsewhere `others`."""
    index = lax.broadcasted_iota(jnp.int32, values.shape, axis)
    # In float32, as not every TPU selects among narrower numbers.
    kept = jnp.where((index >= start) & (index < end), values.astype(jnp.float32), others)
    return kept.astype(values.dtype)


def _readable(array, dtype):
    """The array, converted to `dtype` if kernels cannot read it as it is."""
    return array if supports("tpu", array.dtype.name) else array.astype(dtype)
