"""Plots as SVG in the colours of the page around them."""

import io
import re
import warnings

import matplotlib
import numpy as np

from keras_moe import visualization

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


def svg_plots(layers):
    """Pairs of a caption and an SVG for a list of `LayerStudy`."""
    routings = {layer.summary.name: layer.routing for layer in layers if layer.counts.sum()}
    if not routings:
        return
    with matplotlib.rc_context(_STYLE):
        labels = {layer.summary.name: layer.labels for layer in layers}
        yield from _by_row(routings, labels, "Which expert serves which label")
        words = {layer.summary.name: _repeated(layer) for layer in layers}
        yield from _by_row(routings, words, "Which expert serves which token, most frequent first")
        # The page says in words that a router computes no numbers.
        sure = {
            name: routing
            for name, routing in routings.items()
            if np.isfinite(routing.probs[routing.mask]).all()
        }
        if sure:
            figure = visualization.confidence(sure)
            yield "How sure the router is", _svg(figure)
        several = {
            name: routing for name, routing in routings.items() if routing.indices.shape[1] > 1
        }
        if several:
            figure = visualization.coactivation(several)
            yield "Which experts serve the same tokens", _svg(figure)


def _by_row(routings, rows, caption):
    for name, routing in routings.items():
        if rows[name] is not None:
            figure = visualization.specialization({name: routing}, rows[name])
            yield f"{caption}: {name}", _svg(figure)


def _repeated(layer):
    """The texts of the tokens, if they repeat often enough to be types."""
    real = [text for text, is_real in zip(layer.texts, layer.routing.mask) if is_real]
    return np.array(layer.texts) if 0 < 2 * len(set(real)) <= len(real) else None


def _svg(figure):
    file = io.StringIO()
    with warnings.catch_warnings():
        # The browser has the glyphs that the fonts of matplotlib lack.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, format="svg", dpi=144, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace(_INK, "currentColor")
