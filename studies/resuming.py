"""Training that shows its progress and resumes, and results that are computed once."""

import contextlib
import hashlib
import json
import shutil
import sys
import time

import keras
from files import whole, write_json
from keras import ops

HAS_XLA = keras.backend.backend() != "torch"


def say(text, end="\n"):
    """Show what runs now, on standard error."""
    print(text, end=end, file=sys.stderr, flush=True)


class StepTimer(keras.callbacks.Callback):
    """Keeps the milliseconds of a training step, without validation, and shows each epoch."""

    def __init__(self):
        super().__init__()
        self.ms_per_step = []

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self._end, self._steps = time.perf_counter(), batch + 1

    def on_epoch_end(self, epoch, logs=None):
        self.ms_per_step.append(1000 * (self._end - self._begin) / self._steps)
        shown = ", ".join(
            f"{name} {logs[name]:.4f}" for name in ("loss", "val_loss") if name in logs
        )
        say(f"epoch {epoch + 1} of {self.params['epochs']}: {shown}")


class Journal(StepTimer):
    """Keeps the logs of every epoch, with `ms_per_step`, and the weights and random draws.

    The file of the logs says how many epochs are finished. The weights of the next one stand beside
    those of the last until it does. `history` has each log as a list of one number per epoch, and
    the epochs.
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
        # Names of layers that Keras has counted differ between processes.
        names = set.intersection(*map(set, self.epochs)) if self.epochs else ()
        logs = {name: [log[name] for log in self.epochs] for name in names}
        return {**logs, "epochs": [*range(1, 1 + len(self.epochs))]}

    def restore(self, model):
        """Give the compiled model the state after the last epoch, if there is one."""
        if self.epochs:
            model.optimizer.build(model.trainable_variables)
            model.load_weights(self._weights(len(self.epochs)))
            for state, draws in zip(_states(model), self._draws, strict=True):
                state.assign(ops.cast(draws, state.dtype))

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        values = {name: float(value) for name, value in logs.items()}
        self.epochs.append({**values, "ms_per_step": self.ms_per_step[-1]})
        with whole(self._weights(epoch + 1)) as part:
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


def fit(model, batches, epochs, folder, callbacks, **arguments):
    """`model.fit` to the last epoch, from where an earlier call with the same `folder` got to.

    Returns the history of a training that was never interrupted, with `ms_per_step`. The model is
    built and compiled.
    """
    journal = Journal(folder)
    journal.restore(model)
    done = len(journal.epochs)
    if done:
        print(f"Resuming after epoch {done} of {epochs}.")
    model.fit(
        batches,
        epochs=epochs,
        initial_epoch=done,
        shuffle=False,  # they are shuffled already
        callbacks=[*callbacks, journal],
        verbose=0,
        **arguments,
    )
    return journal.history


def once(folder, train):
    """Return `train(progress)`, which is computed once and kept in a folder as JSON.

    `progress` is the folder of what an interrupted training has done.
    """
    result, progress = folder / "result.json", folder / "progress"
    if not result.exists():
        write_json(result, train(progress))
        forget(progress)
    return json.loads(result.read_text(encoding="utf-8"))


def digest(*settings):
    """A short name for settings, other for others, on each backend."""
    content = repr((keras.backend.backend(), *settings))
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:12]


def forget(folder):
    """Remove what a finished command kept, and nothing of others that stand beside it."""
    # In one step: half of it would be taken for what an interrupted run has left.
    rubbish = folder.with_name(f".{folder.name}")
    shutil.rmtree(rubbish, ignore_errors=True)
    if folder.exists():
        folder.rename(rubbish)
        shutil.rmtree(rubbish)
    with contextlib.suppress(OSError):  # of others that stand there
        folder.parent.rmdir()
