"""Grouped products on TPUs: the kernels of megablox, which are a part of JAX."""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# Rows and columns of a tile at most. Larger ones run out of fast memory (VMEM) on some chips.
_MAX_ROWS, _MAX_DEPTH, _MAX_COLUMNS = 512, 1024, 1024
_LANES = 128


def product(rows, kernels, sizes, *, transposed, interpret=False):
    # XLA keeps such kernels with their axes swapped, which needs less padding, and would copy them
    # all for a program of Pallas that reads them otherwise.
    if kernels.shape[1] % _LANES == 0 and kernels.shape[2] % _LANES:
        kernels, transposed = kernels.mT, not transposed
    (num_rows, depth), width = rows.shape, kernels.shape[1 if transposed else 2]
    tiling = _tiling(num_rows, depth, width, rows.dtype)
    outputs = gmm(
        _pad(rows, tiling[0]),
        kernels.astype(rows.dtype),
        sizes,
        preferred_element_type=rows.dtype,
        tiling=tiling,
        transpose_rhs=transposed,
        interpret=interpret,
    )
    return outputs[:num_rows]


def outer(left, right, sizes, *, dtype, interpret=False):
    tiling = _tiling(left.shape[0], left.shape[1], right.shape[1], jnp.dtype("float32"))
    outputs = tgmm(
        _pad(left, tiling[0]).T,
        _pad(right, tiling[0]),
        sizes,
        preferred_element_type=jnp.float32,
        tiling=tiling,
        interpret=interpret,
    )
    return outputs.astype(dtype)


def _tiling(num_rows, depth, columns, written):
    most_columns = _MAX_COLUMNS if written.itemsize < 4 else _MAX_COLUMNS // 2
    length = min(_MAX_ROWS, -(-num_rows // 16) * 16)
    return length, min(_MAX_DEPTH, depth), min(most_columns, columns)


def _pad(rows, length):
    """Rows padded to whole tiles. What is past the last group is not read."""
    return jnp.pad(rows, ((0, -rows.shape[0] % length), (0, 0)))
