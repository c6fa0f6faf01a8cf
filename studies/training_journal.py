"""The logs of a run in a file, which an interruption does not end."""

import json
import time

import keras
from whole_files import write_whole


class Journal(keras.callbacks.Callback):
    """Keeps the logs of every epoch, with the time a step took as `ms_per_step`.

    Args:
        path: JSON file; what an interrupted run has left there is gone on with.
    """

    def __init__(self, path):
        super().__init__()
        self.path = path
        self._epochs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def history(self):
        """Each log as a list of one number an epoch."""
        logs = self._epochs.values()
        return {name: [log[name] for log in logs] for name in next(iter(logs), ())}

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        # The last one counts: validation, which follows it, does not.
        self._ms_per_step = 1000 * (time.perf_counter() - self._begin) / (batch + 1)

    def on_epoch_end(self, epoch, logs=None):
        values = {name: float(value) for name, value in logs.items()}
        # An epoch that was interrupted after its log was written is run again.
        self._epochs[str(epoch)] = {**values, "ms_per_step": self._ms_per_step}
        write_whole(self.path, json.dumps(self._epochs).encode("utf-8"))
