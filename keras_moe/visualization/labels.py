"""Pictures of what experts are for."""

import numpy as np

from keras_moe.visualization.numbers import count_table, mutual_information
from keras_moe.visualization.panels import PANEL_SIZE, count_on, heat_map, one_panel_a_layer
from keras_moe.visualization.sources import choices, each_token


def specialization(routings, labels, names=None, num_experts=None):
    """Which expert serves which kind of token: each row is a label, each column an expert.

    Colours are the share of the label's assignments. The title says how many bits of information
    a label and an expert have in common, and how many there are to know about the expert.

    For subjects give the labels of documents, for parts of speech those of tokens, and for words
    the tokens themselves: of many different strings the 30 most frequent are drawn.

    Args:
        routings: what `inspection.record_routings` returned, or (T, K) integer indices with -1 for
            no expert, or a dict of these by layer.
        labels: integers or strings, one for each token, padding included, or one for each of
            equally long documents. Negative integers are left out.
        names: names of integer labels, or None.
        num_experts: E, for arrays; by default the highest index and one.

    Raises:
        ValueError: If labels and tokens do not fit.

    Returns:
        A `matplotlib.figure.Figure`.

    Example:

    >>> import numpy as np
    >>> indices = np.array([[0, 1], [0, 2], [3, 1], [3, 2]])
    >>> figure = keras_moe.visualization.specialization(indices, ["red", "red", "blue", "blue"])
    """
    tables = {}
    for name, chosen in choices(routings, num_experts).items():
        real = (chosen.indices >= 0).any(axis=1)
        groups, rows = grouped(each_token(labels, len(real))[real], names)
        tables[name] = count_table(chosen.indices[real], groups, len(rows), chosen.num_experts)
    shown = min(len(rows), MAX_ROWS)
    width, height = PANEL_SIZE

    def draw(axes, table):
        _draw(axes, table, rows)

    return one_panel_a_layer(tables, draw, (width + 0.6, max(height, 1.2 + 0.22 * shown)))


MAX_ROWS = 30


def grouped(labels, names=None):
    """Integers that stand for labels, and the names of these integers in the order to draw."""
    if np.issubdtype(labels.dtype, np.integer):
        highest = int(labels.max(initial=-1))
        return labels, [str(n) for n in (range(highest + 1) if names is None else names)]
    values, groups, sizes = np.unique(labels.astype(str), return_inverse=True, return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place[groups], list(values[order])


def expert_entropy(table):
    """Bits there are to know about the expert of an assignment."""
    share = table.sum(axis=0) / max(table.sum(), 1)
    return float(-np.sum(share * np.log2(np.where(share > 0, share, 1))))


def _draw(axes, table, rows):
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    heat_map(axes, share[:MAX_ROWS], "share of the label's assignments", vmin=0)
    bits, possible = mutual_information(table), expert_entropy(table)
    axes.set(xlabel="expert", title=f"{bits:.2f} of {possible:.2f} bits in common")
    axes.set_yticks(range(min(len(rows), MAX_ROWS)), [shortened(row) for row in rows[:MAX_ROWS]])
    count_on(axes.xaxis)


def shortened(text, length=24):
    return text if len(text) <= length else f"{text[: length - 1]}…"
