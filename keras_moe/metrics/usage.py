"""Expert usage: pure functions of assignment counts."""

import math

from keras import ops

from keras_moe._internal.checks import check_integer, check_tensors, host_values


def load_imbalance(counts):
    """Load of the busiest expert above the mean: `max / mean - 1`.

    0 at balance, E - 1 if one expert has everything, 0 without assignments. Also known as MaxVio,
    Wang et al. 2024 (arXiv:2408.15664), eq. 4.

    Args:
        counts: Tensor or list, (E,). Assignments per expert.

    Returns:
        Scalar, float32.
    """
    counts = as_counts(counts)
    return ops.maximum(ops.max(counts) / _or_one(ops.mean(counts)) - 1.0, 0.0)


def load_entropy(counts):
    """Entropy of the shares, divided by `log E`: 1 at balance, 0 if one expert has everything.

    1 for a single expert, 0 without assignments.

    Args:
        counts: Tensor or list, (E,). Assignments per expert.

    Returns:
        Scalar, float32.
    """
    share = expert_share(counts)
    num_experts = share.shape[0]
    if num_experts == 1:
        return share[0]
    return -ops.sum(share * ops.log(_or_one(share))) / math.log(num_experts)


def dead_experts(counts):
    """Number of experts with less than a thousandth of the mean, such as no assignment.

    Args:
        counts: Tensor or list, (E,). Assignments per expert, or shares of the combine weight.

    Returns:
        Scalar, float32.
    """
    counts = as_counts(counts)
    # All are dead where nothing was assigned.
    return ops.sum(ops.cast(counts <= 1e-3 * ops.mean(counts), "float32"))


def dead_experts_over_window(counts, window=100):
    """Number of experts without a single assignment in the last `window` batches.

    One batch may miss an expert by chance; many in a row do not. 0 before there are `window`
    batches.

    Args:
        counts: Tensor or list, (N, E). Assignments per expert in N batches, in the order of time.
        window: Integer. Number of batches.

    Returns:
        Scalar, float32.
    """
    counts, window = as_counts(counts, "NE"), check_integer("window", window)
    if counts.shape[0] < window:
        return ops.zeros((), "float32")
    return dead_experts(ops.sum(counts[-window:], axis=0))


def dropped_fraction(dropped, counts):
    """Share of the assignments that were dropped for lack of a slot; 0 without assignments.

    Args:
        dropped: Scalar. Number of dropped assignments.
        counts: Tensor or list, (E,). Assignments per expert, before any drop.

    Returns:
        Scalar, float32.
    """
    return ops.convert_to_tensor(dropped, "float32") / _or_one(ops.sum(as_counts(counts)))


def expert_share(counts):
    """Each expert's share of the assignments; they sum to 1, or are 0 without assignments.

    Args:
        counts: Tensor or list, (E,). Assignments per expert.

    Returns:
        (E,) float32.
    """
    counts = as_counts(counts)
    return counts / _or_one(ops.sum(counts))


def load_variation(counts):
    """Coefficient of variation of the load: its standard deviation over its mean, 0 at balance.

    Args:
        counts: Tensor or list, (E,). Assignments per expert.

    Returns:
        Scalar, float32; 0 without assignments.
    """
    counts = as_counts(counts)
    return ops.std(counts) / _or_one(ops.mean(counts))


def max_share(counts):
    """Share of the assignments that the busiest expert has; 1 / E at balance.

    Args:
        counts: Tensor or list, (E,). Assignments per expert.

    Returns:
        Scalar, float32; 0 without assignments.
    """
    return ops.max(expert_share(counts))


def active_fraction(counts):
    """Share of the experts that have an assignment.

    Args:
        counts: Tensor or list, (E,). Assignments per expert.

    Returns:
        Scalar, float32.
    """
    return ops.mean(ops.cast(as_counts(counts) > 0, "float32"))


def utilization_quantiles(counts, quantiles=(0.0, 0.25, 0.5, 0.75, 1.0)):
    """Quantiles over the experts of the load relative to its mean: all 1 at balance.

    Five numbers describe the load of any number of experts.

    Args:
        counts: Tensor or list, (E,). Assignments per expert.
        quantiles: Floats from 0, the idlest expert, to 1, the busiest.

    Returns:
        (len(quantiles),) float32; 0 without assignments.
    """
    wanted = host_values(quantiles)
    if wanted is not None and not ((wanted >= 0) & (wanted <= 1)).all():
        raise ValueError(f"`quantiles` must be from 0 to 1. Received: quantiles={quantiles}")
    share = expert_share(counts)
    return ops.quantile(share * share.shape[0], ops.convert_to_tensor(quantiles, "float32"))


def as_counts(counts, axes="E", name="counts"):
    """Counts as a float32 tensor, checked: their axes and, on the host, their sign."""
    array = host_values(counts)
    if array is not None:
        if not (array >= 0).all():
            raise ValueError(f"`{name}` must be numbers of at least 0. Received: {array.min()}")
        counts = array
    check_tensors(**{name: (counts, axes, "number")})
    return ops.convert_to_tensor(counts, "float32")


def _or_one(values):
    """Values to divide by: 1 in the place of 0."""
    return ops.where(values > 0, values, 1.0)
