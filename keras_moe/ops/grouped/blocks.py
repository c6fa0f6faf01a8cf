"""Products of few rows with the integer kernel of one expert, for XLA on CPUs.

XLA converts a whole kernel to floats before it multiplies. For few rows that takes longer than the
product. Converted in blocks of some rows of the kernel, one after another, the floats stay in the
cache.
"""

from keras import ops

from keras_moe.backend import backend

# Entries of a block, 256 KB in float32.
BLOCK_ENTRIES = 2**16

# Of all experts together. Each tile of an expert converts its kernel again: with more rows, that of
# an expert with most of them would be converted too often.
MOST_ROWS = 128


def are_few(num_rows):
    """Whether rows are multiplied so; their number may be unknown."""
    return isinstance(num_rows, int) and num_rows <= MOST_ROWS


def multiply(rows, kernels, expert):
    """`rows @ kernels[expert]`.

    Args:
        rows: (n, D) float tensor, n static.
        kernels: (E, D, H) int8.
        expert: int32 scalar.

    Returns:
        (n, H) in the dtype of `rows`.
    """
    (num_rows, depth), width = rows.shape, kernels.shape[2]
    # The sum of the products is read and written for each block, so a block is not shorter.
    length = min(max(BLOCK_ENTRIES // width, num_rows), depth)
    num_blocks, rest = divmod(depth, length)

    def add_product(start, length, total):
        columns = backend.slice_at(rows, (0, start), (num_rows, length))
        block = backend.slice_at(kernels, (expert, start, 0), (1, length, width))
        return total + ops.matmul(columns, ops.cast(ops.squeeze(block, 0), rows.dtype))

    total = ops.fori_loop(
        0,
        num_blocks,
        lambda number, total: add_product(number * length, length, total),
        ops.zeros((num_rows, width), rows.dtype),
    )
    return add_product(num_blocks * length, rest, total) if rest else total
