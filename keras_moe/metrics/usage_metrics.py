"""Expert usage as Keras metrics, for loops of your own, updated with a routing.

In `model.fit` use `callbacks.ExpertMonitor`: a layer cannot own a Keras metric on every backend.
"""

import keras
from keras import ops

from keras_moe._internal.named_arguments import Saved, check_is_made
from keras_moe._internal.serialization import register
from keras_moe._internal.shape_checks import check_fields
from keras_moe._internal.tensor_checks import check_is_float
from keras_moe._internal.validation import check_name, check_positive_integer
from keras_moe.metrics.usage import (
    dead_experts,
    dropped_fraction,
    expert_share,
    load_entropy,
    load_imbalance,
)


class _UsageMetric(Saved, keras.metrics.Metric):
    """Abstract: accumulates a statistic of the counts of each routing."""

    _attribute_checks = {"num_experts": check_positive_integer}
    _kept_attributes = ("num_experts",)

    def __init__(self, num_experts, name=None, dtype=None):
        if name is not None:
            check_name("name", name)
        super().__init__(name=name, dtype=dtype)
        self.num_experts = num_experts

    def update_state(self, routing, y_pred=None, sample_weight=None):
        """Add the assignments of a routing. Padding is left out by the routing itself.

        Args:
            routing: an `ops.Routing`.
            y_pred, sample_weight: must be None.

        Raises:
            ValueError: If the routing has another number of experts or a weight is given.
            TypeError: If it is no routing.
        """
        check_is_made(self)
        if y_pred is not None and not hasattr(routing, "counts"):
            raise TypeError(
                "Usage metrics must be given routings, and not targets and outputs. Received: one "
                "among those of `compile`. Use `callbacks.ExpertMonitor`, which logs the usage of "
                "each layer, or call `update_state` with a routing."
            )
        if y_pred is not None or sample_weight is not None:
            raise ValueError(
                "Usage metrics count assignments and take no weight. "
                "Received: sample_weight. Mask tokens out at the router."
            )
        check_fields(routing, "counts")
        check_is_float("routing.dropped", routing.dropped)
        if routing.counts.shape[0] != self.num_experts:
            raise ValueError(
                "The routing must have as many experts as the metric. Received: "
                f"{routing.counts.shape[0]} experts, num_experts={self.num_experts}. "
                f"Make the metric with num_experts={routing.counts.shape[0]}."
            )
        self._remember(ops.cast(routing.counts, "float32"), routing.dropped)

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

    def _remember(self, counts, dropped):
        self.counts.assign_add(counts)
        self.dropped.assign_add(ops.cast(dropped, "float32") * ops.sum(counts))


@register
class LoadImbalance(_TotalUsageMetric):
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
class LoadEntropy(_TotalUsageMetric):
    """`metrics.load_entropy` of all routings seen since the last reset.

    Args and example: as for `LoadImbalance`.
    """

    def result(self):
        return load_entropy(self.counts)


@register
class DeadExperts(_TotalUsageMetric):
    """`metrics.dead_experts` of all routings seen since the last reset.

    Args and example: as for `LoadImbalance`.
    """

    def result(self):
        return dead_experts(self.counts)


@register
class DeadExpertsOverWindow(_UsageMetric):
    """`metrics.dead_experts_over_window` of the routings seen since the last reset.

    Each `update_state` is a batch.

    Args:
        num_experts: number of experts, E.
        window: number of batches without an assignment that make an expert count as dead.
        name: name of the metric.
        dtype: dtype of the metric.

    Raises:
        ValueError: If `num_experts` or `window` is not a positive integer.

    Example:

    >>> metric = keras_moe.metrics.DeadExpertsOverWindow(num_experts=8, window=2)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> for _ in range(3):
    ...     metric.update_state(router(keras.random.normal((32, 64))))
    >>> dead = float(metric.result())
    """

    _attribute_checks = {"window": check_positive_integer}

    def __init__(self, num_experts, window=100, name=None, dtype=None):
        super().__init__(num_experts, name, dtype)
        self.window = window
        # Batches since the last assignment of each expert.
        self.idle = self.add_variable((self.num_experts,), "zeros", dtype="float32", name="idle")

    def _remember(self, counts, dropped):
        self.idle.assign(ops.where(counts > 0, 0.0, self.idle + 1.0))

    def result(self):
        return ops.sum(ops.cast(self.idle >= self.window, "float32"))

    def get_config(self):
        return {**super().get_config(), "window": self.window}


@register
class DroppedFraction(_TotalUsageMetric):
    """`metrics.dropped_fraction` of all routings seen since the last reset.

    Args and example: as for `LoadImbalance`.
    """

    def result(self):
        return dropped_fraction(self.dropped, self.counts)


@register
class ExpertShare(_TotalUsageMetric):
    """`metrics.expert_share`, (E,), of all routings seen since the last reset.

    Args and example: as for `LoadImbalance`.
    """

    def result(self):
        return expert_share(self.counts)
