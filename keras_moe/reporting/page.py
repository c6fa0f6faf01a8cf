"""HTML of the report. All text from the model or the data is escaped here."""

import html
import io
import json
import re
import string
import warnings
from importlib import resources

import matplotlib
import numpy as np

from keras_moe import visualization
from keras_moe._internal.plain_text import as_text
from keras_moe.inspection.summaries import table_row

_NO_LAYER = (
    "This model has no MixtureOfExperts layer, so there is nothing to see. "
    "Put `keras_moe.layers.MixtureOfExperts(...)` in place of a feed-forward layer."
)
_SYMBOLS = {"problem": "✖", "hint": "▲", "good": "✔"}
# A colour that nothing else has: it becomes the text colour of the page, dark or light.
_INK = "#010203"
_STYLE = {
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.labelcolor": _INK,
    "figure.facecolor": "none",
    "font.size": 9,
    "legend.framealpha": 0,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def render(model_name, num_documents, layers):
    template = string.Template(
        resources.files("keras_moe.reporting").joinpath("page.html").read_text(encoding="utf-8")
    )
    tokens = max((int(layer.routing.mask.sum()) for layer in layers), default=0)
    documents = f"{num_documents:,} document{'s' * (num_documents != 1)}"
    data = {"layers": [_layer_data(layer, num_documents) for layer in layers if layer.texts]}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return template.substitute(
        title=_escape(f"Experts of {model_name}"),
        subtitle=f"{documents}, {tokens:,} token{'s' * (tokens != 1)} routed",
        verdicts="\n".join(_verdicts(layers)),
        layers=_table(layers) if layers else "",
        plots="\n".join(_plots(layers)),
        # Inside a script element only its own end tag and comments mean anything.
        data=text.replace("<", "\\u003c"),
    )


def _escape(text):
    return html.escape(as_text(text))


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
            share = layer.routing.counts / layer.routing.counts.sum()
            text = f"{name}: all {len(share)} experts work."
            yield _verdict("good", text, f"Shares from {share.min():.1%} to {share.max():.1%}.")


def _verdict(level, text, more):
    more = re.sub("`([^`]+)`", r"<code>\1</code>", _escape(more))
    return (
        f'<li class="{level}"><span class="symbol" role="img" aria-label="{level}">'
        f"{_SYMBOLS[level]}</span><p><strong>{_escape(text)}</strong> {more}</p>"
    )


def _table(layers):
    rows = [_row(layer) for layer in layers]
    head = "".join(f'<th scope="col">{name}</th>' for name in rows[0])
    cells = ("".join(f"<td>{cell}</td>" for cell in row.values()) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(layer):
    counts, shared = layer.routing.counts, layer.information
    row = table_row(layer.summary._replace(counts=counts.tolist()))
    del row["FLOPs a token"], row["engine"]
    return {
        **{name: _escape(cell) for name, cell in row.items()},
        "shares": _bars(counts),
        "dropped": f"{float(layer.routing.dropped):.1%}",
        "router entropy / log E": f"{layer.entropy:.2f}",
        "bits shared with labels": "–" if shared is None else f"{shared:.2f}",
    }


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
    layers = [layer for layer in layers if layer.routing.counts.sum()]
    by_row: list = [("label", layer, layer.labels) for layer in layers]
    for layer in layers:
        real = [text for text, is_real in zip(layer.texts, layer.routing.mask) if is_real]
        if 0 < 2 * len(set(real)) <= len(real):  # They repeat often enough.
            by_row.append(("token, most frequent first", layer, np.array(layer.texts)))
    routings = {layer.summary.name: layer.routing for layer in layers}
    # The page says in words that a router computes no numbers.
    sure = {name: r for name, r in routings.items() if np.isfinite(r.probs[r.mask]).all()}
    several = {name: r for name, r in routings.items() if r.indices.shape[1] > 1}
    with matplotlib.rc_context(_STYLE):
        for kind, layer, rows in by_row:
            if rows is not None:
                plot = visualization.specialization({layer.summary.name: layer.routing}, rows)
                yield _figure(f"Which expert serves which {kind}: {layer.summary.name}", plot)
        if sure:
            yield _figure("How sure the router is", visualization.confidence(sure))
        if several:
            plot = visualization.coactivation(several)
            yield _figure("Which experts serve the same tokens", plot)


def _figure(caption, plot):
    file, caption = io.StringIO(), _escape(caption)
    with warnings.catch_warnings():
        # The browser has the glyphs that the fonts of matplotlib lack.
        warnings.filterwarnings("ignore", message="Glyph")
        plot.savefig(file, format="svg", dpi=144, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return (
        f'<figure><div role="img" aria-label="{caption}">{svg.replace(_INK, "currentColor")}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _layer_data(layer, num_documents):
    routing = layer.routing
    # Best first: routers with a place for each expert do not sort.
    best_first = np.argsort(-routing.weights, axis=1, kind="stable")
    indices = np.take_along_axis(routing.indices, best_first, axis=1)
    weights = np.take_along_axis(routing.weights, best_first, axis=1)
    chosen = np.take_along_axis(routing.probs, np.maximum(indices, 0), axis=1)
    rows = np.reshape([] if layer.labels is None else layer.labels, (num_documents, -1))
    same = rows.size and (rows == rows[:, :1]).all()
    return {
        "name": as_text(layer.summary.name),
        "topK": indices.shape[1],
        "positions": len(routing.mask) // num_documents,
        "counts": routing.counts.tolist(),
        "texts": list(map(as_text, layer.texts)),
        # A heading for each document, where all of its tokens have one label.
        "labels": [as_text(row[0]) for row in rows] if same else None,
        "padding": np.flatnonzero(~routing.mask).tolist(),
        "experts": indices.reshape(-1).tolist(),
        "weights": _percent(weights),
        "probabilities": _percent(chosen),
    }


def _percent(values):
    return np.rint(100 * np.nan_to_num(values)).astype("int64").reshape(-1).tolist()
