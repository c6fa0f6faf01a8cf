"""Grouped matrix products."""

from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_tensors, host_values
from keras_moe.backend import backend
from keras_moe.backend.padded import interval
from keras_moe.ops.networks import Problem, network_of
from keras_moe.ops.plans import GroupedPlan


def grouped_matmul(rows: Tensor, kernels: Tensor, group_sizes: Tensor) -> Tensor:
    """Multiply each group of rows by its own kernel.

    Row r of group e gives `rows[r] @ kernels[e]`. The groups follow one another; rows past the last
    one give zero. It costs as much as one product with one kernel, whatever E is.

    Args:
        rows: Float tensor (N, D).
        kernels: Float tensor (E, D, H), converted to the dtype of the rows.
        group_sizes: Integer tensor or list (E,). Sizes of at least 0, sum at most N. Those in a
            list or a NumPy array are checked; in a tensor, which need not be known at compile time,
            a negative one counts as 0, and a group ends with the rows at the latest.

    Returns:
        Tensor (N, H), in the dtype of `rows`, of sums in float32 at most.

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
    rows, kernels = map(ops.convert_to_tensor, (rows, kernels))
    check_tensors(rows=(rows, "ND", "float"), kernels=(kernels, "EDH", "float"))
    sizes = _check_sizes(group_sizes, rows, kernels.shape[0])
    number = ops.arange(ops.shape(rows)[0], dtype="int32")
    expert = ops.expand_dims(interval(number, ops.cumsum(sizes)), 1)
    is_served = expert < sizes.shape[0]
    plan = GroupedPlan(
        experts=ops.where(is_served, expert, -1),
        weights=ops.ones((ops.shape(rows)[0], 1), "float32"),
        sizes=sizes,
        assignment_of_row=number,
        row_of_assignment=ops.where(is_served, ops.expand_dims(number, 1), -1),
    )
    network = network_of(_product, kernels.shape[1], {"up": kernels.shape[1:]})
    problem = Problem(rows, plan.weights, {("up", "kernel"): kernels}, {}, plan)
    return backend.run(network, problem)


def _product(rows, linear):
    return linear("up", rows)


def _check_sizes(group_sizes, rows, num_experts=None):
    """Sizes (E,) int32 whose groups end with the rows."""
    on_host, sizes = host_values(group_sizes), ops.convert_to_tensor(group_sizes)
    check_tensors({"E": num_experts}, group_sizes=(sizes, "E", "int"))
    num_rows = ops.shape(rows)[0]
    if on_host is not None:
        is_too_large = isinstance(num_rows, int) and on_host.sum() > num_rows
        if is_too_large or (on_host < 0).any():
            raise ValueError(
                "`group_sizes` must be 0 or more, and their sum at most the number of rows. "
                f"Received: group_sizes={on_host.tolist()}, {num_rows} rows"
            )
    # Kernels of accelerators would read and write past the rows. Each size alone first, so that
    # their sum stays within 32 bits.
    num_rows = ops.cast(num_rows, "int32")
    possible = ops.minimum(ops.maximum(ops.cast(sizes, "int32"), 0), num_rows)
    ends = ops.minimum(ops.cumsum(possible), num_rows)
    return ends - ops.pad(ends[:-1], ((1, 0),))
