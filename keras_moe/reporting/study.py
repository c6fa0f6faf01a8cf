"""Measurements of each MoE layer of a model on the data."""

import math
import operator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe import metrics
from keras_moe._internal.batches import running
from keras_moe._internal.checks import shortened
from keras_moe.inspection import has_moe_layers, health, moe_layers, summarize
from keras_moe.inspection.recording import recorded
from keras_moe.reporting.texts import token_texts
from keras_moe.routers.logit_router import LogitRouter
from keras_moe.visualization.labels import bits_in_common, label_table
from keras_moe.visualization.sources import by_layer, labels_of_tokens

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
        raise ValueError(
            "`data` must be arrays of the same number of documents, at least one. "
            f"Received: data={shortened(data)}"
        )
    num_documents = sizes.pop()
    layers = moe_layers(model) if has_moe_layers(model) else {}
    labels = _by_layer("labels", labels, layers, num_documents)
    tokens = _by_layer("tokens", tokens, layers, num_documents)
    batches = list(_batches(arrays, num_documents))
    if not layers:
        with running(model, "data", 0, batches[0]):  # nothing else would show whether it can
            model(batches[0], training=False)
        return num_documents, []
    # The first call of a layer that is called several times: its tokens are those of the data.
    called = {
        name: routings[:: len(routings) // len(batches)]
        for name, routings in recorded(model, batches, "data").items()
        if routings
    }
    summaries = {summary.name: summary for summary in summarize(model)}
    studies = []
    for name, routing in by_layer(called).items() if called else ():
        num_tokens = len(routing.mask)
        positions = num_tokens // num_documents if num_tokens % num_documents == 0 else 0
        texts = token_texts(tokens[name], arrays, positions, num_documents)
        studies.append(_study(layers[name], summaries[name], routing, labels[name], texts))
    return num_documents, studies


def _as_arrays(data):
    """Arrays in the structure of the data; a nested list of numbers is one array."""
    if isinstance(data, dict):
        return {name: _as_arrays(part) for name, part in data.items()}
    if any(len(getattr(leaf, "shape", ())) for leaf in keras.tree.flatten(data)):
        return keras.tree.map_structure(ops.convert_to_numpy, data)
    return np.asarray(data)


def _by_layer(argument, values, layers, num_documents):
    """Dict from the name of each layer to its labels or tokens, an entry for each document."""
    for given in values.values() if isinstance(values, dict) else [values]:
        if given is not None and _length(given) != num_documents:
            raise ValueError(
                f"`{argument}` must be a list with an entry for each document. Received: "
                f"{_length(given)} entries for {num_documents} documents, {shortened(given)}"
            )
    if not isinstance(values, dict):
        return dict.fromkeys(layers, values)
    if not values.keys() <= layers.keys():
        raise ValueError(
            f"`{argument}` as a dict must have names of MoE layers for keys, of {list(layers)}. "
            f"Received: {list(values)}"
        )
    return {name: values.get(name) for name in layers}


def _length(values):
    is_list = not isinstance(values, str) and hasattr(values, "__len__")
    return len(values) if is_list and getattr(values, "shape", None) != () else "no"


def _batches(arrays, num_documents):
    for start in range(0, num_documents, BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        yield keras.tree.map_structure(operator.itemgetter(part), arrays)


def _study(layer, summary, routing, labels, texts):
    routing = routing._replace(indices=np.where(routing.mask[:, None], routing.indices, -1))
    entropy = float(metrics.router_entropy(routing)) / math.log(max(summary.num_experts, 2))
    findings = [
        *health.judge_load(routing.counts, layer.router.min_top_k, layer.balance_advice()),
        *health.judge_drops(float(routing.dropped)),
        *_judge_router(layer.router, routing, entropy),
    ]
    information = None
    if not texts:  # the layer has no place for each document
        labels = None
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
    return [each for each in found if router.shift_invariant or each.level == health.PROBLEM]
