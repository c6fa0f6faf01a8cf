"""Plots of routing: what routers decide, what experts serve, and how both change in training."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops
from matplotlib.figure import Figure

from keras_moe import metrics
from keras_moe._internal.plain_text import as_text
from keras_moe._internal.types import Tensor
from keras_moe.visualization.panels import (
    PANEL_SIZE,
    by_layer,
    count_on,
    heat_map,
    one_panel_a_layer,
    probabilities_by_layer,
    routings_by_layer,
)

MAX_ROWS = 30
MAX_LABELS = 10_000  # A table of more needs more memory than a figure is worth.


def coactivation(routings: dict | Tensor, num_experts: int | None = None) -> Figure:
    """Which experts serve the same tokens: share of the row's tokens that the column serves too.

    Args:
        routings: The result of `inspection.record_routings`, or integer indices (T, K) with -1 for
            no expert, or a dict of these by layer.
        num_experts: Integer or None. E, for arrays; by default the highest index plus one.

    Raises:
        ValueError: If the indices are not integers (T, K).

    Example:

    >>> indices = [[0, 1], [0, 2], [3, 1], [3, 2]]
    >>> figure = keras_moe.visualization.coactivation(indices, num_experts=8)

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.2.
    """
    return one_panel_a_layer(routings_by_layer(routings, num_experts), _draw_coactivation)


def _draw_coactivation(axes, routing):
    share = ops.convert_to_numpy(metrics.coactivation(routing)).copy()
    np.fill_diagonal(share, np.nan)  # every expert is always together with itself
    heat_map(axes, share, "share of the row's tokens", vmin=0)
    axes.set(xlabel="also served by expert", ylabel="served by expert")
    count_on(axes.xaxis, axes.yaxis)


def confidence(routings: dict | Tensor) -> Figure:
    """How sure the router is: the highest probability of each token, as a histogram.

    The dotted line is chance, 1 / E: a peak there means a router without a preference.

    Args:
        routings: The result of `inspection.record_routings`, or probabilities (T, E), or a dict of
            these by layer.

    Raises:
        ValueError: If there is no layer, or an array does not hold probabilities.

    Example:

    >>> figure = keras_moe.visualization.confidence([[0.1, 0.9], [0.4, 0.6]])
    """
    return one_panel_a_layer(probabilities_by_layer(routings), _draw_confidence)


def _draw_confidence(axes, probs):
    highest = probs.max(axis=1, initial=0)
    if len(highest):
        limit, each = min(1, 2 * highest.max()), np.full(len(highest), 1 / len(highest))
        axes.hist(highest, bins=np.linspace(0, limit, 41), weights=each)
        axes.axvline(highest.mean(), color="C1", label=f"mean {highest.mean():.1%}")
        axes.set_xlim(0, limit)
    axes.axvline(1 / probs.shape[1], color="grey", ls=":", label="chance")
    axes.set(xlabel="highest probability of a token", ylabel="share of the tokens")
    # Not `loc="best"`: on a busy machine the search takes so long that Matplotlib warns.
    axes.legend(loc="upper right")


def specialization(
    routings: dict | Tensor,
    labels: Any,
    names: Sequence[str] | None = None,
    num_experts: int | None = None,
) -> Figure:
    """Which expert serves which kind of token: each row is a label, each column an expert.

    Colours are the share of the label's assignments. The title gives the mutual information of
    label and expert in bits, and the entropy of the expert, its upper bound. Integers stand in
    their order, strings the most frequent first. The first 30 are drawn; the title is over all.

    Args:
        routings: As in `coactivation`.
        labels: Integers or strings, such as subjects of documents or words: one for each token,
            padding included, or one for each of equally long documents. Negative ones are left out.
        names: List of strings or None. Names of integer labels.
        num_experts: Integer or None. As in `coactivation`.

    Raises:
        ValueError: If labels, names and tokens do not fit.

    Example:

    >>> indices = [[0, 1], [0, 2], [3, 1], [3, 2]]
    >>> figure = keras_moe.visualization.specialization(indices, ["red", "red", "blue", "blue"])
    """
    tables = {
        name: label_table(routing, labels, names)
        for name, routing in routings_by_layer(routings, num_experts).items()
    }
    shown = min(max(len(rows) for _, rows in tables.values()), MAX_ROWS)
    width, height = PANEL_SIZE
    size = (width + 0.6, max(height, 1.2 + 0.22 * shown))
    return one_panel_a_layer(tables, _draw_specialization, size)


def labels_of_tokens(labels, num_tokens):
    """Integers or strings, one for each token, from labels of tokens or documents."""
    labels = ops.convert_to_numpy(labels)
    fits = labels.size and not num_tokens % labels.size
    fits = fits and labels.size in (math.prod(labels.shape[:1]), num_tokens)
    if not fits or labels.dtype.kind not in "biuUS":
        raise ValueError(
            "Labels must be integers or strings, one for each token or for each of equally long "
            f"documents. Received: labels of {labels.dtype} and shape {labels.shape} for "
            f"{num_tokens} tokens"
        )
    # Unsigned integers have no -1, which stands for padding.
    labels = labels.astype("int64") if labels.dtype.kind in "iu" else labels
    return np.repeat(labels.reshape(-1), num_tokens // labels.size)


def label_table(routing, labels, names=None):
    """Assignments (labels, E), and the names of the labels in the order to draw."""
    labels = labels_of_tokens(labels, len(routing.mask))
    real = labels[routing.mask]
    groups = np.full(len(labels), -1)
    if labels.dtype.kind == "i":
        groups[routing.mask] = np.maximum(real, -1)
        highest = int(groups.max())
        limit = MAX_LABELS if names is None else len(names)
        if not 0 <= highest < limit:
            raise ValueError(f"Labels must be from 0 to {limit - 1}. Received: at most {highest}")
        rows = [str(name) for name in (range(highest + 1) if names is None else names)]
    else:
        values, found, sizes = np.unique(real.astype(str), return_inverse=True, return_counts=True)
        most_frequent_first = np.argsort(-sizes, kind="stable")
        groups[routing.mask] = np.argsort(most_frequent_first)[found]
        rows = list(values[most_frequent_first])
    table = metrics.count_table(routing, groups, max(len(rows), 1))
    return ops.convert_to_numpy(table), rows


def bits_in_common(table):
    return float(metrics.mutual_information(table) / np.log(2))


def _draw_specialization(axes, table_and_rows):
    table, rows = table_and_rows
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    heat_map(axes, share[:MAX_ROWS], "share of the label's assignments", vmin=0)
    possible = float(metrics.load_entropy(table.sum(axis=0))) * math.log2(table.shape[1])
    bits = bits_in_common(table)
    axes.set(xlabel="expert", title=f"{bits:.2f} of {possible:.2f} bits in common")
    texts = [as_text(row) for row in rows[:MAX_ROWS]]
    texts = [text if len(text) <= 24 else f"{text[:23]}…" for text in texts]
    axes.set_yticks(range(len(texts)), texts)
    count_on(axes.xaxis)


def shares_over_time(shares: dict | Tensor, first_epoch: int = 0) -> Figure:
    """How much of the work each expert does from epoch to epoch, in multiples of a fair share.

    Red is more than a fair share, blue less; the darkest blue is an eighth or nothing at all.

    Args:
        shares: Counts or shares (time, E), or a dict of these by layer, such as
            `ExpertMonitor.shares`. A row of NaN is grey.
        first_epoch: Integer. Number of the first row, as for a training that was resumed.

    Raises:
        ValueError: If an array does not have two axes, or a negative number.

    Example:

    >>> figure = keras_moe.visualization.shares_over_time([[0.25, 0.75], [0.4, 0.6], [0.5, 0.5]])
    """
    layers = by_layer(shares)
    for array in layers.values():
        if array.ndim != 2 or (array < 0).any():
            received = f"{array.dtype} of shape {array.shape}"
            raise ValueError(f"Shares must be (time, E), at least 0 or NaN. Received: {received}")
    return one_panel_a_layer(layers, functools.partial(_draw_shares, first_epoch=first_epoch))


def _draw_shares(axes, shares, first_epoch):
    share = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
    fair = np.clip(share * shares.shape[1], 1 / 8, 8)
    style = {"cmap": "RdBu_r", "vmin": -3, "vmax": 3, "origin": "lower"}
    bar = heat_map(axes, np.log2(fair.T), "times a fair share", **style)
    bar.set_ticks([-3, -1, 0, 1, 3], labels=["⅛ or less", "½", "1", "2", "8 or more"])
    axes.set(xlabel="epoch", ylabel="expert", facecolor="silver")
    count_on(axes.xaxis, axes.yaxis)
    axes.xaxis.set_major_formatter(lambda row, _: f"{first_epoch + row:.0f}")


def settling(checkpoints: Sequence, num_experts: int | None = None) -> Figure:
    """How routing settles: the share of choices in the checkpoint before, and in the last one.

    The dotted line is the share that two unrelated routings would have in common.

    Args:
        checkpoints: List of at least two routings on the same data, each as in `coactivation`.
        num_experts: Integer or None. As in `coactivation`.

    Raises:
        ValueError: If there are fewer than two checkpoints, or they differ in layers or tokens.

    Example:

    >>> figure = keras_moe.visualization.settling([[[0, 1], [0, 2]], [[0, 1], [2, 1]]])

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.1.
    """
    recorded = [routings_by_layer(checkpoint, num_experts) for checkpoint in checkpoints]
    names = [list(moment) for moment in recorded]
    if len(recorded) < 2 or any(each != names[0] for each in names):
        raise ValueError(f"`checkpoints` must be two or more of one model. Received: {names}")
    layers = {name: [moment[name] for moment in recorded] for name in recorded[0]}
    return one_panel_a_layer(layers, _draw_settling)


def _draw_settling(axes, moments):
    numbers = np.arange(1, len(moments) + 1)
    to_last = [float(metrics.router_saturation(each, moments[-1])) for each in moments[:-1]]
    to_previous = [float(metrics.router_saturation(a, b)) for a, b in zip(moments, moments[1:])]
    axes.plot(numbers[:-1], to_last, "o-", label="also at the last checkpoint")
    axes.plot(numbers[1:], to_previous, "s--", label="also at the checkpoint before")
    chance = moments[0].indices.shape[1] / len(moments[0].counts)
    axes.axhline(chance, color="grey", ls=":", label="by chance")
    axes.set(xlabel="checkpoint", ylabel="share of the choices", ylim=(0, 1.03))
    count_on(axes.xaxis)
    axes.legend(loc="lower right")
