"""Plots of what experts do. Needs matplotlib: `pip install matplotlib`.

Every function returns a `matplotlib.figure.Figure` with a panel for each layer, of an array or
nested list, a dict of arrays by layer, or the result of `inspection.record_routings`.
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keras_moe import metrics
from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_indices, check_integer, check_tensors
from keras_moe.inspection.summaries import as_text
from keras_moe.ops.routing import Routing

__all__ = ["coactivation", "shares_over_time", "specialization"]
__dir__ = __all__.copy

PANEL_SIZE = (4.4, 3.4)
MAX_COLUMNS = 3
MAX_ROWS = 30


def coactivation(routings: dict | Tensor, num_experts: int | None = None) -> Figure:
    """Which experts get the same tokens: share of the row's tokens that the column gets too.

    Args:
        routings: The result of `inspection.record_routings`, or integer indices (T, K) with -1 for
            no expert, or a dict of these by layer. Others raise a ValueError.
        num_experts: Integer or None. E, for arrays; by default the highest index plus one.

    Example:

    >>> indices = [[0, 1], [0, 2], [3, 1], [3, 2]]
    >>> figure = keras_moe.visualization.coactivation(indices, num_experts=8)

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.2.
    """
    return _figure(_routings(routings, num_experts), _draw_coactivation)


def _draw_coactivation(axes, routing):
    share = ops.convert_to_numpy(metrics.coactivation(routing)).copy()
    np.fill_diagonal(share, np.nan)  # every expert is always together with itself
    _heat_map(axes, share, "share of the row's tokens", vmin=0)
    axes.set(xlabel="also served by expert", ylabel="served by expert")
    _count_on(axes.xaxis, axes.yaxis)


def specialization(
    routings: dict | Tensor,
    labels: Any,
    names: Sequence[str] | None = None,
    num_experts: int | None = None,
) -> Figure:
    """Which expert gets which kind of token: each row is a label, each column an expert.

    Colours are the share of the label's assignments. The title gives the mutual information of
    label and expert in bits, which is 0 if all labels have the same experts, and its upper bound.
    30 labels are drawn: integers in their order, the most frequent strings sorted by expert.

    Args:
        routings: As in `coactivation`.
        labels: Integers or strings, such as subjects of documents or words: one for each token,
            padding included, or one for each of equally long documents. Negative ones are left out.
            Others raise a ValueError.
        names: List of strings or None. Names of integer labels.
        num_experts: Integer or None. As in `coactivation`.

    Example:

    >>> indices = [[0, 1], [0, 2], [3, 1], [3, 2]]
    >>> figure = keras_moe.visualization.specialization(indices, ["red", "red", "blue", "blue"])
    """
    found = _routings(routings, num_experts)
    tables = {name: label_table(each, labels, names) for name, each in found.items()}
    shown = min(max(len(rows) for _, rows in tables.values()), MAX_ROWS)
    width, height = PANEL_SIZE
    size = (width + 0.6, max(height, 1.2 + 0.22 * shown))
    return _figure(tables, _draw_specialization, size)


def labels_of_tokens(labels, num_tokens):
    """Integers or strings, one for each token, from labels of tokens or documents."""
    labels = ops.convert_to_numpy(labels)
    fits = labels.size and not num_tokens % labels.size
    fits = fits and labels.size in (math.prod(labels.shape[:1]), num_tokens)
    if not fits or labels.dtype.kind not in "biuUS":
        rule = f"one for each of {num_tokens} tokens or of equally long documents"
        _refuse(f"Labels must be integers or strings, {rule}", labels)
    return np.repeat(labels.reshape(-1), num_tokens // labels.size)


def label_table(routing, labels, names=None):
    """Assignments (labels, E), and the names of the labels in the order to draw."""
    labels = labels_of_tokens(labels, len(routing.mask))
    are_integers = labels.dtype.kind in "iu"
    is_used = routing.mask & (labels >= 0) if are_integers else routing.mask
    values, found = np.unique(labels[is_used], return_inverse=True)
    if are_integers and names is not None:
        if values.size and values[-1] >= len(names):
            raise ValueError(f"Labels must be from 0 to {len(names) - 1}. Received: {values[-1]}")
        values = [names[value] for value in values]
    groups = np.full(len(labels), -1)
    groups[is_used] = found
    rows = list(map(str, values))
    table = ops.convert_to_numpy(metrics.count_table(routing, groups, max(len(rows), 1)))
    if rows and not are_integers:
        sizes, columns = table.sum(axis=1), np.maximum(table.sum(axis=0), 1)
        shown = np.argsort(-sizes, kind="stable")[:MAX_ROWS]
        lift = table[shown] / columns / np.maximum(sizes[shown, None], 1)
        shown = shown[np.lexsort((-lift.max(axis=1), lift.argmax(axis=1)))]
        order = [*shown, *np.setdiff1d(np.arange(len(rows)), shown)]
        table, rows = table[order], [rows[row] for row in order]
    return table, rows


def mutual_bits(table):
    return float(metrics.mutual_information(table) / np.log(2))


def _draw_specialization(axes, table_and_rows):
    table, rows = table_and_rows
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    _heat_map(axes, share[:MAX_ROWS], "share of the label's assignments", vmin=0)
    sums = [table.sum(axis=axis) for axis in (0, 1)]
    possible = min(float(metrics.load_entropy(each)) * math.log2(len(each)) for each in sums)
    title = f"mutual information: {mutual_bits(table):.2f} of {possible:.2f} bits"
    axes.set(xlabel="expert", title=title)
    texts = [as_text(row) for row in rows[:MAX_ROWS]]
    texts = [text if len(text) <= 24 else f"{text[:23]}…" for text in texts]
    axes.set_yticks(range(len(texts)), texts)
    _count_on(axes.xaxis)


def shares_over_time(shares: dict | Tensor) -> Figure:
    """The load of each expert from epoch to epoch, in multiples of the mean load.

    Red is more than the mean, blue less; the darkest blue is an eighth of it or less.

    Args:
        shares: Counts or shares (time, E), or a dict of these by layer, as `ExpertMonitor.shares`.

    Example:

    >>> figure = keras_moe.visualization.shares_over_time([[0.25, 0.75], [0.4, 0.6], [0.5, 0.5]])
    """
    return _figure(by_layer(shares), _draw_shares)


def _draw_shares(axes, shares):
    check_tensors(shares=(shares, "TE"))
    share = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
    fair = np.clip(share * shares.shape[1], 1 / 8, 8)
    style = {"cmap": "RdBu_r", "vmin": -3, "vmax": 3, "origin": "lower"}
    bar = _heat_map(axes, np.log2(fair.T), "times a fair share", **style)
    bar.set_ticks([-3, -1, 0, 1, 3], labels=["⅛ or less", "½", "1", "2", "8 or more"])
    axes.set(xlabel="epoch", ylabel="expert", facecolor="silver")
    _count_on(axes.xaxis, axes.yaxis)


def by_layer(source):
    """Dict of names to arrays or routings; the name of a lone array is the empty string."""
    named = source if isinstance(source, dict) else {"": source}
    if not named:
        raise ValueError("There must be a layer to draw. Received: {}")
    return {name: _joined(value) for name, value in named.items()}


def _joined(value):
    """One routing for a list of them, else an array."""
    routings = [value] if isinstance(value, Routing) else value
    if not isinstance(routings, (list, tuple)) or not isinstance(next(iter(routings), 0), Routing):
        return ops.convert_to_numpy(value)
    fields = zip(*(map(ops.convert_to_numpy, routing[:7]) for routing in routings))
    *of_tokens, counts, dropped = fields
    dropped = np.average(dropped, weights=[max(each.sum(), 1) for each in counts])
    return Routing(*[*map(np.concatenate, of_tokens), np.sum(counts, axis=0), dropped])


def _routings(source, num_experts):
    """Dict of names to routings, which have no probabilities if they come from indices."""
    found = by_layer(source)
    for name, value in found.items():
        if isinstance(value, Routing):
            continue
        if value.ndim != 2 or not value.size or value.dtype.kind not in "iu":
            _refuse("The experts of tokens must be integers (T, K)", value)
        number = max(int(value.max()) + 1, 1) if num_experts is None else num_experts
        check_indices("indices", value, check_integer("num_experts", number))
        counts, mask = np.bincount(value[value >= 0], minlength=number), (value >= 0).any(axis=1)
        found[name] = Routing(value.astype("int32"), None, None, None, mask, counts, None)
    return found


def _refuse(rule, array):
    raise ValueError(f"{rule}. Received: {array.dtype} of shape {array.shape}")


def _figure(layers, draw, panel_size=PANEL_SIZE):
    """A figure whose panels are drawn by `draw(axes, array)`; `layers` maps names to arrays."""
    columns = min(len(layers), MAX_COLUMNS)
    rows = math.ceil(len(layers) / columns)
    # Names come from data: a dollar sign in them must not start a formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure((columns * panel_size[0], rows * panel_size[1]), layout="constrained")
        panels: list = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (name, array) in zip(panels, layers.items()):
            draw(axes, array)
            axes.set_title(" · ".join(filter(None, (as_text(name), axes.get_title()))))
    for axes in panels[len(layers) :]:
        axes.remove()
    return figure


def _heat_map(axes, values, colour_label, **kwargs):
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **kwargs)
    return axes.figure.colorbar(image, ax=axes, label=colour_label)


def _count_on(*sides):
    for axis in sides:
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
