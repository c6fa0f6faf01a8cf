"""The base class of all layers: configs, random state, quantized calls and losses of replicas."""

from typing import Any

import keras

from keras_moe._internal.keras_internals import KeepsLosses
from keras_moe._internal.serialization import arguments_of, load_draws, save_draws
from keras_moe.backend import backend


class BaseLayer(KeepsLosses, keras.layers.Layer):
    """Abstract: a layer whose config has the arguments of its constructors, kept as attributes."""

    # Arguments of a parent's constructor that the constructor of the class sets itself.
    fixed_arguments: tuple[str, ...] = ()

    def __init__(self, **kwargs: Any):
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
