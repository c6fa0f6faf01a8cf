"""The interface every router loss has."""

import numbers

from keras_moe._internal.serialization import Configured
from keras_moe._internal.tensor_checks import is_of
from keras_moe._internal.validation import check_not_negative, dtype_of


class RouterLoss(Configured):
    """Abstract: a weighted scalar of a routing.

    A subclass implements `compute(routing)`, which returns the loss before its weight. One that
    judges sequences sets `per_sequence` and implements `compute(routing, sequence_length)`. One
    that spreads the load over the experts sets `balances`; advice about the layer then names it.

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

    def __init__(self, weight):
        weight = check_not_negative("weight", weight)
        self.weight = weight

    def __call__(self, routing, **kwargs):
        return self.weight * check_is_scalar(self, self.compute(routing, **kwargs))

    def compute(self, routing):
        raise NotImplementedError(f"{type(self).__name__} must implement `compute(routing)`.")

    def evaluate(self, routing, **kwargs):
        """The loss outside of training: no state changes."""
        return self.compute(routing, **kwargs)

    def balance_advice(self, weight):
        """What to try where the load is uneven in spite of the loss, which has this weight now."""
        weight = check_not_negative("weight", weight)
        return (
            f"The load is balanced by {type(self).__name__}({weight:g}): give it ten times the "
            "weight."
        )

    def build(self, layer):
        """The loss for a layer: itself, or a copy that keeps its state in weights of `layer`."""
        return self

    def get_config(self):
        return {"weight": self.weight}


def check_is_loss(loss, made_by):
    """What the `build` of a loss returned, which may be one of the user's own."""
    if not isinstance(loss, RouterLoss):
        raise TypeError(
            f"{made_by} must return the loss of a layer. Received: an object of type "
            f"{type(loss).__name__}. Return `self`, or a copy of it."
        )


def check_is_scalar(loss, value):
    """The value of a loss, which is one number."""
    shape = () if isinstance(value, numbers.Real) else getattr(value, "shape", None)
    if shape is None or len(shape):
        received = f"type {type(value).__name__}" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(
            f"A router loss must be one number. Received: a value of {received} from "
            f"`{type(loss).__name__}.compute`. Return, for example, its `keras.ops.mean`."
        )
    if isinstance(value, bool) or (hasattr(value, "dtype") and not is_of("float", value)):
        received = "bool" if isinstance(value, bool) else dtype_of(value)
        raise TypeError(
            f"A router loss must be a float. Received: a value of {received} from "
            f"`{type(loss).__name__}.compute`. An integer has no gradient: compute in float32."
        )
    return value
