"""Grouped matrix product: the primitive that other expert banks can be built from."""

from keras import ops

from keras_moe._internal.tensor_checks import (
    check_is_float,
    check_is_integer,
    check_numbers,
    host_values,
)
from keras_moe.ops.grouped import product_step, run_grouped
from keras_moe.ops.grouped.records import Parameters
from keras_moe.ops.groups import Groups


def grouped_matmul(rows, kernels, group_sizes):
    """Multiply each group of rows by its own kernel.

    Row r of group e gives `rows[r] @ kernels[e]`. The groups stand one behind another; rows behind
    the last one give zero. The cost is that of one product with one kernel, whatever E is; all
    gradients are exact, and a kernel whose group is empty has a gradient of zeros.

    Args:
        rows: (N, D) float tensor.
        kernels: (E, D, H) float tensor, converted to the dtype of the rows.
        group_sizes: (E,) integers of at least 0, sum at most N. Need not be known at compile time.
            Those in a list or a NumPy array are checked; in a tensor a negative one counts as 0,
            and a group ends with the rows at the latest.

    Returns:
        (N, H), in the dtype of `rows`. Products and sums are those of float32 at most, as all of
        Keras's.

    Raises:
        ValueError: If the ranks or the sizes of the shared axes do not fit, or sizes of groups are
            negative or too large.
        TypeError: If rows or kernels are not floats, or sizes of groups no integers.

    Example:

    >>> rows = keras.random.normal((6, 4))
    >>> kernels = keras.random.normal((3, 4, 8))
    >>> keras_moe.ops.grouped_matmul(rows, kernels, [2, 0, 4]).shape
    (6, 8)

    Reference: Gale et al. 2022, MegaBlocks (arXiv:2211.15841), section 4.
    """
    for name, given in (("rows", rows), ("kernels", kernels), ("group_sizes", group_sizes)):
        check_numbers(name, given)
    rows, kernels = ops.convert_to_tensor(rows), ops.convert_to_tensor(kernels)
    check_is_float("rows", rows)
    check_is_float("kernels", kernels)
    on_host = host_values(group_sizes)
    sizes = group_sizes if on_host is None else on_host
    check_is_integer("group_sizes", sizes)
    _check_shapes(rows.shape, kernels.shape, sizes.shape)
    if on_host is not None:
        _check_sizes(on_host, rows.shape[0])

    num_rows = ops.shape(rows)[0]
    group_sizes = _within(ops.cast(ops.convert_to_tensor(group_sizes), "int32"), num_rows)
    row_numbers = ops.arange(num_rows, dtype="int32")
    computed = row_numbers < ops.sum(group_sizes)
    groups = Groups(
        sizes=group_sizes,
        assignment_of_row=row_numbers,
        rows_of_token=ops.expand_dims(ops.where(computed, row_numbers, -1), 1),
    )
    return run_grouped(
        product_step(kernels.shape[-1]),
        rows,
        ops.ones((num_rows, 1), "float32"),
        Parameters([kernels], [], []),
        groups,
    )


def _within(group_sizes, num_rows):
    """Sizes whose groups end with the rows, whatever a tensor holds.

    Kernels of accelerators would read and write past the last row.
    """
    # Each of them alone first, so that their sum stays within 32 bits.
    num_rows = ops.cast(num_rows, "int32")
    possible = ops.minimum(ops.maximum(group_sizes, 0), num_rows)
    ends = ops.minimum(ops.cumsum(possible), num_rows)
    return ends - ops.pad(ends[:-1], ((1, 0),))


def _check_sizes(group_sizes, num_rows):
    if (group_sizes < 0).any() or (num_rows is not None and group_sizes.sum() > num_rows):
        raise ValueError(
            "Sizes of groups must be 0 or more, and their sum at most the number of rows. "
            f"Received: group_sizes={group_sizes.tolist()}, {num_rows} rows. Change one of them."
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
