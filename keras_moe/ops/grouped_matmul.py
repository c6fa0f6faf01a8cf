"""Grouped matrix product: the primitive that other expert banks can be built from."""

from keras import ops

from keras_moe._internal.checks import check_tensors, host_values
from keras_moe._internal.types import Tensor
from keras_moe.ops.grouped import product_step, run_grouped
from keras_moe.ops.grouped.records import Affine, Parameters
from keras_moe.ops.groups import Groups


def grouped_matmul(rows: Tensor, kernels: Tensor, group_sizes: Tensor) -> Tensor:
    """Multiply each group of rows by its own kernel.

    Row r of group e gives `rows[r] @ kernels[e]`. The groups follow one another; rows past the last
    one give zero. The cost is that of one product with one kernel, whatever E is; all gradients are
    exact, and a kernel whose group is empty has a gradient of zeros.

    Args:
        rows: Float tensor (N, D).
        kernels: Float tensor (E, D, H), converted to the dtype of the rows.
        group_sizes: Integer tensor or list (E,). Sizes of at least 0, sum at most N. Need not be
            known at compile time. Those in a list or a NumPy array are checked; in a tensor a
            negative one counts as 0, and a group ends with the rows at the latest.

    Returns:
        Tensor (N, H), in the dtype of `rows`. Products and sums are those of float32 at most, as
        all of Keras's.

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
    on_host = host_values(group_sizes)
    rows, kernels, sizes = map(ops.convert_to_tensor, (rows, kernels, group_sizes))
    check_tensors(
        rows=(rows, "ND", "float"),
        kernels=(kernels, "EDH", "float"),
        group_sizes=(sizes, "E", "int"),
    )
    num_rows = ops.shape(rows)[0]
    if on_host is not None:
        is_too_large = isinstance(num_rows, int) and on_host.sum() > num_rows
        if is_too_large or (on_host < 0).any():
            raise ValueError(
                "`group_sizes` must be 0 or more, and their sum at most the number of rows. "
                f"Received: group_sizes={on_host.tolist()}, {num_rows} rows"
            )
    sizes = _within(ops.cast(sizes, "int32"), ops.cast(num_rows, "int32"))
    row_numbers = ops.arange(num_rows, dtype="int32")
    computed = row_numbers < ops.sum(sizes)
    groups = Groups(
        sizes=sizes,
        assignment_of_row=row_numbers,
        rows_of_token=ops.expand_dims(ops.where(computed, row_numbers, -1), 1),
    )
    step, weights = product_step(kernels.shape[-1]), ops.ones((num_rows, 1), "float32")
    return run_grouped(step, rows, weights, Parameters.of([Affine(kernels)]), groups)


def _within(sizes, num_rows):
    """Sizes whose groups end with the rows: kernels of accelerators would read and write past."""
    # Each of them alone first, so that their sum stays within 32 bits.
    possible = ops.minimum(ops.maximum(sizes, 0), num_rows)
    ends = ops.minimum(ops.cumsum(possible), num_rows)
    return ends - ops.pad(ends[:-1], ((1, 0),))
