"""Checks of arguments: each error states the rule, what was received, and the fix.

What is known without the device is checked before anything is computed: types, shapes (see
`tensor_checks`), and the values of numbers. Checks of numbers return them as Python's own, which
can be saved.
"""

import difflib
import inspect
import numbers
import os
import pathlib
import re

import keras
import numpy as np

_LARGEST = float(np.finfo("float32").max)


def check_positive_integer(name, value):
    if not is_whole(value) or value < 1:
        raise ValueError(
            f"`{name}` must be a positive integer. Received: {name}={shortened(value)}. "
            "Pass an integer of at least 1."
        )
    return int(value)


def is_symbol(size):
    """Whether a size is a symbol of PyTorch: an index, as integers are, of an unknown value."""
    # Arrays and the types of integers have it too.
    is_value = not isinstance(size, (type, numbers.Integral)) and not hasattr(size, "shape")
    return is_value and hasattr(size, "__index__")


def check_top_k(top_k, num_experts, router=None, name="top_k"):
    check_positive_integer(name, top_k)
    if num_experts is not None and top_k > num_experts:
        place = f" for the `{router}`" if router else ""
        raise ValueError(
            f"`{name}` must be at most `num_experts`: a token cannot go to more experts than "
            f"there are. Received: {name}={top_k}, num_experts={num_experts}. "
            f"Choose `{name}={num_experts}` or fewer{place}."
        )
    return int(top_k)


def is_whole(value):
    """Whether a value is an integer, of Python or NumPy, and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_fraction(name, value, fix="Pass 0 to turn it off."):
    if not _is_real(value) or not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be a number from 0 to below 1. Received: {name}={shortened(value)}. "
            f"{fix}"
        )
    return _plain(name, value)


def check_not_negative(name, value, fix="Pass 0 to turn it off."):
    if not _is_real(value) or not 0 <= value < float("inf"):
        raise ValueError(
            f"`{name}` must be a finite number of at least 0. Received: "
            f"{name}={shortened(value)}. {fix}"
        )
    return _plain(name, value)


def check_positive_number(name, value, example=1.25):
    if not _is_real(value) or not 0 < value < float("inf"):
        raise ValueError(
            f"`{name}` must be a finite number above 0. Received: {name}={shortened(value)}. "
            f"Pass, for example, {example}."
        )
    return _plain(name, value)


def check_share(name, value):
    """A number from 0 to 1; a little more is a rounding error."""
    if not _is_real(value) or not 0 <= value <= 1 + 1e-4:
        raise ValueError(
            f"`{name}` must be a number from 0 to 1. Received: {name}={shortened(value)}. Divide "
            "it by what it is a share of."
        )
    return float(value)


def check_choice(name, value, choices):
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {listed(choices)}. Received: "
            f"{name}={shortened(value)}. {propose(value, choices)}"
        )
    return value


def listed(values):
    """Values as a message lists them."""
    return ", ".join(map(repr, values))


def propose(value, names):
    """What to do about a value that is none of the names: the nearest, if there is one."""
    meant = closest(value, names)
    return f"Did you mean {meant!r}?" if meant else "Pass one of them."


def closest(value, names):
    """The name that a value is most like, or a part of; None if it is like none."""
    by_letters = {_letters(name): name for name in names}
    letters = _letters(value) if isinstance(value, str) else ""
    if not letters:
        return None
    related = [each for each in by_letters if letters in each or each in letters]
    nearest = difflib.get_close_matches(letters, by_letters, n=1, cutoff=0.65)
    nearest = nearest or difflib.get_close_matches(letters, related, n=1, cutoff=0)
    return by_letters[nearest[0]] if nearest else None


def _letters(name):
    return name.replace("_", "").lower()


def check_flag(name, value, optional=False):
    """True or False, or None where that is `optional`: any text would count as True."""
    if optional and value is None:
        return None
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(
            f"`{name}` must be True or False{', or None' if optional else ''}. Received: "
            f"{name}={shortened(value)}. Pass one of them."
        )
    return bool(value)


def optional(check):
    """The check of what may be None too."""
    return lambda name, value: None if value is None else check(name, value)


def check_instance(base):
    """A check whether something is an object of a class."""

    def check(name, value):
        if not isinstance(value, base):
            raise TypeError(
                f"`{name}` must be an instance of `{base.__name__}`. Received: {name}="
                f"{shortened(value)} (of type {type(value).__name__}). Make one."
            )
        return value

    return check


def check_seed(name, seed):
    if seed is None:
        return None
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise ValueError(
            f"`{name}` must be an integer from 0 to below 2 ** 32, or None. Received: "
            f"{name}={shortened(seed)}. Pass, for example, 0."
        )
    return int(seed)


def check_has_draws(what, generator):
    """What random draws need, which a layer that is made without them does not have."""
    if not isinstance(generator, keras.random.SeedGenerator):
        raise ValueError(
            f"{what} must be asked for when a layer is made, so that it has random draws. "
            f"Received: {shortened(generator)} for a `keras.random.SeedGenerator`. Make another "
            "layer."
        )


def check_model(model):
    if not isinstance(model, keras.Layer):
        raise TypeError(
            f"`model` must be a Keras model. Received: {shortened(model)} (of type "
            f"{type(model).__name__}). Pass one that `keras.Model` or `keras.Sequential` made."
        )


def check_function(name, value, *arguments, **by_name):
    """A function that can be called with so many arguments, which are named for the message.

    Args:
        name: of the function, for the message.
        value: what should be one.
        *arguments: names of those that it is given by their places.
        **by_name: those that it is given by name, with any values.
    """
    listed = ", ".join([*arguments, *by_name])
    takes = f"`{name}` must be a function of ({listed})."
    fix = f"Give it these arguments, as in `def function({listed})`; others need a default."
    if not callable(value):
        raise TypeError(
            f"{takes} Received: {name}={shortened(value)} (of type {type(value).__name__}). {fix}"
        )
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # Some functions in C do not tell.
        return value
    try:
        signature.bind(*arguments, **by_name)
    except TypeError as error:
        raise TypeError(f"{takes} Received: one of {signature} ({error}). {fix}") from error
    return value


def check_method(instance, name, *arguments, **by_name):
    """A method that subclasses of the user's may override, when one of them is made."""
    check_function(
        f"{type(instance).__name__}.{name}", getattr(instance, name), *arguments, **by_name
    )


