"""What an interruption does not end: the logs, weights and random draws of a training."""

import json
import time

import keras
from keras import ops
from whole_files import whole, write_json


class Journal(keras.callbacks.Callback):
    """Keeps the logs of every epoch, with the time a step took as `ms_per_step`, and the weights.

    The file of the logs says how many epochs are finished. The weights of the next one stand beside
    those of the last until it does.

    Args:
        folder: what an interrupted run has left there is gone on with.
    """

    def __init__(self, folder):
        super().__init__()
        self.folder, self.path = folder, folder / "journal.json"
        kept = {"epochs": [], "draws": []}
        if self.path.exists():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
        self.epochs, self._draws = kept["epochs"], kept["draws"]

    @property
    def history(self):
        """Each log as a list of one number an epoch."""
        return {name: [log[name] for log in self.epochs] for name in next(iter(self.epochs), ())}

    def restore(self, model):
        """Give the compiled model the state after the last epoch, if there is one.

        Raises:
            OSError: If its weights are missing or damaged.
        """
        if self.epochs:
            model.optimizer.build(model.trainable_variables)
            model.load_weights(self._weights(len(self.epochs)))
            for state, draws in zip(_states(model), self._draws, strict=True):
                state.assign(ops.cast(draws, state.dtype))

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        # The last one counts: validation, which follows it, does not.
        self._ms_per_step = 1000 * (time.perf_counter() - self._begin) / (batch + 1)

    def on_epoch_end(self, epoch, logs=None):
        values = {name: float(value) for name, value in logs.items()}
        self.epochs.append({**values, "ms_per_step": self._ms_per_step})
        with whole(self._weights(epoch + 1)) as (part,):
            self.model.save_weights(part)
        draws = [ops.convert_to_numpy(state).tolist() for state in _states(self.model)]
        write_json(self.path, {"epochs": self.epochs, "draws": draws})
        for path in self.folder.glob("*.weights.h5"):
            if path != self._weights(epoch + 1):
                path.unlink()

    def _weights(self, epoch):
        return self.folder / f"epoch-{epoch}.weights.h5"


def _states(model):
    """States of the random draws of all layers, which Keras does not save."""
    saved = {id(weight) for weight in model.weights}
    return [variable for variable in model.variables if id(variable) not in saved]
