"""Router losses: objects that turn a routing into a scalar that training adds to its loss."""

from keras_moe._internal.serialization import resolve
from keras_moe._internal.validation import (
    check_flag,
    check_method,
    check_positive_number,
    check_scalar,
    optional,
)
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
        ValueError: If `identifier` is none of these.
        TypeError: If it is a loss whose constructor did not call that of its base.
    """
    loss = resolve("router_losses", identifier, RouterLoss, BY_NAME)
    extra = {"sequence_length": None} if loss.per_sequence else {}
    check_method(loss, "compute", "routing", **extra)
    for name in ("per_sequence", "balances"):
        check_flag(name, getattr(loss, name))
    optional(check_positive_number)("usual_weight", loss.usual_weight)
    check_scalar("value_at_balance", loss.value_at_balance)
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
