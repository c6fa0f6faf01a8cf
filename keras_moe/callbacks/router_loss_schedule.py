"""Router losses whose weight changes while a model trains."""

import keras

from keras_moe import losses
from keras_moe.inspection import moe_layers


class RouterLossSchedule(keras.callbacks.Callback):
    """Sets the weight of a router loss at the begin of each epoch. Nothing is compiled again.

    Args:
        schedule: function of the epoch, from 0, and of the weight the loss was made with, which
            returns the weight for this epoch.
        loss: name of the loss in `losses.BY_NAME`.

    Raises:
        ValueError: If there is no such loss, the model has no MoE layer with it, or the schedule
            returns a negative weight.

    Example:

    >>> balance_at_first = keras_moe.callbacks.RouterLossSchedule(
    ...     lambda epoch, weight: weight if epoch < 3 else 0.1 * weight
    ... )
    """

    def __init__(self, schedule, loss="load_balance"):
        super().__init__()
        self._loss_class = type(losses.get(loss))
        self.schedule = schedule
        self.loss = loss

    def on_train_begin(self, logs=None):
        if not self._scheduled():
            raise ValueError(
                "The model must have a MoE layer with the loss that is scheduled. Received: "
                f"loss={self.loss!r}, model {self.model.name!r} without it. Add it to "
                "`router_losses`, or name another."
            )

    def on_epoch_begin(self, epoch, logs=None):
        for layer, index in self._scheduled():
            weight = float(self.schedule(epoch, layer.router_losses[index].weight))
            if not weight >= 0:
                raise ValueError(
                    "The weight of a loss must be at least 0. Received: "
                    f"{weight} for {self.loss!r} in epoch {epoch}. Mend the schedule."
                )
            layer.set_router_loss_weight(index, weight)

    def _scheduled(self):
        """The layers with the loss, and its place in each."""
        return [
            (layer, index)
            for layer in moe_layers(self.model).values()
            for index, loss in enumerate(layer.router_losses)
            if isinstance(loss, self._loss_class)
        ]