def overrides(instance, name, base):
    """Whether its class has a method, property or attribute of its own in place of `base`'s."""
    return getattr(type(instance), name) is not getattr(base, name)


def check_scalar(name, value):
    """A number, or an array of one, as a float."""
    try:
        if isinstance(value, (str, bytes, bool, np.bool_)):
            raise TypeError("a text or a truth value")
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must be a number. Received: {name}={shortened(value)} (of type "
            f"{type(value).__name__}). Convert it first."
        ) from error


def check_has(what, layer, names):
    """What a layer must have when it is built: the user's class may override `build`."""
    for name in names:
        if getattr(layer, name, None) is None:
            raise ValueError(
                f"{what} must have `{name}` when it is built. Received: a `{type(layer).__name__}` "
                f"without it. Set `{name} = ...` in the class or in `__init__`; for a weight of "
                "the base class call `super().build(tokens_shape)` in its `build`."
            )


def check_computes_in_floats(layer):
    """A layer with kernels, which cannot learn in integers."""
    if not keras.backend.is_float_dtype(layer.compute_dtype):
        raise ValueError(
            f"`dtype` must be a float dtype or policy. Received: dtype={layer.compute_dtype!r} for "
            f"a `{type(layer).__name__}`. Pass, for example, 'float32' or 'mixed_bfloat16'."
        )


def check_path(name, path):
    """The name of a file or folder."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise TypeError(
            f"`{name}` must be a path. Received: {name}={shortened(path)} (of type "
            f"{type(path).__name__}). Pass a text or a `pathlib.Path`."
        )
    return pathlib.Path(path)


def check_name(name, value):
    """What is looked up, or called so."""
    if not isinstance(value, str) or not value:
        raise TypeError(
            f"`{name}` must be a text. Received: {name}={shortened(value)} (of type "
            f"{type(value).__name__}). Pass a name."
        )
    return value


def check_text(name, value):
    """What people read; it may be empty."""
    if not isinstance(value, str):
        raise TypeError(
            f"`{name}` must be a text. Received: {name}={shortened(value)} (of type "
            f"{type(value).__name__}). Pass a string."
        )


def check_list(name, values):
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f"`{name}` must be a list. Received: {name}={shortened(values)} (of type "
            f"{type(values).__name__}). Put it into a list."
        )
    return values


def check_routing(routing):
    if not hasattr(routing, "indices") or not hasattr(routing, "counts"):
        raise TypeError(
            "`routing` must be an `ops.Routing`. Received: an object of type "
            f"{type(routing).__name__}. Pass what a router returns, or the second of what a layer "
            "returns with `return_routing=True`."
        )


def check_training(training):
    """The flag of a call: True, False or None; texts and lists would count as True."""
    if training is None or training is True or training is False:
        return
    if is_tensor(training) and not isinstance(training, np.ndarray) and not len(training.shape):
        return
    check_flag("training", training, optional=True)


def _is_real(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def dtype_of(tensor):
    if isinstance(tensor, (np.ndarray, np.generic)):  # Keras has no name for that of strings
        return str(tensor.dtype)
    return keras.backend.standardize_dtype(tensor.dtype)


def is_tensor(value):
    # Layers have a dtype, but no shape.
    is_one = hasattr(value, "shape") and hasattr(value, "dtype")
    return is_one and not isinstance(value, (type, np.generic))


def _plain(name, value):
    """A number as one of Python's own; computation is in float32 and could not hold more."""
    if value > _LARGEST:
        raise ValueError(
            f"`{name}` must fit into float32, whose largest number is {_LARGEST:.2g}. Received: "
            f"{name}={shortened(value)}. Pass a smaller one."
        )
    # Frameworks take integers of 64 bits.
    return int(value) if is_whole(value) and value < 2**63 else float(value)


def shortened(value, length=80):
    """A value as a message shows it: its beginning; of a large array or tensor, its shape."""
    text = " ".join(repr(value).split())
    if len(text) <= length:
        return text
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{dtype_of(value)} of shape {tuple(value.shape)}>"
    return f"{text[:length]}..."


def check_pattern(name, pattern):
    """A regular expression."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`{name}` must be a regular expression. Received: {shortened(pattern)} ({error}). "
            "Escape what stands for itself, by `re.escape`."
        ) from error
