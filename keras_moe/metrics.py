"""Expert usage: pure functions of assignment counts, and Keras metrics of the same names.

The metrics are for loops of your own, updated with a routing. In `model.fit` use
`callbacks.ExpertMonitor`: a layer cannot own a Keras metric on every backend.
"""

import keras
from keras import ops

from keras_moe.serialization import register
from keras_moe.validation import check_positive_integer


def load_imbalance(counts):
    """Load of the busiest expert above the mean: `max / mean - 1`.

    0 at balance, E - 1 if one expert has everything, 0 without assignments. Also known as MaxVio,
    Wang et al. 2024 (arXiv:2408.15664), eq. 4.

    Args:
        counts: (E,) assignments per expert.

    Returns:
        Scalar, float32.
    """
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
    return ops.sum(ops.cast(ops.equal(counts, 0), "float32"))


def dropped_fraction(dropped, counts):
    """Share of the assignments that were dropped for want of room; 0 without assignments.

    Args:
        dropped: scalar, number of dropped assignments.
        counts: (E,) assignments per expert, before any drop.

    Returns:
        Scalar, float32.
    """
    total = ops.sum(ops.cast(counts, "float32"))
    return ops.cast(dropped, "float32") / ops.maximum(total, 1.0)


def expert_share(counts):
    """Each expert's share of the assignments; they sum to 1, or are 0 without assignments.

    Args:
        counts: (E,) assignments per expert.

    Returns:
        (E,) float32.
    """
    counts = ops.cast(counts, "float32")
    return counts / ops.maximum(ops.sum(counts), 1.0)


class _UsageMetric(keras.metrics.Metric):
    """Abstract: sums the counts of routings."""

    def __init__(self, num_experts, name=None, dtype=None):
        check_positive_integer("num_experts", num_experts)
        super().__init__(name=name, dtype=dtype)
        self.num_experts = num_experts
        self.counts = self.add_variable((num_experts,), "zeros", dtype="float32", name="counts")
        self.dropped = self.add_variable((), "zeros", dtype="float32", name="dropped")

    def update_state(self, routing, sample_weight=None):
        """Add the assignments of a routing. Padding is left out by the routing itself.

        Args:
            routing: an `ops.Routing`.
            sample_weight: must be None.

        Raises:
            ValueError: If the routing has another number of experts or a weight is given.
        """
        if sample_weight is not None:
            raise ValueError(
                "Usage metrics count assignments and take no weight. "
                "Received: sample_weight. Mask tokens out at the router."
            )
        if routing.counts.shape[0] != self.num_experts:
            raise ValueError(
                "The routing must have as many experts as the metric. Received: "
                f"{routing.counts.shape[0]} experts, num_experts={self.num_experts}."
            )
        counts = ops.cast(routing.counts, "float32")
        self.counts.assign_add(counts)
        self.dropped.assign_add(ops.cast(routing.dropped, "float32") * ops.sum(counts))

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


@register
class LoadImbalance(_UsageMetric):
    """`metrics.load_imbalance` of all routings seen since the last reset.

    Args:
        num_experts: number of experts, E.
        name: name of the metric.
        dtype: dtype of the metric.

    Example:

    >>> metric = keras_moe.metrics.LoadImbalance(num_experts=8)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> metric.update_state(router(keras.random.normal((32, 64))))
    >>> imbalance = float(metric.result())
    """

    def result(self):
        return load_imbalance(self.counts)


@register
class LoadEntropy(_UsageMetric):
    """`metrics.load_entropy` of all routings seen since the last reset.

    Args and example: as for `LoadImbalance`.
    """

    def result(self):
        return load_entropy(self.counts)


@register
class DeadExperts(_UsageMetric):
    """`metrics.dead_experts` of all routings seen since the last reset.

    Args and example: as for `LoadImbalance`.
    """

    def result(self):
        return dead_experts(self.counts)


@register
class DroppedFraction(_UsageMetric):
    """`metrics.dropped_fraction` of all routings seen since the last reset.

    Args and example: as for `LoadImbalance`.
    """

    def result(self):
        return dropped_fraction(self.dropped, self.counts)


@register
class ExpertShare(_UsageMetric):
    """`metrics.expert_share`, (E,), of all routings seen since the last reset.

    Args and example: as for `LoadImbalance`.
    """

    def result(self):
        return expert_share(self.counts)


__all__ = [
    "DeadExperts",
    "DroppedFraction",
    "ExpertShare",
    "LoadEntropy",
    "LoadImbalance",
    "dead_experts",
    "dropped_fraction",
    "expert_share",
    "load_entropy",
    "load_imbalance",
]
