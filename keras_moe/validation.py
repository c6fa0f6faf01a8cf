"""Checks of arguments: each error states the rule, what was received, and the fix."""

import difflib
import numbers

import keras


def check_positive_integer(name, value):
    if not is_whole(value) or value < 1:
        raise ValueError(
            f"`{name}` must be a positive integer. Received: {name}={value!r}. "
            "Pass an integer of at least 1."
        )


def check_top_k(top_k, num_experts, router="TopKRouter", name="top_k"):
    check_positive_integer(name, top_k)
    if top_k > num_experts:
        raise ValueError(
            f"`{name}` must be at most `num_experts`: a token cannot go to more experts than "
            f"there are. Received: {name}={top_k}, num_experts={num_experts}. "
            f"Pass `{name}={num_experts}` or fewer to `routers.{router}`."
        )


def is_whole(value):
    """Whether a value is an integer, of Python or NumPy, and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_fraction(name, value, fix="Pass 0 to turn it off."):
    if not _is_real(value) or not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be a number from 0 to below 1. Received: {name}={value!r}. {fix}"
        )


def check_not_negative(name, value):
    if not _is_real(value) or not 0 <= value < float("inf"):
        raise ValueError(
            f"`{name}` must be a finite number of at least 0. Received: {name}={value!r}. "
            "Pass 0 to turn it off."
        )


def check_positive_number(name, value, example=1.25):
    if not _is_real(value) or not 0 < value < float("inf"):
        raise ValueError(
            f"`{name}` must be a finite number above 0. Received: {name}={value!r}. "
            f"Pass, for example, {example}."
        )


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}. Received: {name}={value!r}. "
            f"{propose(value, choices)}"
        )


def propose(value, names):
    """What to do about a value that is none of the names: the nearest, if there is one."""
    nearest = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f"Did you mean {nearest[0]!r}?" if nearest else "Pass one of them."


def check_float_inputs(inputs):
    if not keras.backend.is_float_dtype(inputs.dtype):
        raise TypeError(
            "`inputs` must be a float tensor. Received: inputs.dtype="
            f"{keras.backend.standardize_dtype(inputs.dtype)}. Embed or cast integers first."
        )


def check_mask(mask_shape, inputs_shape):
    """A mask has the shape of the inputs without the feature axis; None fits any size."""
    mask_shape, leading = tuple(mask_shape), tuple(inputs_shape)[:-1]
    if not fits(mask_shape, leading):
        raise ValueError(
            "`mask` must have the shape of the inputs without their last axis. Received: "
            f"mask.shape={mask_shape}, inputs.shape={tuple(inputs_shape)}. "
            f"Pass a bool mask of shape {leading}, False for padding."
        )


def fits(shape, expected):
    """Whether a shape may be the expected one; None fits any size."""
    return len(shape) == len(expected) and all(
        a is None or b is None or a == b for a, b in zip(shape, expected)
    )


def _is_real(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
