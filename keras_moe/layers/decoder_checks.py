"""Checks of what a decoder block is called with: context, cache and position."""

from collections.abc import Mapping

import numpy as np

from keras_moe._internal.shape_checks import check_shapes, known
from keras_moe._internal.tensor_checks import check_is_integer, check_mask, check_rank
from keras_moe._internal.validation import is_whole, shortened

# Axes, and what kind of dtype it is.
_SEEN = {"keys": ("BMHN", "float"), "values": ("BMHN", "float"), "mask": ("BM", "mask")}
_CONTEXT = {
    "context_keys": ("BSHN", "float"),
    "context_values": ("BSHN", "float"),
    "context_mask": ("BS", "mask"),
}


def check_has_context(cross_attention, given):
    """A context where there is cross-attention, none where there is not."""
    if cross_attention != given:
        raise ValueError(
            "A block needs a context with cross-attention, and takes none without. Received: "
            f"cross_attention={cross_attention} and {'a' if given else 'no'} context. "
            f"{'Leave `context` out' if given else 'Pass `context`'}, or make the block with "
            f"cross_attention={given}."
        )


def check_context(block, context, context_mask, batch_size):
    """A context and its mask, if there are to be any."""
    check_has_context(block.cross_attention, context is not None)
    if context is not None:
        sizes = known(B=batch_size, C=block.context_features)
        check_shapes({"context": (context, "BSC", "float")}, **sizes)
        if context_mask is not None:
            check_mask(context_mask, context.shape, "context_mask", "context")
    elif context_mask is not None:
        raise ValueError(
            "`context_mask` must be that of a context. Received: context_mask and no context. "
            "Leave it out, or pass it as `mask` if it is that of the inputs."
        )


def check_cache(block, inputs, context, context_mask, cache, position):
    """Training has neither cache nor position; decoding both, which fit each other."""
    if (cache is None) != (position is None):
        raise ValueError(
            "`cache` and `position` belong together. Received: "
            f"{'no cache' if cache is None else 'a cache'} and position={position}. "
            "Pass both to decode, none to train."
        )
    if cache is None:
        check_context(block, context, context_mask, inputs.shape[0])
        return
    if context is not None or context_mask is not None:
        raise ValueError(
            "`context` and `context_mask` must be left out with a cache, which holds them. "
            f"Received: cache and {'context' if context_mask is None else 'context_mask'}. "
            "Pass them to `make_cache` only."
        )
    _check_tensors(block, inputs, cache)
    _check_position(position, inputs.shape[1], cache["mask"].shape[1])


def _check_tensors(block, inputs, cache):
    axes = {**_SEEN, **(_CONTEXT if block.cross_attention else {})}
    missing = [name for name in axes if not isinstance(cache, Mapping) or name not in cache]
    if missing:
        raise ValueError(
            "`cache` must be what `make_cache` or an earlier call returned. Received: an object of "
            f"type {type(cache).__name__} without {missing}. Make one by `make_cache`."
        )
    check_shapes(
        {f"cache[{name!r}]": (cache[name], *fitting) for name, fitting in axes.items()},
        H=block.num_heads,
        **known(B=inputs.shape[0], N=inputs.shape[2] // block.num_heads),
    )


def as_position(position):
    """A position in a NumPy array as an integer: Keras would make a tensor of it, of any value."""
    is_on_host = isinstance(position, (np.ndarray, np.generic)) and position.ndim == 0
    return position.item() if is_on_host else position


def _check_position(position, length, room):
    if hasattr(position, "dtype") and not isinstance(position, np.generic):
        check_is_integer("position", position)
        check_rank("position", position, ())
        return
    if not is_whole(position) or position < 0:
        raise ValueError(
            "`position` must be an integer of at least 0. Received: "
            f"position={shortened(position)}. Pass the position of the first input, from 0."
        )
    if is_whole(length) and is_whole(room) and position > room - length:
        raise ValueError(
            f"The inputs must fit into the cache. Received: position={position}, "
            f"{length} tokens and a cache for {room}. Make a cache with a larger "
            "`max_length`."
        )
