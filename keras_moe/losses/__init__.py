"""Router losses, which training adds to its loss, and the likelihood of a mixture."""

from typing import Any

from keras_moe._internal.checks import shortened
from keras_moe._internal.former_names import former_names
from keras_moe._internal.serialization import resolve
from keras_moe.losses.likelihood import MixtureNegativeLogLikelihood, pack_mixture
from keras_moe.losses.router_losses import (
    GlobalLoadBalance,
    ImportanceVariation,
    LoadBalance,
    LoadVariation,
    RouterEntropy,
    RouterLoss,
    RouterZ,
    SelectorEntropy,
    SequenceLoadBalance,
)

IDENTIFIERS = {
    "global_load_balance": GlobalLoadBalance,
    "importance_variation": ImportanceVariation,
    "load_balance": LoadBalance,
    "load_variation": LoadVariation,
    "router_entropy": RouterEntropy,
    "router_z": RouterZ,
    "selector_entropy": SelectorEntropy,
    "sequence_load_balance": SequenceLoadBalance,
}


def get(identifier: Any) -> RouterLoss:
    """Return a `RouterLoss` from one, its config, or the name of a class for its defaults.

    Names: "global_load_balance", "importance_variation", "load_balance", "load_variation",
    "router_entropy", "router_z", "selector_entropy" and "sequence_load_balance". Raises a TypeError
    for anything else.
    """
    return resolve("router_losses", identifier, RouterLoss, IDENTIFIERS)


def get_list(identifiers):
    if not isinstance(identifiers, (list, tuple)):
        rule = "`router_losses` must be a list of losses or names"
        raise TypeError(f"{rule}. Received: router_losses={shortened(identifiers)}")
    return tuple(map(get, identifiers))


__all__ = [
    "GlobalLoadBalance",
    "ImportanceVariation",
    "LoadBalance",
    "LoadVariation",
    "MixtureNegativeLogLikelihood",
    "RouterEntropy",
    "RouterLoss",
    "RouterZ",
    "SelectorEntropy",
    "SequenceLoadBalance",
    "get",
    "pack_mixture",
]

__getattr__ = former_names(__name__)
__dir__ = __all__.copy
