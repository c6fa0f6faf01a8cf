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
    layers = [layer for layer in layers if layer.routing.counts.sum()]
    routings = {layer.summary.name: layer.routing for layer in layers}
    with matplotlib.rc_context(_STYLE):
        labels = [layer.labels for layer in layers]
        yield from _by_row(routings, labels, "Which expert serves which label")
        words = [_repeated(layer) for layer in layers]
        yield from _by_row(routings, words, "Which expert serves which token, most frequent first")
        # The page says in words that a router computes no numbers.
        sure = _where(routings, lambda routing: np.isfinite(routing.probs[routing.mask]).all())
        if sure:
            yield "How sure the router is", _svg(visualization.confidence(sure))
        several = _where(routings, lambda routing: routing.indices.shape[1] > 1)
        if several:
            yield "Which experts serve the same tokens", _svg(visualization.coactivation(several))


def _by_row(routings, rows, caption):
    for (name, routing), labels in zip(routings.items(), rows):
        if labels is not None:
            figure = visualization.specialization({name: routing}, labels)
            yield f"{caption}: {name}", _svg(figure)


def _where(routings, condition):
    return {name: routing for name, routing in routings.items() if condition(routing)}


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
