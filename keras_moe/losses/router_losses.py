"""Router losses: for an even load, and for routers that are decided but not extreme."""

import math
from typing import Any

import keras
from keras import ops

from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.serialization import Configured, register
from keras_moe._internal.types import Tensor
from keras_moe.backend import backend
from keras_moe.ops.balance import (
    _agreement,
    _load_balance,
    _masked_mean,
    _router_entropy,
    _router_z,
    _sequence_load_balance,
    _squared_importance_variation,
    _squared_load_variation,
)
from keras_moe.ops.routing import Routing

# From this multiple of the usual weight on, a weight should not grow. A little less than ten times,
# as layers keep weights in float32.
_LARGE = 9.99


class RouterLoss(Configured):
    """Abstract: a weighted scalar of a routing.

    A subclass implements `compute(routing)`, which returns the loss before its weight, one float.
    One that judges sequences sets `per_sequence` and implements
    `compute(routing, sequence_length)`. One that spreads the load over the experts sets `balances`;
    advice about the layer then names it.

    With `usual_weight` set as well, advice calls ten times as much a large weight, and
    `callbacks.ExpertHealth` warns of a weight below a thousandth of it, and of more than ten times
    as much where that is a large part of the loss, not counting `value_at_balance`, the value
    before the weight at an even load.

    Args:
        weight: Float, at least 0. Factor of the loss. A layer copies it into a variable of its own,
            which `callbacks.RouterLossSchedule` changes in training.

    Raises:
        ValueError: If `weight` is not a finite number of at least 0.
    """

    per_sequence = False
    balances = False
    usual_weight: float | None = None
    value_at_balance = 0.0

    def __init__(self, weight: float):
        self.weight = check_number("weight", weight)

    def __call__(self, routing, **kwargs):
        return self.weight * self.compute(routing, **kwargs)

    def compute(self, routing):
        raise NotImplementedError(f"{type(self).__name__} must implement `compute(routing)`.")

    def evaluate(self, routing: Routing, **kwargs: Any) -> Tensor:
        """Return the loss outside of training, where no state changes."""
        return self.compute(routing, **kwargs)

    @property
    def large_weight(self) -> float:
        """The weight that should not grow: ten times the usual one, if that is known."""
        return math.inf if self.usual_weight is None else _LARGE * self.usual_weight

    def balance_advice(self, weight: float) -> str:
        """Return what to try where the load is uneven in spite of the loss with this weight."""
        balanced = f"The load is balanced by {type(self).__name__}(weight={weight:g})"
        if not weight:
            return f"{balanced}: give it a weight above 0."
        if weight < self.large_weight:
            return f"{balanced}: give it ten times the weight."
        return (
            f"{balanced}, a large weight: with a larger one the router may learn balance instead "
            "of the task."
        )

    def build(self, layer: keras.Layer) -> "RouterLoss":
        """Return the loss for a layer: itself, or a copy with its state in weights of `layer`."""
        return self

    def get_config(self):
        return {**super().get_config(), "weight": self.weight}


@register
class LoadBalance(RouterLoss):
    """Spreads tokens over the experts: `E * sum_e f_e * P_e`, 1 at balance, more when skewed.

    `f_e` is expert e's share of all assignments over all K choices, before any drop; `P_e` is its
    mean probability. Padding counts in neither. The gradient flows through `P` only.

    It does not grow with K, as in some implementations, and is computed for each layer alone.

    Args:
        weight: Float, at least 0. Factor of the loss.

    Raises:
        ValueError: If `weight` is negative.

    Example:

    >>> loss = keras_moe.losses.LoadBalance(weight=1e-2)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> value = loss(router(keras.random.normal((32, 64))))

    Reference: Fedus et al. 2021 (arXiv:2101.03961), eq. 4 to 6.
    """

    balances = True
    usual_weight = 1e-2
    value_at_balance = 1.0

    def __init__(self, weight: float = 1e-2):
        super().__init__(weight)

    def compute(self, routing):
        return _load_balance(routing)


@register
class SequenceLoadBalance(RouterLoss):
    """Spreads the tokens of each sequence over the experts: the mean of their `LoadBalance`.

    Give it a small weight, and balance the batch as well. In a layer, a sequence is all axes of its
    inputs between the first and the last. Elsewhere all tokens are one, unless `sequence_length` is
    given.

    Args:
        weight: Float, at least 0. Factor of the loss.

    Raises:
        ValueError: If `weight` is negative.

    Example:

    >>> loss = keras_moe.losses.SequenceLoadBalance(weight=1e-4)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> value = loss(router(keras.random.normal((32, 64))), sequence_length=16)

    Reference: DeepSeek-V3 (arXiv:2412.19437), eq. 17 to 20.
    """

    balances = True
    value_at_balance = 1.0
    per_sequence = True

    def __init__(self, weight: float = 1e-4):
        super().__init__(weight)

    def compute(self, routing, sequence_length=None):
        if sequence_length is None:
            return _load_balance(routing)
        return _sequence_load_balance(routing, sequence_length)


