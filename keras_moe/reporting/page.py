"""Measurements of the MoE layers of a model on some data, and the page about them.

All text from the model or the data is escaped here.
"""

import html
import io
import itertools
import json
import math
import operator
import re
import string
import warnings
from importlib import resources
from typing import Any, NamedTuple

import keras
import matplotlib
import numpy as np
from keras import ops

from keras_moe import health, metrics, visualization
from keras_moe._internal.checks import shortened
from keras_moe.inspection import moe_layers, record_routings, summarize
from keras_moe.inspection.summaries import as_text, table_row
from keras_moe.visualization import by_layer, label_table, labels_of_tokens, mutual_bits

BATCH_SIZE = 32
_SYMBOLS = {"problem": "✖", "hint": "▲", "good": "✔"}
# A colour that nothing else has: it becomes the text colour of the page, dark or light.
_INK = "#010203"
_STYLE = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    **{"font.size": 9, "legend.framealpha": 0, "svg.fonttype": "none"},
}


class LayerStudy(NamedTuple):
    """One layer; arrays over all positions, padding with indices of -1."""

    summary: Any
    routing: Any
    texts: list
    labels: Any
    findings: list


def study(model, data, labels, tokens):
    """The number of documents, and a `LayerStudy` for each MoE layer of a model."""
    arrays = _as_arrays(data)
    parts = keras.tree.flatten(arrays)
    num_inputs = len(getattr(model, "inputs", None) or parts)
    sizes = {len(part) if part.ndim else 0 for part in parts}
    # Keras would leave out arrays without an input, such as further batches.
    if len(parts) > num_inputs or len(sizes) != 1 or 0 in sizes:
        rule = f"`data` must be arrays of all documents, one for each of {num_inputs} inputs"
        shapes = ", ".join(str(part.shape) for part in parts)
        raise ValueError(f"{rule}. Received: arrays of the shapes {shapes}")
    num_documents = len(parts[0])
    layers = moe_layers(model)
    labels = _for_each_layer("labels", labels, layers, num_documents)
    tokens = _for_each_layer("tokens", tokens, layers, num_documents)
    parts = (slice(start, start + BATCH_SIZE) for start in range(0, num_documents, BATCH_SIZE))
    batches = [keras.tree.map_structure(operator.itemgetter(part), arrays) for part in parts]
    # The first call of a layer that is called several times: it sees the tokens of the data.
    called = {
        name: routings[:: len(routings) // len(batches)]
        for name, routings in record_routings(model, batches).items()
        if routings
    }
    summaries = {summary.name: summary for summary in summarize(model)}
    studies = []
    for name, routing in by_layer(called).items():
        positions, rest = divmod(len(routing.mask), num_documents)
        texts = token_texts(tokens[name], arrays, 0 if rest else positions, num_documents)
        of_tokens = None
        if texts and labels[name] is not None:  # Without texts, tokens have no document.
            of_tokens = labels_of_tokens(labels[name], len(routing.mask))
        findings = _judge(layers[name], routing)
        studies.append(LayerStudy(summaries[name], routing, texts, of_tokens, findings))
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

    `positions` is how many a layer has in each document, 0 if documents differ.
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


def _judge(layer, routing):
    router, advice = layer.router, health.balance_advice(layer)
    findings = health.judge_load(routing.counts, router.min_top_k, advice)
    findings += health.judge_drops(float(routing.dropped))
    logits = routing.logits[routing.mask]
    if router.has_logits and len(logits):  # A fixed router has no confidence to report.
        largest = health.logit_sizes(logits, router).max(initial=0)
        found = health.judge_router(float(metrics.router_entropy(routing)), largest)
        # Hints are about entropy, but sigmoids are close to each other, however decided the router.
        with_hints = router.shift_invariant
        findings += [each for each in found if with_hints or each.level == health.PROBLEM]
    return findings


def render(model_name, num_documents, layers):
    page = resources.files("keras_moe.reporting").joinpath("page.html")
    template = string.Template(page.read_text(encoding="utf-8"))
    tokens = max(int(layer.routing.mask.sum()) for layer in layers)
    documents = f"{num_documents:,} document{'s' * (num_documents != 1)}"
    data = {"layers": [_layer_data(layer, num_documents) for layer in layers if layer.texts]}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return template.substitute(
        title=_escape(f"Experts of the model “{model_name}”"),
        subtitle=f"{documents}, {tokens:,} token{'s' * (tokens != 1)} routed",
        verdicts="\n".join(_verdicts(layers)),
        layers=_table(layers, num_documents),
        plots="\n".join(_plots(layers)),
        # Inside a script element only its own end tag and comments mean anything.
        data=text.replace("<", "\\u003c"),
    )


def _escape(text):
    return html.escape(as_text(text))


def _verdicts(layers):
    for layer in layers:
        name, fixes = layer.summary.name, []
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


def _table(layers, num_documents):
    rows = [_row(layer, num_documents) for layer in layers]
    head = "".join(f'<th scope="col">{name}</th>' for name in rows[0])
    cells = ("".join(f"<td>{cell}</td>" for cell in row.values()) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(layer, num_documents):
    counts, bits = layer.routing.counts, "–"
    if layer.labels is not None:
        # A control: few tokens tell something about any label.
        documents = np.random.default_rng(0).permutation(layer.labels.reshape(num_documents, -1))
        tables = [label_table(layer.routing, each)[0] for each in (layer.labels, documents.ravel())]
        bits = "{:.2f}; {:.2f} if shuffled".format(*map(mutual_bits, tables))
    row = table_row(layer.summary._replace(counts=counts.tolist()))
    del row["FLOPs per token"], row["dtype"]
    return {
        **{name: _escape(cell) for name, cell in row.items()},
        "shares": _bars(counts),
        "dropped": f"{float(layer.routing.dropped):.1%}",
        "router entropy / log E": f"{float(metrics.router_entropy(layer.routing)):.2f}",
        "mutual information with labels, bits": bits,
    }


def _bars(counts):
    """A bar for each expert, as high as its share of the work."""
    highest = max(counts.max(initial=0), 1)
    share = counts / max(counts.sum(), 1)
    # All of up to ten bars have the number of their expert below them.
    step = 1 if len(counts) <= 10 else 2 ** math.ceil(math.log2(len(counts) / 8))
    bars = ""
    for expert, (count, part) in enumerate(zip(counts, share)):
        number = "" if expert % step else expert
        bars += (
            f'<i style="height:{100 * count / highest:.0f}%" title="expert {expert}: {part:.1%}" '
            f'data-number="{number}"></i>'
        )
    label = f"shares from {share.min():.1%} to {share.max():.1%}"
    many = " many" if len(counts) > 32 else ""
    return f'<span class="bars{many}" role="img" aria-label="{label}">{bars}</span>'


def _plots(layers):
    layers = [layer for layer in layers if layer.routing.counts.sum()]
    routings = {layer.summary.name: layer.routing for layer in layers}
    several = {name: r for name, r in routings.items() if r.indices.shape[1] > 1}
    with matplotlib.rc_context(_STYLE):
        for layer in layers:
            if layer.labels is not None:
                name = layer.summary.name
                plot = visualization.specialization({name: layer.routing}, layer.labels)
                yield _figure(f"Experts of each label: {name}", plot)
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
    texts = list(map(as_text, layer.texts))
    real = " ".join(itertools.compress(texts, routing.mask)).split()
    return {
        "name": as_text(layer.summary.name),
        "topK": indices.shape[1],
        "positions": len(routing.mask) // num_documents,
        "counts": routing.counts.tolist(),
        "texts": texts,
        # Only if words repeat often enough.
        "words": metrics.typical_words(routing, texts) if 2 * len(set(real)) <= len(real) else [],
        # A heading for each document, where all of its tokens have one label.
        "labels": [as_text(row[0]) for row in rows] if same else None,
        "padding": np.flatnonzero(~routing.mask).tolist(),
        "experts": indices.reshape(-1).tolist(),
        "weights": _percent(weights),
        "probabilities": _percent(chosen),
    }


def _percent(values):
    return np.rint(100 * np.nan_to_num(values)).astype("int64").reshape(-1).tolist()
