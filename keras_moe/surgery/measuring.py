"""Measures of experts on given data.

Axes: T tokens, E experts, K experts per token.
"""

import functools

import keras
import numpy as np
from keras import ops

from keras_moe.backend import backend
from keras_moe.inspection.recording import listening, running
from keras_moe.ops.plans import GroupedPlan


def loss_on(model, data):
    """The loss of a compiled model on batches with targets, else None."""
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 or batch[1] is None:
            return None
    if not data or not getattr(model, "compiled", False):
        return None
    losses, sizes = [], []
    for number, batch in enumerate(data):
        model.reset_metrics()
        with running(number, batch):
            losses.append(float(model.test_on_batch(*batch, return_dict=True)["loss"]))
        sizes.append(keras.tree.flatten(batch[0])[0].shape[0])
    model.reset_metrics()
    return float(np.average(losses, weights=sizes))


MEASURES = ("usage", "saliency", "contribution")


def importance(by, model, layers, data):
    """One of `MEASURES` of each expert, (E,) for each layer by name.

    Over the tokens t that go to expert e, "usage" is their number (its share of their weights where
    all experts serve all tokens), "contribution" the sum of what it adds to them, `w_te
    ||f_e(x_t)||`, and "saliency" the mean of that, 0 without tokens: eq. 9 of REAP.
    """
    if by == "usage":
        return _summed(model, layers, data, _counts)[0]
    sums, counts = _summed(model, layers, data, _contributions, _served_tokens)
    saliency = {name: sums[name] / np.maximum(counts[name], 1.0) for name in layers}
    return sums if by == "contribution" else saliency


def usage_and_similarity(model, layers, data):
    """The usage, and the correlation of the logits of two experts over the tokens, (E, E).

    The mean logit of each token is subtracted, as it changes no softmax.
    """
    counts, products = _summed(model, layers, data, _counts, _products)
    norms = {name: np.sqrt(np.maximum(np.diag(each), 1e-12)) for name, each in products.items()}
    return counts, {name: products[name] / np.outer(norms[name], norms[name]) for name in layers}


def _counts(layer, routing, tokens):
    return routing.counts


def _served_tokens(layer, routing, tokens):
    # The counts of a dense gate are sums of its weights.
    return backend.count_integers(ops.convert_to_tensor(routing.indices), len(routing.counts))


def _contributions(layer, routing, tokens):
    """Sum over the tokens (T, ...) of each expert of weight times norm of its output, (E,)."""
    num_experts = layer.experts.num_experts
    plan = GroupedPlan.of(routing.indices, routing.weights, num_experts)
    outputs = layer.experts.compute_each(tokens, plan)
    squares = ops.square(ops.cast(outputs, "float32"))
    norms = ops.sqrt(ops.sum(squares, axis=tuple(range(2, len(outputs.shape)))))
    # Unserved assignments, whose outputs are zero, go to a spare expert that is sliced off.
    indices = routing.indices % (num_experts + 1)
    added = ops.reshape(norms * routing.weights, (-1,))
    return ops.segment_sum(added, ops.reshape(indices, (-1,)), num_experts + 1)[:-1]


def _products(layer, routing, tokens):
    logits = routing.logits - ops.mean(routing.logits, axis=-1, keepdims=True)
    logits = ops.where(ops.expand_dims(routing.mask, 1), logits, 0.0)
    return ops.matmul(ops.transpose(logits), logits)


def _summed(model, layers, data, *measures):
    """The sum of each measure over the data, a float64 array for each of the layers by name."""
    totals = [dict.fromkeys(layers, 0.0) for _ in measures]
    not_finite = set()

    def add(name, routing, tokens):
        logits = ops.where(ops.expand_dims(routing.mask, 1), routing.logits, 0.0)
        if not ops.all(ops.isfinite(logits)):
            not_finite.add(name)
        for total, measure in zip(totals, measures):
            value = ops.convert_to_numpy(measure(layers[name], routing, tokens))
            total[name] = total[name] + value.astype("float64")

    with listening({layer: functools.partial(add, name) for name, layer in layers.items()}):
        for number, batch in enumerate(data):
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            with running(number, inputs):
                model(inputs, training=False)
    if not_finite or not any(np.any(total) for total in totals[0].values()):
        rule = "Experts must be measured on `data`: batches in which they serve tokens"
        wrong = f", NaN or infinite logits in {sorted(not_finite)}" if not_finite else ""
        raise ValueError(f"{rule}. Received: {len(data)} batches{wrong}")
    return totals
