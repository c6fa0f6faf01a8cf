"""What experts do on given data.

Axes: T tokens, E experts, K experts per token.
"""

import keras
import numpy as np
from keras import ops

from keras_moe._internal.batches import running
from keras_moe._internal.validation import listed
from keras_moe.inspection.recording import listening
from keras_moe.metrics.specialization import contributions


def check_batch(batch):
    """Inputs, or a tuple of inputs, targets and weights of as many examples."""
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    leaves = [leaf for leaf in keras.tree.flatten(parts) if hasattr(leaf, "shape")]
    sizes = {leaf.shape[0] if len(leaf.shape) else None for leaf in leaves}
    if not 1 <= len(parts) <= 3 or len(sizes) != 1:
        raise ValueError(
            "A batch must be inputs, or a tuple of inputs, targets and weights of as many "
            f"examples. Received: {len(parts)} parts, arrays of "
            f"{listed(sorted(sizes, key=str))} examples. Pass `data=[inputs]` or "
            "`data=[(inputs, targets), ...]`."
        )
    if sizes == {0}:
        raise ValueError(
            "A batch must have examples. Received: arrays of 0 examples. Leave the batch out."
        )


def inputs_of(batch):
    """The inputs of a batch that may have targets and weights behind them."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def loss_on(model, data):
    """The loss of a compiled model on batches with targets, else None."""
    has_targets = all(isinstance(batch, (tuple, list)) and len(batch) > 1 for batch in data)
    if not data or not has_targets or not getattr(model, "compiled", False):
        return None
    losses, sizes = [], []
    for number, batch in enumerate(data):
        model.reset_metrics()
        with running(model, "data", number, batch[0], batch[1:]):
            losses.append(float(model.test_on_batch(*batch, return_dict=True)["loss"]))
        if not np.isfinite(losses[-1]):
            raise ValueError(
                "The loss on the data must be finite before experts go. Received: "
                f"{losses[-1]}. Look for NaN in inputs, targets, weights and the model."
            )
        sizes.append(keras.tree.flatten(batch[1])[0].shape[0])
    model.reset_metrics()
    return float(np.average(losses, weights=sizes))


def usage(model, layers, data):
    """How many tokens of the data go to each expert, (E,) for each layer by name."""
    (counts,) = _summed(model, layers, data, _counts)
    return counts


def saliency(model, layers, data):
    """Mean over its tokens of what each expert adds to them, (E,) for each layer by name.

    `mean_t w_te ||f_e(x_t)||` over the tokens t that go to expert e. 0 without tokens. Lasby et
    al. 2025, REAP (arXiv:2510.13999), eq. 9.
    """
    sums, counts = _summed(model, layers, data, contributions, _counts)
    return {name: sums[name] / np.maximum(counts[name], 1.0) for name in layers}


def contribution(model, layers, data):
    """What each expert adds to all its tokens together, (E,) for each layer by name.

    `sum_t w_te ||f_e(x_t)||` over the tokens t that go to expert e.
    """
    (sums,) = _summed(model, layers, data, contributions)
    return sums


def usage_and_similarity(model, layers, data):
    """`usage`, and the correlation of the logits of two experts over the tokens, (E, E).

    Without what all logits of a token share, which changes no softmax. Li et al. 2024
    (arXiv:2310.01334), section 3.2, compares logits too.
    """
    counts, products = _summed(model, layers, data, _counts, _products)
    norms = {name: np.sqrt(np.maximum(np.diag(each), 1e-12)) for name, each in products.items()}
    return counts, {name: products[name] / np.outer(norms[name], norms[name]) for name in layers}


def _counts(layer, routing, tokens):
    return ops.cast(routing.counts, "float32")


def _products(layer, routing, tokens):
    logits = routing.logits - ops.mean(routing.logits, axis=-1, keepdims=True)
    logits = ops.where(ops.expand_dims(routing.mask, 1), logits, 0.0)
    return ops.matmul(ops.transpose(logits), logits)


def _summed(model, layers, data, *measures):
    """The sum of each measure over the data, a float64 array for each of the layers by name."""
    totals = [dict.fromkeys(layers, 0.0) for _ in measures]
    finite = dict.fromkeys(layers, True)

    def listener(name, layer):
        def add(routing, tokens):
            finite[name] &= _is_finite(routing)
            for total, measure in zip(totals, measures):
                value = ops.convert_to_numpy(measure(layer, routing, tokens))
                total[name] = total[name] + value.astype("float64")

        return add

    with listening({layer: listener(name, layer) for name, layer in layers.items()}):
        for number, batch in enumerate(data):
            with running(model, "data", number, inputs_of(batch)):
                model(inputs_of(batch), training=False)
            _check_finite(finite)
    return totals


def _is_finite(routing):
    logits = ops.where(ops.expand_dims(routing.mask, 1), routing.logits, 0.0)
    return bool(ops.all(ops.isfinite(logits)))


def _check_finite(finite):
    """Refuse what would send tokens to any expert: logits that are no numbers."""
    wrong = [name for name, is_finite in finite.items() if not is_finite]
    if wrong:
        raise ValueError(
            "Experts must be measured on data for which the router computes numbers. Received: "
            f"logits of {wrong} that are NaN or infinite. Look for NaN in data and weights."
        )
