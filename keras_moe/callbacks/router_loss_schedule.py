"""Router losses whose weight changes while a model trains."""

import keras

from keras_moe import losses
from keras_moe._internal.named_arguments import NamedArguments, check_is_made
from keras_moe._internal.validation import check_function, check_scalar, listed, shortened
from keras_moe.inspection import moe_layers


def _check_loss(name, value):
    if isinstance(value, str) and value not in losses.BY_NAME:
        raise ValueError(
            f"`{name}` must be one of the names {listed(sorted(losses.BY_NAME))} or a loss. "
            f"Received: {name}={shortened(value)}. For a class of your own pass an instance."
        )
    losses.get(value)
    return value


class RouterLossSchedule(NamedArguments, keras.callbacks.Callback):
    """Sets the weight of a router loss at the start of each epoch, without compiling again.

    Args:
        schedule: function of the epoch, from 0, and of the weight the loss was made with, which
            returns the weight for this epoch.
        loss: name of the loss in `losses.BY_NAME`, or a loss of the same class, as for one of your
            own.

    Raises:
        ValueError: If there is no such loss, the model has no MoE layer with it, or the schedule
            returns anything but a finite number of at least 0.
        TypeError: If the schedule is no function.

    Example:

    >>> balance_at_first = keras_moe.callbacks.RouterLossSchedule(
    ...     lambda epoch, weight: weight if epoch < 3 else 0.1 * weight
    ... )
    >>> decay = keras.optimizers.schedules.CosineDecay(1.0, decay_steps=10)
    >>> slowly_off = keras_moe.callbacks.RouterLossSchedule(
    ...     lambda epoch, weight: weight * decay(epoch)
    ... )
    """

    _attribute_checks = {
        "schedule": lambda name, value: check_function(name, value, "epoch", "weight"),
        "loss": _check_loss,
    }

    def __init__(self, schedule, loss="load_balance"):
        super().__init__()
        self.schedule = schedule
        self.loss = loss

    def on_train_begin(self, logs=None):
        check_is_made(self)
        if not self._scheduled():
            raise ValueError(
                "The model must have a MoE layer with the loss that is scheduled. Received: "
                f"loss={self.loss!r}, model {self.model.name!r} without it. Add it to "
                "`router_losses`, or name another."
            )

    def on_epoch_begin(self, epoch, logs=None):
        for layer, index in self._scheduled():
            weight = self.schedule(epoch, layer.router_losses[index].weight)
            try:
                # Keras's schedules return tensors.
                layer.set_router_loss_weight(index, check_scalar("weight", weight))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    "A schedule must return a finite weight of at least 0. Received: "
                    f"{shortened(weight)} for {self.loss!r} in epoch {epoch}. Mend the schedule."
                ) from error

    def _scheduled(self):
        """The layers with the loss, and its place in each."""
        kind = type(losses.get(self.loss))
        return [
            (layer, index)
            for layer in moe_layers(self.model).values()
            for index, loss in enumerate(layer.router_losses)
            if isinstance(loss, kind)
        ]
