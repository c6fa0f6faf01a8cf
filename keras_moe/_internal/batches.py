"""What a user gives to run a model on, and running it."""

import contextlib

import keras

from keras_moe._internal.command_line import cause
from keras_moe._internal.tensor_checks import is_of
from keras_moe._internal.validation import dtype_of, shortened


def check_batches(name, batches):
    """Batches, and not one of them."""
    rule = f"`{name}` must be a list of batches, or another iterable."
    if hasattr(batches, "shape"):
        raise ValueError(
            f"{rule} Received: one array of shape {tuple(batches.shape)}. Pass `[array]`."
        )
    if not hasattr(batches, "__iter__") or isinstance(batches, (str, bytes, dict)):
        raise TypeError(
            f"{rule} Received: {name}={shortened(batches)} (of type {type(batches).__name__}). "
            "Pass `[inputs]`."
        )


def check_list_of_batches(name, batches):
    """Batches, and not one of them, which may be a tuple of inputs and targets."""
    check_batches(name, batches)
    if isinstance(batches, tuple) and any(hasattr(part, "shape") for part in batches):
        shapes = ", ".join(map(_described, batches))
        raise ValueError(
            f"`{name}` must be a list of batches, or another iterable. Received: a tuple of "
            f"{shapes}. Pass `[(inputs, targets)]`, or a list of inputs."
        )


def check_inputs(name, inputs, model):
    """Inputs that Keras would take in silence: some too many, and floats where ids belong."""
    wanted = getattr(model, "inputs", None) or ()
    arrays = keras.tree.flatten(inputs)
    if isinstance(inputs, dict):
        arrays = [inputs.get(tensor.name) for tensor in wanted]
    if wanted and len(arrays) > len(wanted):
        raise ValueError(
            f"`{name}` must hold what the model takes: {len(wanted)} inputs. Received: "
            f"{len(arrays)} arrays, {', '.join(map(_described, arrays))}. Leave the others out, "
            "targets too."
        )
    for tensor, array in zip(wanted, arrays):
        if hasattr(array, "dtype") and is_of("int", tensor) and not is_of("mask", array):
            raise ValueError(
                f"`{name}` must hold integers for {tensor.name!r}. Received: {dtype_of(array)}. "
                "Pass ids, or cast them."
            )


@contextlib.contextmanager
def running(model, name, number, inputs, others=()):
    """A context that runs a model on a batch; what it cannot run on is named.

    Args:
        others: the targets and weights behind the inputs, if it computes a loss.
    """
    check_inputs(name, inputs, model)
    batch = (inputs, *others) if others else inputs
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"The model must run on `{name}`. Received: batch {number} of "
            f"{keras.tree.map_structure(_described, batch)} ({cause(error)}). "
            f"Pass {'batches' if others else 'inputs'} like those it was trained on."
        ) from error


def _described(value):
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{dtype_of(value)} {tuple(value.shape)}"
    return shortened(value)
