"""Checks of tensors and arrays: their dtype, their rank, and the values of arrays.

Values in tensors are not checked: to look at them would wait for the device.
"""

import math
import numbers

import keras
import numpy as np

from keras_moe._internal.validation import (
    check_positive_integer,
    dtype_of,
    is_symbol,
    is_tensor,
    is_whole,
    shortened,
)


def check_float_inputs(inputs, name="inputs"):
    if not keras.backend.is_float_dtype(inputs.dtype):
        raise TypeError(
            f"`{name}` must be a float tensor. Received: {name}.dtype="
            f"{keras.backend.standardize_dtype(inputs.dtype)}. Embed or cast integers first."
        )


def check_tensor(name, value):
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(
            f"`{name}` must be a tensor or an array. Received: {name}={shortened(value)} (of type "
            f"{type(value).__name__}). Convert it by `keras.ops.convert_to_tensor`."
        )


def check_array(name, value):
    """A tensor, or an array of numbers: Keras makes a tensor of it before a layer's `call`."""
    check_tensor(name, value)
    check_host_numbers(**{name: value})


def check_numbers(name, values):
    """A tensor, or what can be made one: numbers, lists and arrays of them."""
    array = host_values(values)
    if array is None:
        check_tensor(name, values)
    elif array.dtype.kind not in "biuf" and "float" not in str(array.dtype):
        raise TypeError(
            f"`{name}` must hold numbers. Received: {name}={shortened(values)}. Convert it first."
        )


def check_is_float(name, tensor):
    _check_is_of("float", name, tensor, "a float tensor", "Cast it, for example to float32.")


def check_is_number(name, tensor):
    """A tensor of floats or integers."""
    _check_is_of("number", name, tensor, "a tensor of numbers", "Cast it, for example to float32.")


def check_is_scalar(what, value, source):
    """What a function of the user's own returned as a loss: one float."""
    shape = () if isinstance(value, numbers.Real) else getattr(value, "shape", None)
    if shape is None or len(shape):
        received = f"type {type(value).__name__}" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(
            f"{what} must be one number. Received: a value of {received} from {source}. Return, "
            "for example, its `keras.ops.mean`."
        )
    if isinstance(value, bool) or (hasattr(value, "dtype") and not is_of("float", value)):
        received = "bool" if isinstance(value, bool) else dtype_of(value)
        raise TypeError(
            f"{what} must be a float. Received: a value of {received} from {source}. An integer "
            "has no gradient: compute in float32."
        )
    return value


def check_is_integer(name, tensor):
    fix = "Pass whole numbers, for example of int32."
    _check_is_of("int", name, tensor, "an integer tensor", fix)


def _check_is_of(kind, name, tensor, wanted, fix):
    check_tensor(name, tensor)
    if not is_of(kind, tensor):
        raise TypeError(
            f"`{name}` must be {wanted}. Received: {name}.dtype={dtype_of(tensor)}. {fix}"
        )


def check_token_ids(token_ids, num_tokens):
    """Vocabulary ids, one for each token, in any shape."""
    check_is_integer("token_ids", token_ids)
    sizes = tuple(token_ids.shape)
    known = all(isinstance(size, int) for size in (*sizes, num_tokens))
    if known and math.prod(sizes) != num_tokens:
        raise ValueError(
            "`token_ids` must have an id for each token. Received: "
            f"token_ids.shape={sizes} for {num_tokens} tokens. Pass the ids of these tokens."
        )


def check_size(name, value):
    """A size that may be an integer tensor, whose value is not checked."""
    if not is_tensor(value):
        return check_positive_integer(name, value)
    check_is_integer(name, value)
    check_rank(name, value, ())
    return value


def check_rank(name, tensor, axes):
    check_tensor(name, tensor)
    if len(tensor.shape) != len(axes):
        raise ValueError(
            f"`{name}` must have the shape ({', '.join(axes)}{',' * (len(axes) == 1)}). Received: "
            f"{name}.shape={tuple(tensor.shape)}. Reshape it."
        )


def check_divides(name, length, num_tokens):
    """A sequence length against the number of tokens; what is a tensor is not checked."""
    if length is None:
        return
    if not is_symbol(length):
        check_size(name, length)
    if is_whole(num_tokens) and is_whole(length) and num_tokens % length:
        raise ValueError(
            f"`{name}` must divide the number of tokens. Received: {name}={length}, {num_tokens} "
            "tokens. Pass the length of the padded sequences."
        )


