"""Measurements of each MoE layer of a model on the data."""

import operator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe import metrics
from keras_moe._internal.checks import shortened
from keras_moe.inspection import has_moe_layers, health, moe_layers, summarize
from keras_moe.inspection.recording import recorded, running
from keras_moe.routers.logit_router import LogitRouter
from keras_moe.visualization import bits_in_common, by_layer, label_table, labels_of_tokens

BATCH_SIZE = 32


class LayerStudy(NamedTuple):
    """One layer; arrays over all positions, padding with indices of -1."""

    summary: Any
    routing: Any
    texts: list
    labels: Any
    entropy: float
    information: float | None
    findings: list


def study(model, data, labels, tokens):
    """The number of documents, and a `LayerStudy` for each MoE layer of a model."""
    arrays = _as_arrays(data)
    sizes = {len(array) if array.ndim else 0 for array in keras.tree.flatten(arrays)}
    if len(sizes) != 1 or not min(sizes):
        rule = "`data` must be arrays of the same number of documents, at least one"
        raise ValueError(f"{rule}. Received: data={shortened(data)}")
    num_documents = sizes.pop()
    layers = moe_layers(model) if has_moe_layers(model) else {}
    labels = _for_each_layer("labels", labels, layers, num_documents)
    tokens = _for_each_layer("tokens", tokens, layers, num_documents)
    batches = [
        keras.tree.map_structure(operator.itemgetter(slice(start, start + BATCH_SIZE)), arrays)
        for start in range(0, num_documents, BATCH_SIZE)
    ]
    if not layers:
        with running(model, "data", 0, batches[0]):  # nothing else would show whether it can
            model(batches[0], training=False)
        return num_documents, []
    # The first call of a layer that is called several times: it sees the tokens of the data.
    called = {
        name: routings[:: len(routings) // len(batches)]
        for name, routings in recorded(model, batches, "data").items()
        if routings
    }
    summaries = {summary.name: summary for summary in summarize(model)}
    studies = []
    for name, routing in by_layer(called).items() if called else ():
        positions, rest = divmod(len(routing.mask), num_documents)
        texts = token_texts(tokens[name], arrays, 0 if rest else positions, num_documents)
        studies.append(_study(layers[name], summaries[name], routing, labels[name], texts))
    return num_documents, studies


def _as_arrays(data):
    """Arrays in the structure of the data; a nested list of numbers is one array."""
    if isinstance(data, dict):
        return {name: _as_arrays(part) for name, part in data.items()}
    if any(len(getattr(leaf, "shape", ())) for leaf in keras.tree.flatten(data)):
        return keras.tree.map_structure(ops.convert_to_numpy, data)
    return np.asarray(data)


def _for_each_layer(argument, values, layers, num_documents):
    """Dict from the name of each layer to its labels or tokens, an entry for each document."""
    by_name = values if isinstance(values, dict) else dict.fromkeys(layers, values)
    for name, given in by_name.items():
        is_list = hasattr(given, "__len__") and not isinstance(given, str)
        fits = given is None or (is_list and len(given) == num_documents)
        if name not in layers or not fits:
            raise ValueError(
                f"`{argument}` must be a list with an entry for each of {num_documents} documents, "
                f"or a dict of such lists for layers in {list(layers)}. Received: "
                f"{len(given) if is_list else 'no'} entries, {argument}={shortened(values)}"
            )
    return {name: by_name.get(name) for name in layers}


def token_texts(tokens, arrays, positions, num_documents):
    """One string for each token of a layer, documents one after the other.

    `positions` is how many a layer has in each document; 0 if its tokens are not laid out so.
    """
    if not positions:
        return []
    if tokens is None:
        documents, length = [[f"#{place}" for place in range(positions)]] * num_documents, positions
        for array in reversed(keras.tree.flatten(arrays)):
            if array.ndim == 2 and np.issubdtype(array.dtype, np.integer):
                documents, length = array.tolist(), array.shape[1]
    else:
        documents = [text.split() if isinstance(text, str) else list(text) for text in tokens]
        lengths = [array.shape[1] for array in keras.tree.flatten(arrays) if array.ndim > 1]
        length = max([length for length in lengths if length % positions == 0], default=positions)
    size = max(length // positions, 1)
    return [
        " ".join(map(_as_text, document[place * size : (place + 1) * size]))
        for document in documents
        for place in range(positions)
    ]


def _as_text(token):
    """The text of a token; arrays (N, L, 1) and nested lists without brackets."""
    parts = keras.tree.flatten(token.tolist() if hasattr(token, "tolist") else token)
    text = " ".join(map(str, parts))
    return text if text.strip(" ") else "␣" * len(text)


def _study(layer, summary, routing, labels, texts):
    routing = routing._replace(indices=np.where(routing.mask[:, None], routing.indices, -1))
    entropy = float(metrics.router_entropy(routing))
    findings = [
        *health.judge_load(routing.counts, layer.router.min_top_k, health.balance_advice(layer)),
        *health.judge_drops(float(routing.dropped)),
        *_judge_router(layer.router, routing, entropy),
    ]
    information, labels = None, labels if texts else None  # Else documents have no places.
    if labels is not None:
        labels = labels_of_tokens(labels, len(routing.mask))
        information = bits_in_common(label_table(routing, labels)[0])
    return LayerStudy(summary, routing, texts, labels, entropy, information, findings)


def _judge_router(router, routing, entropy):
    logits = routing.logits[routing.mask]
    if not isinstance(router, LogitRouter) or not len(logits):
        return []  # A fixed router has no confidence to report.
    found = health.judge_router(entropy, health.logit_sizes(logits, router).max(initial=0))
    # Sigmoids are close to each other, however decided the router is: hints are about entropy.
    with_hints = health.fact(router, "shift_invariant")
    return [each for each in found if with_hints or each.level == health.PROBLEM]
