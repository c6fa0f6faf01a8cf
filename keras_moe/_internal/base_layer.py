"""The base class of all layers: configs, random state, quantized calls and losses of replicas."""

from typing import Any

import keras

from keras_moe._internal.checks import shortened
from keras_moe._internal.keras_internals import KeepsLosses
from keras_moe._internal.serialization import arguments_of, load_draws, save_draws
from keras_moe.backend import backend

_BANK = (
    "the bank, as in `MixtureOfExperts(FeedForwardExperts(num_experts=8, hidden_dim=256), top_k=2)`"
)
# Where arguments belong that are passed to a layer without them.
_PLACES = {
    "num_experts": _BANK,
    "hidden_dim": _BANK,
    "units": "`keras.layers.Dense`; a bank has `hidden_dim` and `output_dim`",
    "top_k": "routers that choose so many experts for each token, such as `TopKRouter(top_k=2)`",
    "balancer": "`TopKRouter` and routers derived from it",
    "score": "routers such as `TopKRouter`",
    "capacity": "`layers.Capacity`, or `capacity_factor` of the mixture",
}
_OF_MIXTURE = ("capacity_factor", "router", "router_losses", "shared_expert")
_PLACES |= dict.fromkeys(_OF_MIXTURE, "`MixtureOfExperts`")


class BaseLayer(KeepsLosses, keras.layers.Layer):
    """Abstract: a layer whose config has the arguments of its constructors, kept as attributes."""

    # Arguments of a parent's constructor that the constructor of the class sets itself.
    fixed_arguments: tuple[str, ...] = ()

    def __init__(self, **kwargs: Any):
        for name in [name for name in kwargs if name in _PLACES]:
            raise TypeError(
                f"`{name}` is an argument of {_PLACES[name]}. Received: {name}="
                f"{shortened(kwargs[name])} for a `{type(self).__name__}`"
            )
        super().__init__(**kwargs)
        backend.separate_losses(self)

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        save_draws(self, store)

    def load_own_variables(self, store):
        super().load_own_variables(load_draws(self, store))

    def get_config(self):
        return {**super().get_config(), **arguments_of(self)}
