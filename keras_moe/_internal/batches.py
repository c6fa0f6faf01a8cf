"""Data that a model runs on, in batches."""

import contextlib

import keras

from keras_moe._internal.checks import is_kind
from keras_moe._internal.plain_text import describe


def check_list_of_batches(name, batches):
    """Refuse one batch, whose rows or parts would be taken for batches."""
    parts = batches if isinstance(batches, tuple) else [batches]
    if any(hasattr(part, "shape") for part in parts):
        raise ValueError(
            f"`{name}` must be a list of batches, as in `[inputs]` or `[(inputs, targets)]`. "
            f"Received: one batch, {_described(batches)}"
        )


@contextlib.contextmanager
def running(model, name, number, inputs, others=()):
    """Run a model on a batch that is named in errors; `others` are its targets and weights."""
    _check_inputs(model, name, inputs)
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"The model must run on `{name}`. Received: batch {number} of "
            f"{_described((inputs, *others) if others else inputs)} ({describe(error, 300)})"
        ) from error


def _check_inputs(model, name, inputs):
    """Refuse inputs that Keras takes in silence: some too many, and floats where ids belong."""
    wanted = getattr(model, "inputs", None) or ()
    arrays = keras.tree.flatten(inputs)
    if isinstance(inputs, dict):
        arrays = [inputs.get(tensor.name) for tensor in wanted]
    if wanted and len(arrays) > len(wanted):
        raise ValueError(
            f"`{name}` must hold what the model takes, {len(wanted)} inputs without targets. "
            f"Received: {_described(arrays)}"
        )
    for tensor, array in zip(wanted, arrays):
        if hasattr(array, "dtype") and is_kind("int", tensor) and not is_kind("mask", array):
            raise ValueError(
                f"`{name}` must hold integers for {tensor.name!r}. Received: {array.dtype}"
            )


def _described(batch):
    return keras.tree.map_structure(
        lambda leaf: f"{leaf.dtype} {tuple(leaf.shape)}" if hasattr(leaf, "dtype") else leaf, batch
    )
