"""Training that an interruption does not end: the same call again goes on after it."""

import hashlib
import json
import shutil

import keras
from training_journal import Journal

# As `keras.callbacks.BackupAndRestore` names them.
WEIGHTS, METADATA = "latest.weights.h5", "training_metadata.json"


def fit(model, batches, epochs, folder, callbacks, **arguments):
    """`model.fit` to the last epoch, from where an earlier call with the same `folder` got to.

    Weights, optimizer and logs go on. Dropout draws the masks of the first epochs again.

    Args:
        model: a built and compiled model.
        batches: what it learns from, as `fit` takes it.
        epochs: number of epochs in all.
        folder: keeps the weights of the last epoch and the logs of each.
        callbacks: list of further callbacks.
        **arguments: further arguments of `fit`.

    Returns:
        Dict from the name of each logged value to its values by epoch, with `ms_per_step`.

    Raises:
        ValueError: If what `folder` keeps is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backup = folder / "backup"
    _mend(backup)
    done = finished_epochs(backup)
    if done:
        print(f"Going on after epoch {done} of {epochs}, which an earlier run finished.")
    journal, start = Journal(folder / "journal.json"), _Start()
    # The copy serves where a run was killed while it wrote the original.
    keeper = keras.callbacks.BackupAndRestore(
        backup, double_checkpoint=True, delete_checkpoint=False
    )
    try:
        model.fit(
            batches,
            epochs=epochs,
            shuffle=False,  # they are shuffled already
            callbacks=[*callbacks, journal, keeper, start],
            **arguments,
        )
    except OSError as error:
        if start.is_past or not done:
            raise
        raise ValueError(
            f"The weights of an interrupted run are damaged. Received: {error} for {backup}. "
            "Delete this folder, and the same command trains anew."
        ) from error
    return journal.history


def finished_epochs(backup):
    """Number of epochs whose weights are kept."""
    return _read_epoch(backup / METADATA) or 0


def digest(*settings):
    """A short name for settings, other for others, on each backend."""
    content = repr((keras.backend.backend(), *settings))
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:12]


def forget(folder):
    """Remove what a finished command kept, and nothing of others that stand beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.exists() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _mend(backup):
    """Go back to the epoch before where a run was killed while it wrote the number of this one.

    Keras does so for its weights only.
    """
    if not (backup / WEIGHTS).exists() or _read_epoch(backup / METADATA) is not None:
        return
    copies = [backup / f"{name}.bkp" for name in (WEIGHTS, METADATA)]
    if _read_epoch(copies[1]) is None:
        shutil.rmtree(backup)  # It was killed in the first epoch that it kept.
        return
    for copy in copies:
        shutil.copy(copy, copy.with_suffix(""))


def _read_epoch(path):
    try:
        return json.loads(path.read_text())["epoch"]
    except (FileNotFoundError, ValueError):
        return None


class _Start(keras.callbacks.Callback):
    """Knows whether training has begun, and so whether everything was read that was kept."""

    is_past = False

    def on_epoch_begin(self, epoch, logs=None):
        self.is_past = True
