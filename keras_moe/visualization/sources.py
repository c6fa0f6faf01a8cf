"""Conversion of arrays, lists or recorded routings to one routing for each layer."""

import math

import numpy as np
from keras import ops

from keras_moe._internal.checks import check_indices, check_integer
from keras_moe.ops.routing import Routing


def by_layer(source):
    """Dict of names to arrays or routings; the name of a lone array is the empty string."""
    named = source if isinstance(source, dict) else {"": source}
    if not named:
        raise ValueError("There must be a layer to draw. Received: {}")
    return {name: _joined(value) for name, value in named.items()}


def _joined(value):
    """One routing for a list of them, else an array."""
    routings = [value] if isinstance(value, Routing) else value
    if not isinstance(routings, (list, tuple)) or not isinstance(next(iter(routings), 0), Routing):
        return ops.convert_to_numpy(value)
    routings = [Routing(*map(ops.convert_to_numpy, routing[:7])) for routing in routings]
    joined = {
        name: np.concatenate([getattr(routing, name) for routing in routings])
        for name in ("indices", "weights", "probs", "logits", "mask")
    }
    sizes = [max(routing.counts.sum(), 1) for routing in routings]
    return Routing(
        **joined,
        counts=np.sum([routing.counts for routing in routings], axis=0),
        dropped=np.average([routing.dropped for routing in routings], weights=sizes),
    )


def routings(source, num_experts=None):
    """Dict of names to routings; those made from indices have no probabilities."""
    return {name: _routing(value, num_experts) for name, value in by_layer(source).items()}


def _routing(value, num_experts):
    if isinstance(value, Routing):
        return value
    if value.ndim != 2 or not value.size or value.dtype.kind not in "iu":
        raise ValueError(
            "The experts of tokens must be integers (T, K). "
            f"Received: {value.dtype} of shape {value.shape}"
        )
    if num_experts is None:
        num_experts = max(int(value.max()) + 1, 1)
    check_indices("indices", value, check_integer("num_experts", num_experts))
    counts = np.bincount(value[value >= 0], minlength=num_experts)
    mask = (value >= 0).any(axis=1)
    return Routing(value.astype("int32"), None, None, None, mask, counts, None)


def probabilities(source):
    """Dict of names to probabilities (T, E) of the real tokens."""
    found = by_layer(source)
    for name, value in found.items():
        probs = value.probs[value.mask] if isinstance(value, Routing) else value
        is_table = probs.ndim == 2 and probs.shape[1] and probs.dtype.kind == "f"
        if not is_table or not ((probs >= 0) & (probs <= 1 + 1e-4)).all():
            raise ValueError(
                "Probabilities must be floats from 0 to 1, (T, E). "
                f"Received: {probs.dtype} of shape {probs.shape}"
            )
        found[name] = probs
    return found


def labels_of_tokens(labels, num_tokens):
    """Integers or strings, one for each token; the label of a document is that of its tokens."""
    labels = ops.convert_to_numpy(labels)
    if labels.dtype.kind not in "biuUS":
        raise ValueError(f"Labels must be integers or strings. Received: labels of {labels.dtype}")
    sizes = (math.prod(labels.shape[:1]), num_tokens)
    if not labels.size or num_tokens % labels.size or labels.size not in sizes:
        raise ValueError(
            "There must be one label for each token, or for each of equally long documents. "
            f"Received: labels of shape {labels.shape} for {num_tokens} tokens"
        )
    labels = labels.reshape(-1)
    # Unsigned integers have no -1, which stands for padding.
    labels = labels.astype("int64") if labels.dtype.kind in "iu" else labels
    return np.repeat(labels, num_tokens // labels.size)
