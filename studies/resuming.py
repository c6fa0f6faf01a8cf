"""Training that an interruption does not end: the same call again goes on after it."""

import hashlib
import json
import shutil

import keras
from training_journal import Journal
from whole_files import write_json


def once(folder, train):
    """What `train(progress)` returns, which is computed once and kept in a folder.

    Args:
        folder: keeps the result, as JSON.
        train: function of the folder that keeps what an interrupted training has done.
    """
    result, progress = folder / "result.json", folder / "progress"
    if not result.exists():
        write_json(result, train(progress))
        forget(progress)
    return json.loads(result.read_text(encoding="utf-8"))


def fit(model, batches, epochs, folder, callbacks, **arguments):
    """`model.fit` to the last epoch, from where an earlier call with the same `folder` got to.

    Weights, optimizer, logs and random draws go on, so that the result is that of a training that
    was never interrupted.

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
    try:
        journal = Journal(folder)
        journal.restore(model)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"What an interrupted run left must be whole. Received: {folder} with {error}. "
            "Delete this folder, and the same command trains anew."
        ) from error
    done = len(journal.epochs)
    if done:
        print(f"Going on after epoch {done} of {epochs}, which an earlier run finished.")
    model.fit(
        batches,
        epochs=epochs,
        initial_epoch=done,
        shuffle=False,  # they are shuffled already
        callbacks=[*callbacks, journal],
        **arguments,
    )
    return journal.history


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
    if folder.parent.exists() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()
