"""Grouped matrix product: the primitive that other expert banks can be built from."""

from keras import ops

from keras_moe.ops.grouped import product_step, run_grouped
from keras_moe.ops.groups import Groups


def grouped_matmul(rows, kernels, group_sizes):
    """Multiply each group of rows by its own kernel.

    Row r of group e gives `rows[r] @ kernels[e]`. The groups stand one behind another; rows behind
    the last one give zero. The cost is that of one product with one kernel, whatever E is; all
    gradients are exact, and a kernel whose group is empty has a gradient of zeros.

    Args:
        rows: (N, D) float tensor.
        kernels: (E, D, H) float tensor, converted to the dtype of the rows.
        group_sizes: (E,) integer tensor, none negative. Need not be known at compile time. What
            they count beyond N is left out.

    Returns:
        (N, H), in the dtype of `rows`. Products and sums are those of float32 at most, as all of
        Keras's.

    Raises:
        ValueError: If the ranks or the sizes of the shared axes do not fit.

    Example:

    >>> rows = keras.random.normal((6, 4))
    >>> kernels = keras.random.normal((3, 4, 8))
    >>> keras_moe.ops.grouped_matmul(rows, kernels, [2, 0, 4]).shape
    (6, 8)

    Reference: Gale et al. 2022, MegaBlocks (arXiv:2211.15841), section 4.
    """
    rows, kernels = ops.convert_to_tensor(rows), ops.convert_to_tensor(kernels)
    group_sizes = ops.cast(ops.convert_to_tensor(group_sizes), "int32")
    _check_shapes(rows.shape, kernels.shape, group_sizes.shape)

    num_rows = ops.shape(rows)[0]
    row_numbers = ops.arange(num_rows, dtype="int32")
    # Kernels of accelerators would read and write past the last row.
    ends = ops.minimum(ops.cumsum(group_sizes), num_rows)
    group_sizes = ends - ops.pad(ends[:-1], (1, 0))
    computed = row_numbers < ends[-1]
    groups = Groups(
        sizes=group_sizes,
        assignment_of_row=row_numbers,
        rows_of_token=ops.expand_dims(ops.where(computed, row_numbers, -1), 1),
    )
    return run_grouped(
        product_step(kernels.shape[-1]),
        rows,
        ops.ones((num_rows, 1), "float32"),
        [kernels],
        [],
        groups,
    )


def _check_shapes(rows, kernels, group_sizes):
    if len(rows) != 2 or len(kernels) != 3 or len(group_sizes) != 1:
        raise ValueError(
            "grouped_matmul takes rows (N, D), kernels (E, D, H) and group_sizes (E,). "
            f"Received: rows.shape={tuple(rows)}, kernels.shape={tuple(kernels)}, "
            f"group_sizes.shape={tuple(group_sizes)}. Flatten all leading axes of rows into one."
        )
    if rows[1] != kernels[1] or kernels[0] != group_sizes[0]:
        raise ValueError(
            "The last axis of rows must equal the middle axis of kernels, and there must be one "
            f"group size for each kernel. Received: rows.shape={tuple(rows)}, "
            f"kernels.shape={tuple(kernels)}, group_sizes.shape={tuple(group_sizes)}. "
            "Change one of them."
        )