@register
class GlobalLoadBalance(RouterLoss):
    """`LoadBalance` of the batch of an optimizer step, as small batches are hard to balance.

    The shares `f` are those of all micro-batches so far in the step, on all replicas; the
    probabilities `P` are those of this one, as only they have a gradient.

    Args:
        weight: Float, at least 0. Factor of the loss.
        accumulation_steps: Integer. The `gradient_accumulation_steps` of the optimizer, times the
            calls of the layer in one pass.

    Raises:
        ValueError: If an argument is out of its range, or the loss is used outside of a layer,
            which keeps the counts.

    Example:

    >>> layer = keras_moe.layers.MixtureOfExperts(
    ...     keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=32),
    ...     router_losses=[keras_moe.losses.GlobalLoadBalance(accumulation_steps=4)],
    ... )

    Reference: Qiu et al. 2025 (arXiv:2501.11873), section 3.
    """

    balances = True
    value_at_balance = 1.0

    def __init__(self, weight: float = 1e-2, accumulation_steps: int = 1):
        super().__init__(weight)
        self.accumulation_steps = check_integer("accumulation_steps", accumulation_steps)
        self._counts: Any = None
        self._steps: Any = None

    def build(self, layer):
        counter = {"initializer": "zeros", "trainable": False, "autocast": False}
        loss = type(self).from_config(self.get_config())
        loss._counts = layer.add_weight(
            name="global_counts", shape=(layer.experts.num_experts,), dtype="float32", **counter
        )
        loss._steps = layer.add_weight(name="global_steps", shape=(), dtype="int32", **counter)
        return loss

    def evaluate(self, routing, **kwargs):
        return _load_balance(routing)

    def compute(self, routing):
        if self._counts is None:
            raise ValueError(
                "`GlobalLoadBalance` keeps its counts in a layer. Received: a call outside of one. "
                "Pass it to `MixtureOfExperts` as one of its `router_losses`."
            )
        is_first = self._steps % self.accumulation_steps == 0
        before = ops.where(is_first, 0.0, ops.convert_to_tensor(self._counts))
        counts = backend.devices.sum_over_replicas(ops.cast(routing.counts, "float32"))
        self._counts.assign(before + counts)
        self._steps.assign(backend.control_dependency(counts, self._steps + 1))
        return _agreement(before + counts, _masked_mean(routing.probs, routing.mask))

    def get_config(self):
        return {**super().get_config(), "accumulation_steps": self.accumulation_steps}


@register
class ImportanceVariation(RouterLoss):
    """Evens out the summed scores of the experts: their squared coefficient of variation.

    Args:
        weight: Float, at least 0. Factor of the loss.

    Raises:
        ValueError: If `weight` is negative.

    Example:

    >>> loss = keras_moe.losses.ImportanceVariation(weight=1e-2)
    >>> router = keras_moe.routers.NoisyTopKRouter(num_experts=8)
    >>> value = loss(router(keras.random.normal((32, 64))))

    Reference: Shazeer et al. 2017 (arXiv:1701.06538), eq. 6 and 7, of the scores of all experts as
    in V-MoE (arXiv:2106.05974), appendix A.1.
    """

    balances = True

    def __init__(self, weight: float = 1e-2):
        super().__init__(weight)

    def compute(self, routing):
        return _squared_importance_variation(routing)


@register
class LoadVariation(RouterLoss):
    """Evens out the load of the experts: its squared coefficient of variation.

    Of a noisy router the load is the expected number of assignments, which has a gradient. Of any
    other it is a count without one: use `LoadBalance` there.

    Args:
        weight: Float, at least 0. Factor of the loss.

    Raises:
        ValueError: If `weight` is negative.

    Example:

    >>> loss = keras_moe.losses.LoadVariation(weight=1e-2)
    >>> router = keras_moe.routers.NoisyTopKRouter(num_experts=8)
    >>> value = loss(router(keras.random.normal((32, 64)), training=True))

    Reference: Shazeer et al. 2017 (arXiv:1701.06538), eq. 8 to 11.
    """

    balances = True

    def __init__(self, weight: float = 1e-2):
        super().__init__(weight)

    def compute(self, routing):
        return _squared_load_variation(routing)


@register
class RouterZ(RouterLoss):
    """Keeps router logits small: mean over real tokens of `logsumexp(logits) ** 2`.

    Args:
        weight: Float, at least 0. Factor of the loss.

    Raises:
        ValueError: If `weight` is negative.

    Example:

    >>> loss = keras_moe.losses.RouterZ(weight=1e-3)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> value = loss(router(keras.random.normal((32, 64))))

    Reference: Zoph et al. 2022, ST-MoE (arXiv:2202.08906), eq. 5.
    """

    def __init__(self, weight: float = 1e-3):
        super().__init__(weight)

    def compute(self, routing):
        return _router_z(routing)


@register
class RouterEntropy(RouterLoss):
    """Keeps routers decided: mean over real tokens of the entropy of the scores, in nats.

    For a router that chooses by a threshold, as `routers.TopPRouter` does.

    Args:
        weight: Float, at least 0. Factor of the loss.

    Raises:
        ValueError: If `weight` is negative.

    Example:

    >>> loss = keras_moe.losses.RouterEntropy(weight=1e-4)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> value = loss(router(keras.random.normal((32, 64))))

    Reference: Huang et al. 2024 (arXiv:2403.07652), eq. 6.
    """

    def __init__(self, weight: float = 1e-4):
        super().__init__(weight)

    def compute(self, routing):
        return _router_entropy(routing)
