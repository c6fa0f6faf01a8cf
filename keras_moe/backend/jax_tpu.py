"""Grouped products on TPUs, by megablox: kernels that JAX includes."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm


def product(rows, kernels, sizes, *, transposed, interpret=False):
    """See `Backend`."""
    # XLA keeps such kernels with their axes swapped, which needs less padding, and would copy them
    # all for a program that reads them otherwise.
    if kernels.shape[1] % 128 == 0 and kernels.shape[2] % 128:
        kernels, transposed = kernels.mT, not transposed
    number, depth = rows.shape
    tile = _tile(number, depth, kernels.shape[1 if transposed else 2], sizes, rows.dtype)
    rows, kernels = _whole_tiles(rows, tile), kernels.astype(rows.dtype)
    outputs = gmm(
        rows, kernels, sizes, rows.dtype, tile, transpose_rhs=transposed, interpret=interpret
    )
    return outputs[:number]


def outer(left, right, sizes, *, dtype, interpret=False):
    """See `Backend`. Sums are in float32, and zero where a group is empty."""
    (number, depth), width = left.shape, right.shape[1]
    tile = _tile(number, depth, width, sizes, jnp.promote_types(left.dtype, dtype))
    left, right = _whole_tiles(left, tile), _whole_tiles(right, tile)
    return tgmm(left.mT, right, sizes, dtype, tile, interpret=interpret)


def _tile(number, depth, width, sizes, dtype):
    """The tile's rows, and parts of both axes of a kernel, that fit into fast memory (VMEM)."""
    # Half a mean group, as groups share their first and last tiles with others.
    rows = min(max(pl.next_power_of_2(pl.cdiv(number, 2 * sizes.shape[0])), 128), 512)
    return rows, min(depth, 1024), min(width, 512 if dtype == jnp.float32 else 1024)


def _whole_tiles(rows, tile):
    return jnp.pad(rows, ((0, -rows.shape[0] % tile[0]), (0, 0)))
