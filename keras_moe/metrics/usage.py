"""Expert usage: pure functions of assignment counts."""

from keras import ops

from keras_moe._internal.tensor_checks import check_counts, check_rank, check_tensor, host_values
from keras_moe._internal.validation import check_positive_integer, check_scalar, shortened


def load_imbalance(counts):
    """Load of the busiest expert above the mean: `max / mean - 1`.

    0 at balance, E - 1 if one expert has everything, 0 without assignments. Also known as MaxVio,
    Wang et al. 2024 (arXiv:2408.15664), eq. 4.

    Args:
        counts: (E,) assignments per expert.

    Returns:
        Scalar, float32.
    """
    check_counts("counts", counts)
    counts = ops.cast(counts, "float32")
    mean = ops.mean(counts)
    return ops.where(mean > 0, ops.max(counts) / ops.where(mean > 0, mean, 1.0) - 1.0, 0.0)


def load_entropy(counts):
    """Entropy of the shares, divided by `log E`: 1 at balance, 0 if one expert has everything.

    1 for a single expert, 0 without assignments.

    Args:
        counts: (E,) assignments per expert.

    Returns:
        Scalar, float32.
    """
    share = expert_share(counts)
    num_experts = share.shape[0]
    if num_experts == 1:
        return share[0]
    entropy = -ops.sum(share * ops.log(ops.where(share > 0, share, 1.0)))
    return entropy / ops.log(ops.cast(num_experts, "float32"))


def dead_experts(counts):
    """Number of experts without a single assignment.

    Args:
        counts: (E,) assignments per expert.

    Returns:
        Scalar, float32.
    """
    check_counts("counts", counts)
    return ops.sum(ops.cast(ops.equal(counts, 0), "float32"))


def dead_experts_over_window(counts, window=100):
    """Number of experts without a single assignment in the last `window` batches.

    One batch may miss an expert by chance; many in a row do not. 0 before there are `window`
    batches.

    Args:
        counts: (N, E) assignments per expert, of N batches in the order of time.
        window: number of batches.

    Returns:
        Scalar, float32.
    """
    check_counts("counts", counts, ("N", "E"))
    check_positive_integer("window", window)
    counts = ops.convert_to_tensor(counts)
    if counts.shape[0] < window:
        return ops.zeros((), "float32")
    return dead_experts(ops.sum(counts[-window:], axis=0))


def dropped_fraction(dropped, counts):
    """Share of the assignments that were dropped for lack of a slot; 0 without assignments.

    Args:
        dropped: scalar, number of dropped assignments.
        counts: (E,) assignments per expert, before any drop.

    Returns:
        Scalar, float32.
    """
    check_counts("counts", counts)
    number = host_values(dropped)
    check_rank("dropped", dropped if number is None else number, ())
    if number is not None:
        number = check_scalar("dropped", number)
        known = host_values(counts)
        if not 0 <= number <= (float("inf") if known is None else known.sum()):
            raise ValueError(
                "`dropped` must be a number of assignments, at most all. Received: "
                f"dropped={number}. Pass how many were dropped, not their share."
            )
    total = ops.sum(ops.cast(counts, "float32"))
    return ops.cast(dropped, "float32") / ops.maximum(total, 1.0)


def expert_share(counts):
    """Each expert's share of the assignments; they sum to 1, or are 0 without assignments.

    Args:
        counts: (E,) assignments per expert.

    Returns:
        (E,) float32.
    """
    check_counts("counts", counts)
    counts = ops.cast(counts, "float32")
    return counts / ops.maximum(ops.sum(counts), 1.0)


def load_variation(counts):
    """Coefficient of variation of the load: its standard deviation over its mean, 0 at balance.

    Args:
        counts: (E,) assignments per expert.

    Returns:
        Scalar, float32; 0 without assignments.
    """
    check_counts("counts", counts)
    counts = ops.cast(counts, "float32")
    mean = ops.mean(counts)
    return ops.where(mean > 0, ops.std(counts) / ops.where(mean > 0, mean, 1.0), 0.0)


def max_share(counts):
    """Share of the assignments that the busiest expert has; 1 / E at balance.

    Args:
        counts: (E,) assignments per expert.

    Returns:
        Scalar, float32; 0 without assignments.
    """
    return ops.max(expert_share(counts))


def active_fraction(counts):
    """Share of the experts that have an assignment.

    Args:
        counts: (E,) assignments per expert.

    Returns:
        Scalar, float32.
    """
    check_counts("counts", counts)
    return ops.mean(ops.cast(ops.cast(counts, "float32") > 0, "float32"))


def utilization_quantiles(counts, quantiles=(0.0, 0.25, 0.5, 0.75, 1.0)):
    """Quantiles over the experts of the load relative to its mean: all 1 at balance.

    Five numbers describe the load of any number of experts.

    Args:
        counts: (E,) assignments per expert.
        quantiles: numbers from 0, the idlest expert, to 1, the busiest.

    Returns:
        (len(quantiles),) float32; 0 without assignments.
    """
    wanted = host_values(quantiles)
    if wanted is None:
        check_tensor("quantiles", quantiles)
    elif (
        wanted.dtype.kind not in "iuf"
        or wanted.ndim > 1
        or not wanted.size
        or not ((wanted >= 0) & (wanted <= 1)).all()
    ):
        raise ValueError(
            "`quantiles` must be a list of numbers from 0 to 1. Received: "
            f"quantiles={shortened(quantiles)}. Divide percents by 100."
        )
    share = expert_share(counts)
    return ops.quantile(share * share.shape[0], ops.convert_to_tensor(quantiles, "float32"))
