"""From what users have - arrays, or recorded routings - to one array of choices a layer."""

from typing import Any, NamedTuple

import numpy as np

from keras_moe.ops.routing import Routing


class Choices(NamedTuple):
    """What a layer decided: `indices` (T, K) with -1 for no expert, and the number of experts."""

    indices: Any
    num_experts: int


def by_layer(source):
    """Dict of names to arrays or routings; what has no name is called the empty string."""
    named = source if isinstance(source, dict) else {"": source}
    if not named:
        raise ValueError("There must be a layer to draw. Received: {}. Pass an array or a dict.")
    return {name: _joined(value) for name, value in named.items()}


def choices(source, num_experts=None):
    """Dict of names to `Choices`. Padding stays as rows of -1, in step with labels."""
    return {name: _choices(value, num_experts) for name, value in by_layer(source).items()}


def probabilities(source):
    """Dict of names to probabilities (T, E) of the real tokens."""
    return {
        name: value.probs[value.mask] if isinstance(value, Routing) else value
        for name, value in by_layer(source).items()
    }


def each_token(labels, num_tokens):
    """Labels of tokens; those of documents of equal length are repeated for each token."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or num_tokens % len(labels):
        raise ValueError(
            "There must be one label for each token, or for each of equally long documents. "
            f"Received: labels.shape={labels.shape} for {num_tokens} tokens. "
            "Flatten the labels, and repeat those of documents that differ in length."
        )
    return np.repeat(labels, num_tokens // len(labels))


def _joined(value):
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Routing):
        fields = zip(*(routing[:5] for routing in value))
        counts = sum(routing.counts for routing in value)
        return Routing(*map(np.concatenate, fields), counts=counts, dropped=None)
    if isinstance(value, Routing):
        return Routing(*(np.asarray(field) for field in value))
    return np.asarray(value)


def _choices(value, num_experts):
    if isinstance(value, Routing):
        indices = np.where(value.mask[:, None], value.indices, -1)
        return Choices(indices, value.probs.shape[1])
    if value.ndim != 2 or not np.issubdtype(value.dtype, np.integer):
        raise ValueError(
            "The experts of tokens must be integers (T, K). "
            f"Received: shape {value.shape} of {value.dtype}. Pass `routing.indices`."
        )
    return Choices(value, num_experts or int(value.max(initial=0)) + 1)
