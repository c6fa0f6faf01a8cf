"""The interface every router loss has."""

import math

from keras_moe._internal.serialization import Configured
from keras_moe._internal.tensor_checks import check_is_scalar
from keras_moe._internal.validation import check_not_negative

# A weight of so many times the usual one should not grow. A little less, as layers keep weights in
# float32.
_LARGE = 9.99


class RouterLoss(Configured):
    """Abstract: a weighted scalar of a routing.

    A subclass implements `compute(routing)`, which returns the loss before its weight. One that
    judges sequences sets `per_sequence` and implements `compute(routing, sequence_length)`. One
    that spreads the load over the experts sets `balances`; advice about the layer then names it.
    With `usual_weight` set as well, advice calls ten times as much a large weight, and
    `callbacks.ExpertHealth` also warns of a weight below a thousandth of it, and of more than ten
    times as much where that is a large part of the loss. One that is not 0 where all experts serve
    alike sets `value_at_balance` to what it is there, before its weight, so that this constant is
    not taken for a heavy loss.

    Args:
        weight: what the loss is multiplied by, at least 0. A layer copies it into a variable of its
            own, which `callbacks.RouterLossSchedule` changes in training.
    """

    _always_shown = ("weight",)
    per_sequence = False
    # Whether it spreads the load over the experts.
    balances = False
    # The weight it usually has, below a thousandth of which it has no effect; None if any will do.
    usual_weight: float | None = None
    # Its value, before the weight, where all experts serve alike.
    value_at_balance = 0.0

    _attribute_checks = {"weight": check_not_negative}
    _fixed_attributes = ("weight",)
    _instead_of_setting = "Call `set_router_loss_weight` of the layer."
    _is_copied = False

    def __init__(self, weight):
        self.weight = weight

    def note_copied(self):
        """A layer that was built has copied the weight, and does not look at it again."""
        self._is_copied = True

    def _is_settled(self):
        return self._is_copied

    def __getstate__(self):
        """Of a copy, which no layer has taken yet."""
        return {name: value for name, value in vars(self).items() if name != "_is_copied"}

    def __call__(self, routing, *args, **kwargs):
        if args:
            raise TypeError(
                "A router loss takes a routing, not targets and outputs. Received: "
                f"{1 + len(args)} arguments for a `{type(self).__name__}`. Pass it to a layer, "
                "`MixtureOfExperts(experts, router_losses=[...])`, instead of to `compile`."
            )
        return self.weight * check_value(self, self.compute(routing, **kwargs))

    def compute(self, routing):
        raise NotImplementedError(f"{type(self).__name__} must implement `compute(routing)`.")

    def evaluate(self, routing, **kwargs):
        """The loss outside of training: no state changes."""
        return self.compute(routing, **kwargs)

    @property
    def large_weight(self):
        """From which on a weight should not grow: ten times the usual one, if that is known."""
        return math.inf if self.usual_weight is None else _LARGE * self.usual_weight

    def balance_advice(self, weight):
        """What to try where the load is uneven in spite of the loss, which has this weight now."""
        weight = check_not_negative("weight", weight)
        balanced = f"The load is balanced by {type(self).__name__}(weight={weight:g})"
        if not weight:
            return f"{balanced}: give it a weight above 0."
        if weight < self.large_weight:
            return f"{balanced}: give it ten times the weight."
        return (
            f"{balanced}, a large weight: with a larger one the router may learn balance instead "
            "of the task."
        )

    def build(self, layer):
        """The loss for a layer: itself, or a copy that keeps its state in weights of `layer`."""
        return self

    def get_config(self):
        return {**super().get_config(), "weight": self.weight}


def check_is_loss(loss, made_by):
    """What the `build` of a loss returned, which may be one of the user's own."""
    if not isinstance(loss, RouterLoss):
        raise TypeError(
            f"{made_by} must return the loss of a layer. Received: an object of type "
            f"{type(loss).__name__}. Return `self`, or a copy of it."
        )


def check_value(loss, value):
    """The value of a loss, which may be one of the user's own."""
    return check_is_scalar("A router loss", value, f"`{type(loss).__name__}.compute`")
