"""Converts arrays or recorded routings to one routing for each layer."""

import keras
import numpy as np
from keras import ops

from keras_moe._internal.shape_checks import check_fields
from keras_moe._internal.tensor_checks import check_counts, check_experts, host_values
from keras_moe._internal.validation import check_positive_integer, shortened
from keras_moe.ops.routing import Routing

# A table of experts and experts or labels holds so many squared: 400 MB.
MOST_DRAWN = 10_000


def by_layer(source):
    """Dict of names to arrays or routings; the name of a lone array is the empty string."""
    named = source if isinstance(source, dict) else {"": source}
    if not named:
        raise ValueError("There must be a layer to draw. Received: {}. Pass an array or a dict.")
    return {name: _joined(value) for name, value in named.items()}


def routings(source, num_experts=None):
    """Dict of names to routings; those made from indices have no probabilities."""
    return {name: _routing(value, num_experts) for name, value in by_layer(source).items()}


def probabilities(source):
    """Dict of names to probabilities (T, E) of the real tokens."""
    return {
        name: _checked(name, value.probs[value.mask] if isinstance(value, Routing) else value)
        for name, value in by_layer(source).items()
    }


def _checked(name, probs):
    fit = probs.ndim == 2 and probs.shape[1] and probs.dtype.kind == "f"
    if not fit or not ((probs >= 0) & (probs <= 1 + 1e-4)).all():
        is_known = probs.dtype.kind == "f" and probs.size
        values = f", from {probs.min()} to {probs.max()}" if is_known else ""
        raise ValueError(
            "Probabilities must be numbers from 0 to 1, (T, E). Received: "
            f"{probs.dtype} of shape {probs.shape}{values}{f' for {name!r}' if name else ''}. Pass "
            "`routing.probs` of a router, or leave it out."
        )
    return probs


def as_tensors(routing):
    """For the functions of `metrics`."""
    fields = {
        name: None if field is None else ops.convert_to_tensor(field)
        for name, field in routing._asdict().items()
        if name not in ("load", "details")
    }
    return Routing(**fields)


def check_can_be_drawn(what, number):
    """More rows or columns than this need more memory than a figure is worth."""
    if number > MOST_DRAWN:
        raise ValueError(
            f"A figure must have at most {MOST_DRAWN} experts or labels. Received: {what} "
            f"{number}. Number them from 0 without gaps."
        )


def as_labels(labels):
    """An array of integers or strings."""
    labels = _array("labels", labels)
    if labels.dtype.kind not in "biuUS":
        raise ValueError(
            "Labels must be integers or strings. Received: labels of "
            f"{labels.dtype}. Number them, or turn each into a text."
        )
    # -1 stands for padding.
    return labels.astype("int64") if labels.dtype.kind in "iu" else labels


def each_token(labels, num_tokens, shape=None):
    """Labels of tokens; those of documents of equal length are repeated for each token.

    `shape` is that in which they were given, if it is another.
    """
    labels = as_labels(labels)
    if labels.ndim != 1 or not len(labels) or num_tokens % len(labels):
        raise ValueError(
            "There must be one label for each token, or for each of equally long documents. "
            f"Received: labels.shape={shape or labels.shape} for {num_tokens} tokens. "
            "Flatten the labels, and repeat those of documents that differ in length."
        )
    return np.repeat(labels, num_tokens // len(labels))


def _joined(value):
    if isinstance(value, Routing):
        value = [value]
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Routing):
        for routing in value:
            check_fields(routing, "indices", "weights", "probs", "logits", "mask", "counts")
        value = [Routing(*map(ops.convert_to_numpy, routing[:7])) for routing in value]
        for routing in value:
            check_counts("routing.counts", routing.counts)
            check_experts("routing.indices", routing.indices[routing.mask], len(routing.counts))
        shapes = [(routing.indices.shape, routing.probs.shape) for routing in value]
        widths = {(tuple(indices[1:]), tuple(probs[1:])) for indices, probs in shapes}
        if len(widths) > 1:
            raise ValueError(
                "Routings of a layer must have as many experts as each other. Received: K and E of "
                f"{sorted(widths)}. Pass a dict of lists by layer."
            )
        joined = {
            name: np.concatenate([getattr(routing, name) for routing in value])
            for name in ("indices", "weights", "probs", "logits", "mask")
        }
        counts = np.sum([routing.counts for routing in value], axis=0)
        dropped = np.average(
            [routing.dropped for routing in value],
            weights=[max(routing.counts.sum(), 1) for routing in value],
        )
        return Routing(**joined, counts=counts, dropped=dropped)
    return _array("an array of a layer", value)


def _array(name, value):
    """What is given as an array; lists must be as one is."""
    if isinstance(value, keras.KerasTensor):
        raise TypeError(
            f"What is drawn must have values. Received: {name} of a symbolic tensor. Pass what a "
            "model returns."
        )
    array = host_values(value)
    if isinstance(value, (list, tuple)) and array is not None and array.dtype.kind in "US":
        if not all(isinstance(each, (str, bytes)) for each in keras.tree.flatten(value)):
            raise ValueError(
                f"What is in a list must be of one kind. Received: {name} {shortened(value)}. "
                "Pass numbers, or strings."
            )
    return np.asarray(value) if array is None else array


def _routing(value, num_experts):
    if num_experts is not None:
        check_positive_integer("num_experts", num_experts)
    if isinstance(value, Routing):
        if num_experts not in (None, len(value.counts)):
            raise ValueError(
                "`num_experts` must be that of the recorded routings. Received: num_experts="
                f"{shortened(num_experts)} for {len(value.counts)} experts. Leave it out: it is "
                "for arrays."
            )
        return value
    if value.ndim != 2 or not value.size or not np.issubdtype(value.dtype, np.integer):
        raise ValueError(
            "The experts of tokens must be integers (T, K). "
            f"Received: shape {value.shape} of {value.dtype}. Pass `routing.indices`, or what "
            "`inspection.record_routings(model, batches)` returns."
        )
    check_experts("indices", value, num_experts)
    check_can_be_drawn("num_experts", num_experts or int(value.max()) + 1)
    counts = np.bincount(value[value >= 0], minlength=num_experts or 0)
    mask = (value >= 0).any(axis=1)
    return Routing(value.astype("int32"), None, None, None, mask, counts, None)
