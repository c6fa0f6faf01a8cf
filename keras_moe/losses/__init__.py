"""Router losses, which training adds to the loss of the task, and the likelihood of a mixture."""

from functools import partial
from typing import Any

import keras
from keras import ops

from keras_moe._internal.checks import check_choice, check_integer, check_number, shortened
from keras_moe._internal.serialization import Configured, register, resolve
from keras_moe.backend import backend
from keras_moe.losses.likelihood import MixtureNegativeLogLikelihood, pack_mixture
from keras_moe.ops.routing import Routing
from keras_moe.ops.selection import entropy, weights_of_experts

__all__ = [
    "ImportanceVariation",
    "LoadBalance",
    "LoadVariation",
    "MixtureNegativeLogLikelihood",
    "RouterEntropy",
    "RouterLoss",
    "RouterZ",
    "SelectorEntropy",
    "get",
    "pack_mixture",
]
__dir__ = __all__.copy


class RouterLoss(Configured):
    """Abstract: a weighted scalar of a routing.

    A subclass implements `compute(routing)`, which returns the unweighted loss, one float. A loss
    with state implements `state_shapes` as well. Class attributes describe it:

    - `balances`: whether it balances the load. If so, `ExpertHealth` may advise a larger weight.
    - `needs_smooth_load`: whether it has a gradient only if the router `has_smooth_load`.
    - `needs_uneven_load`: whether it is constant if all experts have the same load.
    - `scope`: "sequence" if `compute` has an argument `sequence_length` as well.
    - `usual_weight`, `value_at_balance`: a weight that works well or None, and the loss at an even
      load, from which `callbacks.ExpertHealth` judges the current weight.

    Args:
        weight: Float, at least 0. Factor of the loss. Each layer copies it into a variable, which
            `callbacks.RouterLossSchedule` changes in training.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> routing = keras_moe.routers.TopKRouter(num_experts=8)(keras.random.normal((32, 64)))
    >>> value = keras_moe.losses.LoadBalance(weight=1e-2)(routing)
    """

    balances = False
    needs_smooth_load = False
    needs_uneven_load = False
    scope = "batch"
    usual_weight: float | None = None
    value_at_balance = 0.0

    def __init__(self, weight: float = 1e-2):
        self.weight = check_number("weight", weight)

    def __call__(self, routing, *args, **kwargs):
        if not isinstance(routing, Routing):
            rule = f"A `{type(self).__name__}` takes a routing: it is one of `router_losses`"
            raise TypeError(f"{rule}. Received: an object of type {type(routing).__name__}")
        if self.state_shapes(routing.counts.shape[0]):
            rule = f"`{type(self).__name__}` is called by a layer, which keeps its state"
            raise ValueError(f"{rule}. Received: a call outside of one")
        return self.weight * self.compute(routing, *args, **kwargs)

    @property
    def name(self) -> str:
        """The name of the loss in files and in messages."""
        return type(self).__name__

    def state_shapes(self, num_experts: int) -> dict[str, tuple]:
        """Return the state that each layer keeps, zeros at first: names to (shape, dtype)."""
        return {}

    def compute(self, routing: Any, *args: Any) -> Any:
        """Return the unweighted loss.

        A loss with state gets `compute(routing, state)`, and returns the loss and the new state, in
        the order of `state_shapes`. In evaluation the state is None.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must implement `compute(routing)`")


@register
class LoadBalance(RouterLoss):
    """Spreads tokens over the experts: `E * sum_e f_e * P_e`, 1 if even, larger otherwise.

    `f_e` is expert e's share of the assignments of all K choices, before any are dropped. `P_e` is
    its mean probability. Only `P_e` has a gradient. The value does not grow with K. If the load is
    even by design, as with an `ExpertChoiceRouter`, the value is constant, so layers warn.

    - `scope="batch"`: over all tokens of a call (Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6).
    - `scope="sequence"`: over each sequence, then averaged; use it together with the batch's. In a
      layer, a sequence is all axes of its inputs between the first and the last; elsewhere all
      tokens, or `sequence_length` of them (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20).
    - `scope="global"`: over the batch of an optimizer step. `f` counts all its micro-batches so
      far, on all replicas; `P` is of this micro-batch, because only that has a gradient. Only
      layers can call it (Qiu et al. 2025, arXiv:2501.11873, section 3).

    Args:
        weight: Float, at least 0. None: 1e-2, or 1e-4 for sequences.
        scope: String. "batch", "sequence" or "global".
        accumulation_steps: Integer. For the global scope, the `gradient_accumulation_steps` of the
            optimizer, times the calls of the layer in one pass.

    Errors and an example: as for `RouterLoss`.
    """

    balances = True
    needs_uneven_load = True
    usual_weight = 1e-2
    value_at_balance = 1.0

    def __init__(
        self, weight: float | None = None, scope: str = "batch", accumulation_steps: int = 1
    ):
        self.scope = check_choice("scope", scope, ("batch", "sequence", "global"))
        if scope == "sequence":
            self.usual_weight = 1e-4
        super().__init__(self.usual_weight if weight is None else weight)
        self.accumulation_steps = check_integer("accumulation_steps", accumulation_steps)

    @property
    def name(self):
        return ("" if self.scope == "batch" else self.scope.title()) + super().name

    def state_shapes(self, num_experts):
        if self.scope != "global":
            return {}
        return {"global_counts": ((num_experts,), "float32"), "global_steps": ((), "int32")}

    def compute(self, routing, state=None, sequence_length=None):
        if self.scope == "global":
            return self._compute_global(routing, state)
        if self.scope == "sequence" and sequence_length is not None:
            return _mean_of_sequences(routing, sequence_length)
        return _load_balance(routing.counts, routing)

    def _compute_global(self, routing, state):
        if state is None:
            return _load_balance(routing.counts, routing), None
        counts, steps = state
        added = backend.devices.sum(ops.cast(routing.counts, "float32"))
        counts = ops.where(steps % self.accumulation_steps == 0, 0.0, counts) + added
        steps = backend.control_dependency(added, steps + 1)
        return _load_balance(counts, routing), (counts, steps)


@register
class ImportanceVariation(RouterLoss):
    """Balances the summed scores of the experts: their squared coefficient of variation.

    Arguments, errors and an example: as for `RouterLoss`.
    Reference: Shazeer et al. 2017 (arXiv:1701.06538), eq. 6 and 7, of the scores of all experts as
    in V-MoE (arXiv:2106.05974), appendix A.1.
    """

    balances = True

    def compute(self, routing):
        return _squared_variation(routing.mean(routing.probs))


@register
class LoadVariation(RouterLoss):
    """Balances the load of the experts: its squared coefficient of variation.

    The load of a noisy router is the expected number of assignments, which has a gradient. Any
    other router's load is a count without a gradient, so layers warn: use `LoadBalance` there.

    Arguments, errors and an example: as for `RouterLoss`.
    Reference: Shazeer et al. 2017 (arXiv:1701.06538), eq. 8 to 11.
    """

    balances = True
    needs_smooth_load = needs_uneven_load = True

    def compute(self, routing):
        return _squared_variation(ops.convert_to_tensor(routing.load))


@register
class RouterZ(RouterLoss):
    """Keeps router logits small: mean over real tokens of `logsumexp(logits) ** 2`.

    Arguments, errors and an example: as for `RouterLoss`.
    Reference: Zoph et al. 2022, ST-MoE (arXiv:2202.08906), eq. 5.
    """

    def __init__(self, weight: float = 1e-3):
        super().__init__(weight)

    def compute(self, routing):
        return routing.mean(ops.logsumexp(routing.logits, axis=-1) ** 2)


@register
class RouterEntropy(RouterLoss):
    """Encourages confident routing: mean over real tokens of the entropy of the scores, in nats.

    For a router that chooses by a threshold, as `routers.TopPRouter` does.

    Arguments, errors and an example: as for `RouterLoss`.
    Reference: Huang et al. 2024 (arXiv:2403.07652), eq. 6.
    """

    def __init__(self, weight: float = 1e-4):
        super().__init__(weight)

    def compute(self, routing):
        return routing.entropy()


@register
class SelectorEntropy(RouterLoss):
    """Makes the selectors of a `routers.DSelectKRouter` choose: the sum of their mean entropies.

    Means over real tokens, in nats. Another router counts as one selector with its scores.

    Arguments, errors and an example: as for `RouterLoss`.
    Reference: Hazimeh et al. 2021 (arXiv:2106.03760), section 3.3, entropy regularization.
    """

    def compute(self, routing):
        if "selectors" not in routing.details:
            return routing.entropy()
        return ops.sum(routing.mean(entropy(routing.details["selectors"])))


@backend.jit_when_eager
def _load_balance(counts, routing):
    return _balance(counts, routing.mean(routing.probs))


def _balance(counts, mean_probs):
    """`E * sum_e f_e * P_e` of counts and mean scores (..., E): f, their shares, has no gradient.

    Fedus et al. 2021 (arXiv:2101.03961), eq. 4, divided by K: the value is 1 at balance.
    """
    counts = ops.cast(counts, "float32")  # without a gradient
    share = counts / (ops.mean(counts, axis=-1, keepdims=True) + 1e-20)  # times E
    return ops.sum(share * mean_probs, axis=-1)


def _mean_of_sequences(routing, sequence_length):
    """The mean of the `_load_balance` of each sequence."""
    num_experts = routing.probs.shape[-1]
    by_sequence = (-1, sequence_length, num_experts)
    mask = ops.reshape(routing.mask, (-1, sequence_length, 1))
    num_real = ops.sum(ops.cast(mask, "float32"), axis=1)
    probs = ops.where(mask, ops.reshape(routing.probs, by_sequence), 0.0)
    mean_probs = ops.sum(probs, axis=1) / ops.maximum(num_real, 1.0)
    chosen = ops.stop_gradient(routing.weights)
    if not keras.backend.is_float_dtype(routing.counts.dtype):  # else counted by weight
        chosen = weights_of_experts(routing.indices, ops.ones_like(chosen), num_experts)
    counts = ops.sum(ops.where(mask, ops.reshape(chosen, by_sequence), 0.0), axis=1)
    losses = _balance(counts, mean_probs)
    num_sequences = ops.sum(ops.cast(num_real > 0, "float32"))
    return ops.sum(losses) / ops.maximum(num_sequences, 1.0)


def _squared_variation(values):
    """`variance / mean ** 2` of values (E,), 0 where all are 0."""
    # Not the square of the standard deviation, whose root has no gradient at exact balance.
    mean = ops.mean(values)
    variance = ops.mean(ops.square(values - mean))
    return variance / ops.maximum(ops.square(mean), 1e-10)


def _read_former(name, scope):
    """Register a reader of a loss that version 0.2 saved under the name of a class."""

    def from_config(config):
        return LoadBalance(scope=scope, **config)

    register(type(name, (Configured,), {"from_config": staticmethod(from_config)}))


_read_former("SequenceLoadBalance", "sequence")
_read_former("GlobalLoadBalance", "global")

IDENTIFIERS: dict[str, Any] = {
    "global_load_balance": partial(LoadBalance, scope="global"),
    "importance_variation": ImportanceVariation,
    "load_balance": LoadBalance,
    "load_variation": LoadVariation,
    "router_entropy": RouterEntropy,
    "router_z": RouterZ,
    "selector_entropy": SelectorEntropy,
    "sequence_load_balance": partial(LoadBalance, scope="sequence"),
}


def get(identifier: Any) -> RouterLoss:
    """Return a `RouterLoss` from one, its config, or a name for its defaults.

    Names: "importance_variation", "load_balance", "load_variation", "router_entropy", "router_z"
    and "selector_entropy", as the classes; "global_load_balance" and "sequence_load_balance", a
    `LoadBalance` of that scope. Anything else raises a TypeError.
    """
    return resolve("router_losses", identifier, RouterLoss, IDENTIFIERS)


def get_list(identifiers):
    if not isinstance(identifiers, (list, tuple)):
        rule = "`router_losses` must be a list of losses or names"
        raise TypeError(f"{rule}. Received: router_losses={shortened(identifiers)}")
    return tuple(map(get, identifiers))
