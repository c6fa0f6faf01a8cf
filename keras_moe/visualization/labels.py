"""Plots of what experts serve."""

import numbers

import numpy as np
from keras import ops

from keras_moe import metrics
from keras_moe._internal.plain_text import as_text
from keras_moe._internal.validation import shortened
from keras_moe.visualization.panels import PANEL_SIZE, count_on, heat_map, one_panel_a_layer
from keras_moe.visualization.sources import as_tensors, check_can_be_drawn, each_token
from keras_moe.visualization.sources import routings as routings_of

MAX_ROWS = 30


def specialization(routings, labels, names=None, num_experts=None):
    """Which expert serves which kind of token: each row is a label, each column an expert.

    Colours are the share of the label's assignments. The title gives the mutual information of
    label and expert in bits, and the entropy of the expert, its upper bound.

    Pass the labels of documents for subjects, those of tokens for parts of speech, and the tokens
    themselves for words. Integers stand in their order, strings the most frequent first. Of many
    different strings 30 are drawn; the title is over all.

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
    tables = {
        name: label_table(routing, labels, names)
        for name, routing in routings_of(routings, num_experts).items()
    }
    shown = min(max(len(rows) for _, rows in tables.values()), MAX_ROWS)
    width, height = PANEL_SIZE
    return one_panel_a_layer(tables, _draw, (width + 0.6, max(height, 1.2 + 0.22 * shown)))


def label_table(routing, labels, names=None):
    """Assignments (labels, E), and the names of the labels in the order to draw."""
    groups, rows = _grouped(each_token(labels, len(routing.mask)), routing.mask, names)
    routing = routing._replace(mask=routing.mask & (groups >= 0))
    table = metrics.count_table(as_tensors(routing), np.maximum(groups, 0), len(rows))
    return ops.convert_to_numpy(table), rows


def bits_in_common(table):
    """Mutual information of the label and the expert, in bits."""
    return float(metrics.mutual_information(ops.convert_to_tensor(table)) / np.log(2))


def _grouped(labels, mask, names):
    """Integers that stand for labels, -1 for padding, and the names of these integers."""
    if np.issubdtype(labels.dtype, np.integer):
        highest = int(labels.max(initial=-1, where=mask))
        if highest < 0:
            raise ValueError(
                "There must be a label to draw. Received: none of 0 and above for a token that is "
                "not padding. Negative labels are left out."
            )
        check_can_be_drawn("a label of", highest)
        if names is not None and not isinstance(names, (list, tuple, np.ndarray)):
            raise TypeError(
                "`names` must be a list of a name for each label. Received: "
                f"names={shortened(names)} (of type {type(names).__name__}). Put it into a list."
            )
        names = names.tolist() if isinstance(names, np.ndarray) else names
        wrong = [each for each in names or () if not isinstance(each, (str, numbers.Number))]
        if wrong:
            raise TypeError(
                "`names` must be texts, or numbers. Received: "
                f"{shortened(wrong[0])} (of type {type(wrong[0]).__name__}) in it. Pass the names "
                "in one list."
            )
        if names is not None and highest >= len(names):
            raise ValueError(
                "`names` must have a name for each label. Received: "
                f"{len(names)} names, and labels up to {highest}. Name them all."
            )
        rows = [str(n) for n in (range(highest + 1) if names is None else names)]
        return np.where(mask, labels, -1), rows
    if names is not None:
        raise ValueError(
            "`names` must be those of integer labels. Received: names, and labels of "
            f"{labels.dtype}. Leave `names` out, or pass the number of each label."
        )
    groups = np.full(len(labels), -1)
    values, found, sizes = np.unique(
        labels[mask].astype(str), return_inverse=True, return_counts=True
    )
    order = np.argsort(-sizes, kind="stable")
    groups[mask] = np.argsort(order)[found]
    return groups, list(values[order])


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
