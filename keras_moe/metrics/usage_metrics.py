"""Expert usage as Keras metrics, for custom training loops, updated with a routing.

In `model.fit` use `callbacks.ExpertMonitor`: a layer cannot own a Keras metric on every backend.
"""

import keras
from keras import ops

from keras_moe._internal.checks import check_integer, check_tensors
from keras_moe._internal.serialization import register
from keras_moe.metrics.usage import (
    dead_experts,
    dropped_fraction,
    expert_share,
    load_entropy,
    load_imbalance,
)


class _UsageMetric(keras.metrics.Metric):
    """Abstract: accumulates a statistic of the counts of each routing."""

    def __init__(self, num_experts, name=None, dtype=None):
        super().__init__(name=name, dtype=dtype)
        self.num_experts = check_integer("num_experts", num_experts)

    def update_state(self, routing):
        """Add the assignments of a routing, in which padding does not count.

        Args:
            routing: An `ops.Routing`.

        Raises:
            ValueError: If the routing has another number of experts.
        """
        counts = routing.counts
        check_tensors({"E": self.num_experts}, **{"routing.counts": (counts, "E")})
        self._add(ops.cast(counts, "float32"), ops.cast(routing.dropped, "float32"))

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


class _TotalUsageMetric(_UsageMetric):
    """Abstract: sums the counts of routings."""

    def __init__(self, num_experts, name=None, dtype=None):
        super().__init__(num_experts, name, dtype)
        self.counts = self.add_variable(
            (self.num_experts,), "zeros", dtype="float32", name="counts"
        )
        self.dropped = self.add_variable((), "zeros", dtype="float32", name="dropped")

    def _add(self, counts, dropped):
        self.counts.assign_add(counts)
        self.dropped.assign_add(dropped * ops.sum(counts))


@register
class LoadImbalance(_TotalUsageMetric):
    """`metrics.load_imbalance` of all routings since the last reset.

    Args:
        num_experts: Integer. Number of experts, E.
        name: String or None. Name of the metric.
        dtype: String or None. Dtype of the metric.

    Example:

    >>> metric = keras_moe.metrics.LoadImbalance(num_experts=8)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> metric.update_state(router(keras.random.normal((32, 64))))
    >>> imbalance = float(metric.result())
    """

    def result(self):
        return load_imbalance(self.counts)


@register
class LoadEntropy(_TotalUsageMetric):
    """`metrics.load_entropy` of all routings since a reset. Arguments as in `LoadImbalance`."""

    def result(self):
        return load_entropy(self.counts)


@register
class DeadExperts(_TotalUsageMetric):
    """`metrics.dead_experts` of all routings since a reset. Arguments as in `LoadImbalance`."""

    def result(self):
        return dead_experts(self.counts)


@register
class DeadExpertsOverWindow(_UsageMetric):
    """`metrics.dead_experts_over_window` of the routings since the last reset.

    Each `update_state` is a batch.

    Args:
        num_experts: Integer. Number of experts, E.
        window: Integer. Batches without an assignment after which an expert is dead.
        name: String or None. Name of the metric.
        dtype: String or None. Dtype of the metric.

    Example:

    >>> metric = keras_moe.metrics.DeadExpertsOverWindow(num_experts=8, window=2)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> for _ in range(3):
    ...     metric.update_state(router(keras.random.normal((32, 64))))
    >>> dead = float(metric.result())
    """

    def __init__(self, num_experts, window=100, name=None, dtype=None):
        super().__init__(num_experts, name, dtype)
        self.window = check_integer("window", window)
        # Batches since the last assignment of each expert.
        self.idle = self.add_variable((self.num_experts,), "zeros", dtype="float32", name="idle")

    def _add(self, counts, dropped):
        self.idle.assign(ops.where(counts > 0, 0.0, self.idle + 1.0))

    def result(self):
        return ops.sum(ops.cast(self.idle >= self.window, "float32"))

    def get_config(self):
        return {**super().get_config(), "window": self.window}


@register
class DroppedFraction(_TotalUsageMetric):
    """`metrics.dropped_fraction` of all routings since a reset. Arguments as in `LoadImbalance`."""

    def result(self):
        return dropped_fraction(self.dropped, self.counts)


@register
class ExpertShare(_TotalUsageMetric):
    """`metrics.expert_share` of all routings since a reset. Arguments as in `LoadImbalance`."""

    def result(self):
        return expert_share(self.counts)
