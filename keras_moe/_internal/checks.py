"""Checks of arguments, made once, where a user's value enters the package.

Values of tensors are checked only if they are on the host.
"""

import math
import numbers
import operator

import keras
import numpy as np

_KINDS = {"float": ["float"], "int": ["int"], "mask": ["bool", "int"], "number": ["float", "int"]}


def check_integer(name, value, minimum=1):
    """Return an integer, or a 0-d array of one, as a Python integer."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    # Python takes True for 1.
    if isinstance(value, bool) or number is None or number < minimum:
        rule = f"`{name}` must be an integer of at least {minimum}"
        raise ValueError(f"{rule}. Received: {name}={shortened(value)}")
    return number


def check_number(name, value, minimum=0.0, above=None, below=None):
    """Return a finite number, at least `minimum` or greater than `above`, as a Python float."""
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    is_inside = number >= minimum if above is None else number > above
    if not is_inside or not number < (math.inf if below is None else below):
        rule = f"at least {minimum:g}" if above is None else f"greater than {above:g}"
        rule += "" if below is None else f" and less than {below:g}"
        received = f"{name}={shortened(value)}"
        raise ValueError(f"`{name}` must be a finite number, {rule}. Received: {received}")
    return number


def check_choice(name, value, choices):
    if value not in tuple(choices):
        rule = f"`{name}` must be one of {', '.join(map(repr, choices))}"
        raise ValueError(f"{rule}. Received: {name}={shortened(value)}")
    return value


def check_tensors(sizes=None, **tensors):
    """Check tensors that share axes: each has its rank, and an axis has one size in all of them.

    `sizes` has known sizes of axes by their letters, None fits any other. Each tensor, or None,
    comes with its axes, a letter for each, and perhaps a kind of dtype: `check_tensors({"T": 6},
    logits=(logits, "TE", "float"), mask=(mask, "T", "mask"))`.
    """
    sizes = {axis: size for axis, size in (sizes or {}).items() if isinstance(size, int)}
    for name, (tensor, axes, *kind) in tensors.items():
        rank_is_unknown = getattr(getattr(tensor, "shape", ()), "rank", 0) is None  # to TensorFlow
        if tensor is None or rank_is_unknown:
            continue
        shape = tuple(getattr(tensor, "shape", ()))
        if len(shape) != len(axes) or not all(
            sizes.setdefault(axis, size) == size
            for axis, size in zip(axes, shape)
            if isinstance(size, int)
        ):
            here = ", ".join(f"{axis}={sizes[axis]}" for axis in axes if axis in sizes)
            rule = f"`{name}` must have the shape ({', '.join(axes)}){' with ' * bool(here)}{here}"
            raise ValueError(f"{rule}. Received: shape {shape}")
        if kind and not any(word in str(tensor.dtype) for word in _KINDS[kind[0]]):
            rule = f"`{name}` must have a dtype of {' or '.join(_KINDS[kind[0]])}"
            raise TypeError(f"{rule}. Received: {name}.dtype={tensor.dtype}")


def check_indices(name, indices, number):
    """Check indices of so many experts or groups, -1 for none, if they are on the host."""
    array = host_values(indices)
    if array is not None and array.size and not (-1 <= array.min() <= array.max() < number):
        rule = f"`{name}` must be from 0 to {number - 1}, or -1 for none"
        raise ValueError(f"{rule}. Received: numbers from {array.min()} to {array.max()}")


def host_values(values):
    """Return numbers, lists and NumPy arrays as an array; None for tensors."""
    is_list = isinstance(values, (list, tuple))
    if is_list and not any(map(keras.ops.is_tensor, keras.tree.flatten(values))):
        return np.asarray(values)
    is_host = isinstance(values, (np.ndarray, np.generic, numbers.Number))
    return np.asarray(values) if is_host else None


def shortened(value, length=80):
    """The representation of a value, cut for a message; of a large tensor, dtype and shape."""
    text = " ".join(repr(value).split())
    if len(text) <= length:
        return text
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{value.dtype} of shape {tuple(value.shape)}>"
    return f"{text[:length]}..."
