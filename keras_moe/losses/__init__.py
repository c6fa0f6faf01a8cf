"""Router losses: objects that turn a routing into a scalar that training adds to its loss."""

from keras_moe._internal.serialization import resolve
from keras_moe._internal.validation import check_method
from keras_moe.losses.load_balance import GlobalLoadBalance, LoadBalance, SequenceLoadBalance
from keras_moe.losses.router_entropy import RouterEntropy
from keras_moe.losses.router_loss import RouterLoss
from keras_moe.losses.router_z import RouterZ
from keras_moe.losses.variation import ImportanceVariation, LoadVariation

BY_NAME = {
    "global_load_balance": GlobalLoadBalance,
    "importance_variation": ImportanceVariation,
    "load_balance": LoadBalance,
    "load_variation": LoadVariation,
    "router_entropy": RouterEntropy,
    "router_z": RouterZ,
    "sequence_load_balance": SequenceLoadBalance,
}


def get(identifier):
    """A router loss from an instance, a config, or a name in `BY_NAME`.

    Raises:
        ValueError: If `identifier` is none of these, or a loss without a weight.
    """
    loss = resolve("router_losses", identifier, RouterLoss, BY_NAME)
    if not hasattr(loss, "weight"):
        raise ValueError(
            f"A router loss must have a weight. Received: a `{type(loss).__name__}` without one. "
            "Call `super().__init__(weight)` in its `__init__`."
        )
    extra = {"sequence_length": None} if loss.per_sequence else {}
    check_method(loss, "compute", "routing", **extra)
    return loss


__all__ = [
    "BY_NAME",
    "GlobalLoadBalance",
    "ImportanceVariation",
    "LoadBalance",
    "LoadVariation",
    "RouterEntropy",
    "RouterLoss",
    "RouterZ",
    "SequenceLoadBalance",
    "get",
]


def __dir__():
    return __all__
