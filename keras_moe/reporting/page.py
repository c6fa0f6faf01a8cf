"""From a study to HTML. Everything that comes from the model or the data is escaped here."""

import html
import json
import re
import string
from importlib import resources

import numpy as np

from keras_moe._internal.plain_text import as_text
from keras_moe.reporting.study import imbalance

_NO_LAYER = (
    "This model has no MixtureOfExperts layer, so there is nothing to see. "
    "Put `keras_moe.layers.MixtureOfExperts(...)` in place of a feed-forward layer."
)
_SYMBOLS = {"problem": "✖", "hint": "▲", "good": "✔"}


def render(model_name, found):
    """The whole page for a `Study`."""
    template = string.Template(
        resources.files("keras_moe.reporting").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.substitute(
        title=_escape(f"Experts of {model_name}"),
        subtitle=_subtitle(found),
        verdicts="\n".join(_verdicts(found.layers)),
        layers=_table(found.layers) if found.layers else "",
        plots="\n".join(_plots(found.layers)),
        data=_script_data(found),
    )


def _escape(text):
    return html.escape(as_text(text))


def _subtitle(found):
    tokens = max((int(layer.routing.mask.sum()) for layer in found.layers), default=0)
    documents = f"{found.num_documents:,} document{'s' * (found.num_documents != 1)}"
    return f"{documents}, {tokens:,} token{'s' * (tokens != 1)} routed"


def _verdicts(layers):
    if not layers:
        yield _verdict("problem", "No experts.", _NO_LAYER)
    for layer in layers:
        name = layer.summary.name
        fixes = []
        for finding in layer.findings:
            fix = "Try the same as above." if finding.fix in fixes else f"Try: {finding.fix}"
            fixes.append(finding.fix)
            yield _verdict(finding.level, f"{name}: {finding.text}", fix)
        if not layer.findings:
            share = layer.counts / layer.counts.sum()
            text = f"{name}: all {len(share)} experts work."
            yield _verdict("good", text, f"Shares from {share.min():.1%} to {share.max():.1%}.")


def _verdict(level, text, more):
    return (
        f'<li class="{level}"><span class="symbol" role="img" aria-label="{level}">'
        f"{_SYMBOLS[level]}</span><p><strong>{_escape(text)}</strong> {_with_code(more)}</p>"
    )


def _with_code(text):
    return re.sub("`([^`]+)`", r"<code>\1</code>", _escape(text))


_COLUMNS = {
    "Layer": lambda layer: _escape(layer.summary.name),
    "Experts": lambda layer: f"{layer.summary.top_k} of {layer.summary.num_experts}",
    "Parameters": lambda layer: f"{layer.summary.parameters:,}",
    "active": lambda layer: f"{layer.summary.active_parameters:,}",
    "Shares": lambda layer: _bars(layer.counts),
    "Busiest, × fair": lambda layer: f"{imbalance(layer.counts) + 1:.2f}",
    "Dead": lambda layer: f"{int((layer.counts == 0).sum())}",
    "Dropped": lambda layer: f"{layer.dropped:.1%}",
    "Router entropy / log E": lambda layer: f"{layer.entropy:.2f}",
    "Bits shared with labels": lambda layer: (
        "–" if layer.information is None else f"{layer.information:.2f}"
    ),
}


def _table(layers):
    head = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{cell(layer)}</td>" for cell in _COLUMNS.values()) + "</tr>"
        for layer in layers
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _bars(counts):
    """A bar for each expert, as high as its share of the work."""
    highest = max(counts.max(initial=0), 1)
    share = counts / max(counts.sum(), 1)
    bars = "".join(
        f'<i style="height:{100 * count / highest:.0f}%" title="expert {expert}: {part:.1%}"></i>'
        for expert, (count, part) in enumerate(zip(counts, share))
    )
    label = f"shares from {share.min():.1%} to {share.max():.1%}"
    many = " many" if len(counts) > 32 else ""
    return f'<span class="bars{many}" role="img" aria-label="{label}">{bars}</span>'


def _plots(layers):
    # Here, because a model without MoE layers can be reported without matplotlib.
    from keras_moe.reporting.svg_plots import svg_plots

    for caption, svg in svg_plots(layers):
        caption = _escape(caption)
        yield (
            f'<figure><div role="img" aria-label="{caption}">{svg}</div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def _script_data(found):
    layers = [_layer_data(layer, found.num_documents) for layer in found.layers if layer.texts]
    text = json.dumps({"layers": layers}, ensure_ascii=False, separators=(",", ":"))
    # Inside a script element only its own end tag and comments mean anything.
    return text.replace("<", "\\u003c")


def _layer_data(layer, num_documents):
    routing = layer.routing
    # Best first: routers with a place for each expert do not sort.
    best_first = np.argsort(-routing.weights, axis=1, kind="stable")
    indices, weights = (
        np.take_along_axis(values, best_first, axis=1)
        for values in (routing.indices, routing.weights)
    )
    chosen = np.take_along_axis(routing.probs, np.maximum(indices, 0), axis=1)
    return {
        "name": as_text(layer.summary.name),
        "numExperts": layer.summary.num_experts,
        "topK": indices.shape[1],
        "positions": len(routing.mask) // num_documents,
        "counts": layer.counts.tolist(),
        "texts": [as_text(text) for text in layer.texts],
        "labels": _document_labels(layer, num_documents),
        "padding": np.flatnonzero(~routing.mask).tolist(),
        "experts": indices.reshape(-1).tolist(),
        "weights": _percent(weights),
        "probabilities": _percent(chosen),
    }


def _document_labels(layer, num_documents):
    """A heading for each document, where all of its tokens have one label."""
    if layer.labels is None:
        return None
    rows = layer.labels.reshape(num_documents, -1)
    return [as_text(row[0]) for row in rows] if (rows == rows[:, :1]).all() else None


def _percent(values):
    return np.rint(100 * np.nan_to_num(values)).astype("int64").reshape(-1).tolist()
