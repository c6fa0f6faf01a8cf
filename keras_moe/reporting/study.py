"""Runs the model on the data and measures each of its MoE layers."""

from typing import Any, NamedTuple

import keras
import numpy as np

from keras_moe import health, metrics
from keras_moe._internal.batches import running
from keras_moe._internal.validation import listed, shortened
from keras_moe.inspection import has_moe_layers, moe_layers, summarize
from keras_moe.inspection.recording import recorded
from keras_moe.reporting.texts import positions_of, token_texts
from keras_moe.routers.logit_router import LogitRouter
from keras_moe.visualization.labels import bits_in_common, label_table
from keras_moe.visualization.sources import as_labels, as_tensors, by_layer, each_token

BATCH_SIZE = 32


class LayerStudy(NamedTuple):
    """What is known about one layer; arrays over all positions, padding with indices of -1."""

    summary: Any
    routing: Any
    texts: list
    labels: Any
    counts: Any
    entropy: float
    dropped: float
    information: float | None
    findings: list


class Study(NamedTuple):
    """`num_documents` and one `LayerStudy` for each layer."""

    num_documents: int
    layers: list


def study(model, data, labels, tokens):
    """A `Study`; without layers, if the model has none."""
    arrays = keras.tree.map_structure(np.asarray, data)
    sizes = {len(array) for array in keras.tree.flatten(arrays) if array.ndim}
    if not sizes:
        raise TypeError(
            "`data` must be an array, or a list or dict of arrays. Received: "
            f"data={shortened(data)} (of type {type(data).__name__}). Pass `np.array(data)`."
        )
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(
            "`data` must hold at least one document, and as many in each of its arrays. Received: "
            f"arrays of {listed(sorted(sizes))} documents. Pass what the model takes, with a batch "
            "axis."
        )
    num_documents = sizes.pop()
    layers = moe_layers(model) if has_moe_layers(model) else {}
    labels = _by_layer("labels", labels, layers, num_documents)
    tokens = _by_layer("tokens", tokens, layers, num_documents)
    batches = list(_batches(arrays, num_documents))
    if not layers:
        with running(model, "data", 0, batches[0]):  # nothing else would tell whether it can
            model(batches[0], training=False)
        return Study(num_documents, [])
    by_name = recorded(model, batches, "data")
    # The first call of a layer that is called several times: its tokens are those of the data.
    called = {
        name: routings[:: len(routings) // len(batches)]
        for name, routings in by_name.items()
        if routings
    }
    joined = by_layer(called) if called else {}
    summaries = {summary.name: summary for summary in summarize(model)}
    return Study(
        num_documents,
        [
            _study_layer(
                layers[name],
                summaries[name],
                routing,
                labels[name],
                token_texts(
                    tokens[name], arrays, positions_of(routing, num_documents), num_documents
                ),
            )
            for name, routing in joined.items()
        ],
    )


def _is_sequence(values):
    sized = hasattr(values, "__len__") and not isinstance(values, str)
    return sized and getattr(values, "shape", None) != ()


def _by_layer(argument, values, layers, num_documents):
    """Dict from the name of each layer to what is given for it, an entry for each document."""
    for given in values.values() if isinstance(values, dict) else [values]:
        if given is not None and (not _is_sequence(given) or len(given) != num_documents):
            received = f"{len(given)} entries" if _is_sequence(given) else shortened(given)
            raise ValueError(
                f"`{argument}` must be a sequence with an entry for each document. Received: "
                f"{received} for {num_documents} documents. Pass those of these documents, in "
                "their order."
            )
    if not isinstance(values, dict):
        return dict.fromkeys(layers, values)
    unknown = sorted(values.keys() - layers.keys())
    if unknown:
        raise ValueError(
            f"`{argument}` as a dict must have names of MoE layers for keys. Received: "
            f"{listed(unknown)}. Choose from {listed(layers)}."
        )
    return {name: values.get(name) for name in layers}


def _batches(arrays, num_documents):
    for start in range(0, num_documents, BATCH_SIZE):
        stop = start + BATCH_SIZE
        yield keras.tree.map_structure(lambda array: array[start:stop], arrays)  # noqa: B023


def _study_layer(layer, summary, routing, labels, texts):
    indices = np.where(routing.mask[:, None], routing.indices, -1)
    routing = routing._replace(indices=indices)
    probs = routing.probs[routing.mask]
    entropy = float(metrics.router_entropy(as_tensors(routing))) / np.log(
        max(summary.num_experts, 2)
    )
    largest = health.logit_sizes(routing.logits[routing.mask], layer.router).max(initial=0)
    load = health.judge_load(routing.counts, layer.router.min_top_k, layer.balance_advice())
    # A fixed router has no confidence to report.
    decides = isinstance(layer.router, LogitRouter) and len(probs)
    router = health.judge_router(entropy, largest) if decides else []
    if not layer.router.shift_invariant:
        # Sigmoids are close to each other, however decided the router is: hints are about entropy.
        router = [finding for finding in router if finding.level == health.PROBLEM]
    findings = [*load, *health.judge_drops(routing.dropped), *router]
    information = None
    if not texts:  # the layer has no place for each document
        labels = None
    if labels is not None:
        labels = as_labels(labels)
        labels = each_token(labels.reshape(-1), len(indices), labels.shape)
        information = bits_in_common(label_table(routing, labels)[0])
    return LayerStudy(
        summary,
        routing,
        texts,
        labels,
        routing.counts,
        entropy,
        float(routing.dropped),
        information,
        findings,
    )


def imbalance(counts):
    return float(metrics.load_imbalance(counts))
