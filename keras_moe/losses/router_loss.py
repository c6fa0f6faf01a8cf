"""The base class of router losses."""

import math

from keras_moe._internal.checks import check_number
from keras_moe._internal.serialization import Configured

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
    as much where that is a large part of the loss. A loss that is not 0 at an even load sets
    `value_at_balance` to its value there, before its weight, so that this constant is not taken
    for a heavy loss.

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

    def __init__(self, weight):
        self.weight = check_number("weight", weight)

    def __call__(self, routing, **kwargs):
        return self.weight * self.compute(routing, **kwargs)

    def compute(self, routing):
        raise NotImplementedError(f"{type(self).__name__} must implement `compute(routing)`.")

    def evaluate(self, routing, **kwargs):
        """Return the loss outside of training, where no state changes."""
        return self.compute(routing, **kwargs)

    @property
    def large_weight(self):
        """The weight that should not grow: ten times the usual one, if that is known."""
        return math.inf if self.usual_weight is None else _LARGE * self.usual_weight

    def balance_advice(self, weight):
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

    def build(self, layer):
        """Return the loss for a layer: itself, or a copy with its state in weights of `layer`."""
        return self

    def get_config(self):
        return {**super().get_config(), "weight": self.weight}
