"""The base class of callbacks about the experts of a model."""

import warnings

import keras

from keras_moe.inspection.summaries import find_layers


class ExpertCallback(keras.callbacks.Callback):
    """Abstract: a callback about MoE layers, which warns of a model without any."""

    def set_model(self, model=None):
        check_is_instance(model)
        super().set_model(model)

    def on_train_begin(self, logs=None):
        if not find_layers(self.model):
            warnings.warn(
                f"`{type(self).__name__}` has nothing to report: `{self.model.name}` has no "
                "`MixtureOfExperts`.",
                stacklevel=2,
            )


def check_is_instance(model):
    """Raise if Keras called `set_model(model)` of a class, where the model comes as `self`."""
    if model is None:
        rule = "`callbacks` must be instances, such as `ExpertMonitor()`"
        raise TypeError(f"{rule}. Received: a class")
