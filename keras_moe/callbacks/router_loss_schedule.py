"""Router losses whose weight changes while a model trains."""

from collections.abc import Callable

import keras

from keras_moe import losses
from keras_moe._internal.checks import check_number
from keras_moe._internal.serialization import resolve
from keras_moe.inspection import moe_layers
from keras_moe.losses import RouterLoss


class RouterLossSchedule(keras.callbacks.Callback):
    """Sets the weight of a router loss at the start of each epoch, without recompiling.

    Args:
        schedule: Function of the epoch, from 0, that returns the weight.
        loss: String or `losses.RouterLoss`. Name of a loss for `losses.get`, or one of its class
            and scope.

    Raises:
        TypeError: If there is no such loss, or the schedule is not a function.
        ValueError: If the model has no MoE layer with the loss, or a weight is out of its range.

    Example:

    >>> schedule = keras.optimizers.schedules.CosineDecay(0.01, decay_steps=10)
    >>> slowly_off = keras_moe.callbacks.RouterLossSchedule(schedule)
    """

    def __init__(self, schedule: Callable, loss: str | RouterLoss = "load_balance"):
        super().__init__()
        self.schedule = schedule
        self.loss = loss
        self._like = resolve("loss", loss, RouterLoss, losses.IDENTIFIERS)

    def on_train_begin(self, logs=None):
        if not self._scheduled():
            raise ValueError(f"The model must have the router loss. Received: loss={self.loss!r}")

    def on_epoch_begin(self, epoch, logs=None):
        for layer, index in self._scheduled():
            weight = check_number("schedule(...)", self.schedule(epoch))
            layer.set_router_loss_weight(index, weight)

    def _scheduled(self):
        return [
            (layer, index)
            for layer in moe_layers(self.model).values()
            for index, loss in enumerate(layer.router_losses)
            if isinstance(loss, type(self._like)) and loss.scope == self._like.scope
        ]
