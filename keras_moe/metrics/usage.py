"""Expert usage: pure functions of assignment counts, and Keras metrics for custom training loops.

In `model.fit` use `callbacks.ExpertMonitor`: a layer cannot own a Keras metric on every backend.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_moe._internal.checks import check_integer, check_tensors, host_values
from keras_moe._internal.serialization import register
from keras_moe._internal.types import Tensor
from keras_moe.ops.routing import Routing


@register
def load_imbalance(counts: Tensor) -> Tensor:
    """Load of the busiest expert above the mean: `max / mean - 1`, also known as MaxVio.

    Args:
        counts: Tensor or list, (E,). Assignments per expert.

    Returns:
        Scalar, float32: 0 at balance or without assignments, E - 1 if one expert has everything.

    Reference: Wang et al. 2024 (arXiv:2408.15664), eq. 4.
    """
    counts = as_counts(counts)
    return ops.maximum(ops.max(counts) / _or_one(ops.mean(counts)) - 1.0, 0.0)


@register
def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the shares of `counts` (E,), divided by `log E`, float32.

    1 at balance, 0 if one of several has everything or without assignments.
    """
    share = expert_share(counts)
    num_experts = share.shape[0]
    if num_experts == 1:
        return share[0]
    return -ops.sum(share * ops.log(_or_one(share))) / math.log(num_experts)


@register
def dead_experts(counts: Tensor) -> Tensor:
    """Number of experts with less than a thousandth of the mean of `counts` (E,), float32."""
    return ops.sum(ops.cast(is_dead(counts), "float32"))


def is_dead(counts):
    """Which experts `dead_experts` counts, (E,) bool; all if there is nothing."""
    counts = as_counts(counts)
    # Not zero: where all experts serve all tokens, counts are sums of weights.
    return counts <= 1e-3 * ops.mean(counts)


def dropped_fraction(dropped: float, counts: Tensor) -> Tensor:
    """Share of the assignments that were dropped for lack of a slot, float32.

    Args:
        dropped: Scalar. Number of dropped assignments.
        counts: Tensor or list, (E,). Assignments per expert, before any drop.
    """
    dropped = ops.convert_to_tensor(dropped, "float32")
    check_tensors(dropped=(dropped, ""))
    return dropped / _or_one(ops.sum(as_counts(counts)))


@register
def expert_share(counts: Tensor) -> Tensor:
    """Each expert's share of the assignments `counts` (E,), float32; 0 without assignments."""
    counts = as_counts(counts)
    return counts / _or_one(ops.sum(counts))


def as_counts(counts, axes="E", name="counts"):
    """Counts as a float32 tensor, checked: their axes and, on the host, their sign."""
    array = host_values(counts)
    if array is not None and not (array >= 0).all():
        raise ValueError(f"`{name}` must be numbers of at least 0. Received: {array.min()}")
    counts = ops.convert_to_tensor(counts, "float32")
    check_tensors(**{name: (counts, axes)})
    return counts


def _or_one(values):
    return ops.where(values > 0, values, 1.0)


@register
class UsageMetric(keras.metrics.Metric):
    """A function of the counts of all routings since the last reset.

    Args:
        function: Function of counts (E,), a float32 tensor, that returns a tensor, such as
            `metrics.load_imbalance`. Register yours with Keras if the metric is to be saved.
        num_experts: Integer. Number of experts, E.
        name: String or None. Name of the metric; None: the name of the function.
        dtype: String or None. Dtype of the metric.

    Example:

    >>> metric = keras_moe.metrics.UsageMetric(keras_moe.metrics.load_imbalance, num_experts=8)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> metric.update_state(router(keras.random.normal((32, 64))))
    """

    def __init__(
        self, function: Callable, num_experts: int, name: str | None = None, dtype: Any = None
    ):
        super().__init__(name=name or function.__name__, dtype=dtype)
        self.function = function
        self.num_experts = check_integer("num_experts", num_experts)
        self.counts = self.add_variable((self.num_experts,), "zeros", "float32", name="counts")

    def update_state(self, routing: Routing) -> None:
        """Add the assignments of an `ops.Routing`, in which padding does not count."""
        check_tensors({"E": self.num_experts}, **{"routing.counts": (routing.counts, "E")})
        self._add(ops.cast(routing.counts, "float32"), ops.cast(routing.dropped, "float32"))

    def _add(self, counts, dropped):
        self.counts.assign_add(counts)

    def result(self):
        return self.function(self.counts)

    def get_config(self):
        function = keras.saving.serialize_keras_object(self.function)
        config = {**super().get_config(), "num_experts": self.num_experts}
        return {**config, "function": function} if type(self) is UsageMetric else config

    @classmethod
    def from_config(cls, config):
        if "function" in config:
            function = keras.saving.deserialize_keras_object(config["function"])
            config = {**config, "function": function}
        return cls(**config)


@register
class DroppedFraction(UsageMetric):
    """`metrics.dropped_fraction` of all routings. Arguments: as for `UsageMetric`."""

    def __init__(self, num_experts: int, name: str | None = None, dtype: Any = None):
        super().__init__(self._fraction, num_experts, name or "dropped_fraction", dtype)
        self.dropped = self.add_variable((), "zeros", "float32", name="dropped")

    def _add(self, counts, dropped):
        self.counts.assign_add(counts)
        self.dropped.assign_add(dropped * ops.sum(counts))

    def _fraction(self, counts):
        return dropped_fraction(self.dropped, counts)


@register
class DeadExpertsOverWindow(UsageMetric):
    """Number of experts that were dead in each of the last `window` batches.

    `metrics.dead_experts` counts which are dead. Each `update_state` is a batch.

    Args:
        window: Integer. Batches in a row in which an expert must be dead.

    Other arguments: as for `UsageMetric`.
    """

    def __init__(
        self, num_experts: int, window: int = 100, name: str | None = None, dtype: Any = None
    ):
        super().__init__(self._count, num_experts, name or "dead_experts_over_window", dtype)
        self.window = check_integer("window", window)

    def _add(self, counts, dropped):
        # Batches since each expert was last alive.
        self.counts.assign(ops.where(is_dead(counts), self.counts + 1.0, 0.0))

    def _count(self, idle):
        return ops.sum(ops.cast(idle >= self.window, "float32"))

    def get_config(self):
        return {**super().get_config(), "window": self.window}
