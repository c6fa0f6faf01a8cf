"""The base class of callbacks about the experts of a model."""

import warnings

import keras

from keras_moe.inspection.summaries import find_layers

# What to do where a layer counts no token.
PASS_TRAINING = "In a `call` of your own, pass `training` on: `self.moe(x, training=training)`."


class ExpertCallback(keras.callbacks.Callback):
    """Abstract: a callback about MoE layers, which warns of a model without any."""

    def on_train_begin(self, logs=None):
        if not find_layers(self.model):
            warnings.warn(
                f"`{type(self).__name__}` has nothing to report: `{self.model.name}` has no "
                "`MixtureOfExperts`.",
                stacklevel=2,
            )
