"""Conversion of the inputs of a layer to tokens, and of tokens to outputs.

Axes: T tokens, all leading axes of the inputs flattened; D features of a token.
"""

import math
from typing import Any, NamedTuple

from keras import ops

from keras_moe._internal.checks import check_tensors
from keras_moe._internal.keras_internals import get_keras_mask, set_keras_mask
from keras_moe.ops.routing import Routing
from keras_moe.ops.sorting import as_dtype, at_least


class Tokens(NamedTuple):
    """Tokens of inputs (batch, ..., D), zero where they are padding.

    - `values` (T, D): the tokens; a token that is no vector keeps its axes.
    - `vectors` (T, D''): what the router sees of each token.
    - `mask` (T,) bool: False for padding. None without a mask.
    - `sizes`: sizes of the axes that count tokens, (batch, ...).
    - `sequence_length`: tokens of a sequence, all axes but the first; None if there is one axis.
    """

    values: Any
    vectors: Any
    mask: Any
    sizes: tuple
    sequence_length: Any

    @classmethod
    def of(cls, inputs, mask=None, token_axes=None, router_inputs=None, token_ids=None):
        """The tokens of the inputs of a call, whose tensors are checked."""
        num_axes = token_axes or len(inputs.shape) - 1
        mask = check_call(inputs, mask, num_axes, router_inputs, token_ids)
        values = _flatten(inputs, mask, num_axes)
        vectors = values if router_inputs is None else _flatten(router_inputs, mask, num_axes)
        if len(vectors.shape) > 2:
            vectors = ops.reshape(vectors, (-1, math.prod(vectors.shape[1:])))
        sizes = ops.shape(inputs)[:num_axes]
        length = at_least(1, math.prod(sizes[1:])) if num_axes > 1 else None
        mask = None if mask is None else ops.reshape(mask, (-1,))
        return cls(values, vectors, mask, sizes, length)

    def unflatten(self, values, dtype):
        """Values (T, ...) with the leading axes of the inputs, in a dtype."""
        if len(self.sizes) > 1:
            values = ops.reshape(values, (*self.sizes, *values.shape[1:]))
        return as_dtype(values, dtype)


def _flatten(inputs, mask, num_axes):
    # Padding may hold anything, NaN included, which no product with a zero weight removes.
    inputs = inputs if mask is None else zero_padding(inputs, mask)
    if len(inputs.shape) == 2:  # as they are
        return inputs
    return ops.reshape(inputs, (-1, *inputs.shape[num_axes:]))


def zero_padding(values, mask):
    """Values (batch, ..., ...), zero where a mask (batch, ...) is False."""
    for _ in range(len(values.shape) - len(mask.shape)):
        mask = ops.expand_dims(mask, -1)
    return ops.where(mask, values, 0.0)


def token_shape(shape, token_axes=None, name="inputs"):
    """The shape of a token: all axes of the inputs after `token_axes`, or the last one."""
    if isinstance(shape, dict) or any(isinstance(size, (list, tuple)) for size in shape):
        raise ValueError(f"`{name}` must be one tensor. Received: tensors of shapes {shape}")
    num_axes = token_axes or len(shape) - 1
    of_token = tuple(shape[num_axes:])
    if None in of_token or not of_token or not num_axes:
        raise ValueError(
            f"`{name}` must have at least one axis of tokens and a known shape of each token. "
            f"Received: {name}.shape={tuple(shape)}, token_axes={token_axes}"
        )
    return of_token


def check_call(inputs, mask, num_axes, router_inputs=None, token_ids=None):
    """Check the shapes of a call, and return the mask as bools, or None."""
    if type(inputs).__name__ in ("SparseTensor", "RaggedTensor", "BCOO"):
        rule = "`inputs` must be dense, with a `mask` where they are padded"
        raise TypeError(f"{rule}. Received: a {type(inputs).__name__}")
    # Keras passes a mask on by itself only if the inputs are the only tensor of a call.
    of_inputs = get_keras_mask(inputs)
    if of_inputs is not None:
        mask = of_inputs if mask is None else mask
        if len(mask.shape) == len(of_inputs.shape) != num_axes:
            mask = None  # it masks parts of a sample, which is a token as a whole
    letters = "abcdefghij"
    axes, sample = letters[:num_axes], letters[num_axes : len(inputs.shape)].upper()
    given = {"inputs": (inputs, axes + sample, "float")}
    if router_inputs is not None:
        own = "RSTUVW"[: max(1, len(router_inputs.shape) - num_axes)]
        given["router_inputs"] = (router_inputs, axes + own, "float")
    if mask is not None:
        mask = ops.convert_to_tensor(mask)
        given["mask"] = (mask, axes, "mask")
    if token_ids is not None:
        given["token_ids"] = (ops.convert_to_tensor(token_ids), axes, "int")
    check_tensors(**given)
    return None if mask is None else ops.cast(mask, "bool")


def pass_mask_on(num_axes, outputs, *others):
    """Give the Keras mask of the outputs to a routing and to the outputs of single experts."""
    mask = get_keras_mask(outputs)
    if mask is None or len(mask.shape) != num_axes:
        return
    for each in others:
        if isinstance(each, Routing):
            for field in (each.indices, each.weights, each.probs, each.logits):
                set_keras_mask(field, ops.reshape(mask, (-1,)))
        else:  # An expert is one more axis, and losses take masks of all axes but the last.
            mask_of_each = ops.repeat(ops.expand_dims(mask, -1), each.shape[num_axes], axis=-1)
            set_keras_mask(each, mask_of_each)
