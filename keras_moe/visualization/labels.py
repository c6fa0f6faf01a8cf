"""Plots of the labels that experts serve."""

import numpy as np
from keras import ops

from keras_moe import metrics
from keras_moe._internal.plain_text import as_text
from keras_moe.visualization import sources
from keras_moe.visualization.panels import PANEL_SIZE, count_on, heat_map, one_panel_a_layer

MAX_ROWS = 30
# A table of more labels needs more memory than a figure is worth.
MAX_LABELS = 10_000


def specialization(routings, labels, names=None, num_experts=None):
    """Which expert serves which kind of token: each row is a label, each column an expert.

    Colours are the share of the label's assignments. The title gives the mutual information of
    label and expert in bits, and the entropy of the expert, its upper bound.

    Pass the labels of documents for subjects, those of tokens for parts of speech, and the tokens
    themselves for words. Integers stand in their order, strings the most frequent first. The first
    30 are drawn; the title is over all.

    Args:
        routings: The result of `inspection.record_routings`, or integer indices (T, K) with -1
            for no expert, or a dict of these by layer.
        labels: Integers or strings, one for each token, padding included, or one for each of
            equally long documents. Negative integers are left out.
        names: List of strings or None. Names of integer labels.
        num_experts: Integer or None. E, for arrays; by default the highest index plus one.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If labels, names and tokens do not fit.

    Example:

    >>> indices = [[0, 1], [0, 2], [3, 1], [3, 2]]
    >>> figure = keras_moe.visualization.specialization(indices, ["red", "red", "blue", "blue"])
    """
    tables = {
        name: label_table(routing, labels, names)
        for name, routing in sources.routings(routings, num_experts).items()
    }
    shown = min(max(len(rows) for _, rows in tables.values()), MAX_ROWS)
    width, height = PANEL_SIZE
    return one_panel_a_layer(tables, _draw, (width + 0.6, max(height, 1.2 + 0.22 * shown)))


def label_table(routing, labels, names=None):
    """Assignments (labels, E), and the names of the labels in the order to draw."""
    labels = sources.labels_of_tokens(labels, len(routing.mask))
    if labels.dtype.kind == "i":
        groups, rows = np.where(routing.mask, labels, -1), _names_up_to(labels[routing.mask], names)
    else:
        groups, rows = _most_frequent_first(labels, routing.mask)
    routing = routing._replace(mask=groups >= 0)
    table = metrics.count_table(routing, np.maximum(groups, 0), max(len(rows), 1))
    return ops.convert_to_numpy(table), rows


def _names_up_to(labels, names):
    highest = int(labels.max(initial=-1))
    limit = MAX_LABELS if names is None else len(names)
    if not 0 <= highest < limit:
        raise ValueError(
            f"Labels must be integers from 0 to {limit - 1}, with negative ones left out. "
            f"Received: a highest label of {highest}"
        )
    return [str(name) for name in (range(highest + 1) if names is None else names)]


def _most_frequent_first(labels, mask):
    groups = np.full(len(labels), -1)
    values, found, sizes = np.unique(
        labels[mask].astype(str), return_inverse=True, return_counts=True
    )
    order = np.argsort(-sizes, kind="stable")
    groups[mask] = np.argsort(order)[found]
    return groups, list(values[order])


def bits_in_common(table):
    """Mutual information of the label and the expert, in bits."""
    return float(metrics.mutual_information(table) / np.log(2))


def _expert_bits(table):
    """Entropy of the expert of an assignment, in bits."""
    share = table.sum(axis=0) / max(table.sum(), 1)
    return float(-np.sum(share * np.log2(np.where(share > 0, share, 1))))


def _draw(axes, table_and_rows):
    table, rows = table_and_rows
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    heat_map(axes, share[:MAX_ROWS], "share of the label's assignments", vmin=0)
    bits, possible = bits_in_common(table), _expert_bits(table)
    axes.set(xlabel="expert", title=f"{bits:.2f} of {possible:.2f} bits in common")
    axes.set_yticks(range(min(len(rows), MAX_ROWS)), [_shortened(row) for row in rows[:MAX_ROWS]])
    count_on(axes.xaxis)


def _shortened(text, length=24):
    text = as_text(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"