def check_counts(name, counts, axes=("E",)):
    """Numbers of assignments: of their rank, and not negative, if they are on the host."""
    array = host_values(counts)
    check_rank(name, counts if array is None else array, axes)
    if array is None:
        return
    numeric = array.dtype.kind in "biuf" and array.size
    if not numeric or not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(
            f"`{name}` must be finite numbers of at least 0, one or more. Received: "
            f"{name}={shortened(counts)}. Pass counts of assignments."
        )


def check_experts(name, indices, num_experts=None, least=-1):
    """Experts of tokens (T, K), -1 for none: in range, if they are on the host."""
    array = host_values(indices)
    check_is_integer(name, indices if array is None else array)
    check_rank(name, indices if array is None else array, ("T", "K"))
    if array is None:
        return
    limit = np.inf if num_experts is None else num_experts
    if ((array < least) | (array >= limit)).any():
        experts = "0 and up" if num_experts is None else f"from 0 to {num_experts - 1}"
        if least < 0:
            experts += ", or -1 for none"
        raise ValueError(
            f"`{name}` must be experts {experts}. Received: experts from "
            f"{array.min()} to {array.max()}. Pass the `indices` of a routing."
        )


def check_replayed(indices, num_experts):
    """Experts (T, K) of which no token has one twice, if they are on the host."""
    check_experts("indices", indices, num_experts)
    array = host_values(indices)
    if array is None:
        return
    ordered = np.sort(array, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError(
            "`indices` must name different experts for a token. Received: one twice. "
            "Put -1 in the second place."
        )


def check_host_integers(name, values):
    """Integers, if they are in an array: a framework would fail on text in its own words."""
    if isinstance(values, np.ndarray):
        check_is_integer(name, values)


def check_host_numbers(**arrays):
    """Numbers, if they are in an array: see `check_host_integers`."""
    for name, values in arrays.items():
        if isinstance(values, np.ndarray):
            check_numbers(name, values)


def host_values(values):
    """An array of what is on the host: numbers, lists and NumPy arrays; None for tensors."""
    if isinstance(values, (np.ndarray, np.generic, numbers.Number)):
        return np.asarray(values)
    if not isinstance(values, (list, tuple)):
        return None
    if any(hasattr(value, "shape") for value in keras.tree.flatten(values)):
        return None
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(
            "Lists must be as an array is: all of one length. Received: "
            f"{shortened(values)}. Fill the shorter ones."
        ) from error


def check_mask(mask, inputs_shape, name="mask", of="inputs"):
    """A mask has the shape of the inputs without the feature axis; None fits any size."""
    rule = f"`{name}` must be a tensor of bools, or of integers."
    if not is_tensor(mask):
        raise TypeError(f"{rule} Received: {name}={shortened(mask)}. Pass `ids != 0`, say.")
    mask_shape, leading = tuple(mask.shape), tuple(inputs_shape)[:-1]
    if not fits(mask_shape, leading):
        raise ValueError(
            f"`{name}` must have the shape of `{of}` without the last axis. Received: "
            f"{name}.shape={mask_shape}, {of}.shape={tuple(inputs_shape)}. "
            f"Pass a bool mask of shape {leading}, False for padding."
        )
    if not is_of("mask", mask):
        raise TypeError(f"{rule} Received: {name}.dtype={dtype_of(mask)}. Pass `{name} > 0`, say.")


def fits(shape, expected):
    """Whether a shape may be the expected one; None fits any size."""
    return len(shape) == len(expected) and all(
        a is None or b is None or a == b for a, b in zip(shape, expected)
    )


# Words of which one is in the names of all dtypes of a kind, whatever framework names them.
_WORDS = {"float": ("float",), "int": ("int",), "mask": ("bool", "int"), "number": ("float", "int")}


def is_of(kind, tensor):
    """Whether the dtype of a tensor is of a kind: "float", "int", "mask" or "number"."""
    dtype = str(tensor.dtype)
    words = _WORDS[kind]
    return words[0] in dtype or words[-1] in dtype
