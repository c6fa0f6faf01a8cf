"""Plots of what changes while a model trains."""

import functools

import numpy as np

from keras_moe._internal.tensor_checks import check_counts
from keras_moe._internal.validation import is_whole, shortened
from keras_moe.metrics import router_saturation
from keras_moe.visualization.panels import count_on, heat_map, one_panel_a_layer
from keras_moe.visualization.sources import as_tensors, by_layer, routings


def shares_over_time(shares, first_epoch=0):
    """How much of the work each expert does from epoch to epoch, in multiples of a fair share.

    Red is an expert with more than a fair share, blue one with less; the darkest blue is an eighth
    or nothing at all.

    Args:
        shares: (time, E) counts or shares, or a dict of these by layer, such as
            `ExpertMonitor.shares`. A row of NaN is grey.
        first_epoch: number of the first row, as for a training that was resumed.

    Raises:
        ValueError: If an array has not two axes, or `first_epoch` is no integer of at least 0.

    Returns:
        A `matplotlib.figure.Figure`.

    Example:

    >>> shares = [[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1], [0.7, 0.3, 0.0, 0.0]]
    >>> figure = keras_moe.visualization.shares_over_time({"moe": shares})
    """
    if not is_whole(first_epoch) or first_epoch < 0:
        raise ValueError(
            "`first_epoch` must be an integer of at least 0. Received: "
            f"first_epoch={shortened(first_epoch)}. Pass the number of the first epoch in `shares`."
        )
    layers = by_layer(shares)
    for array in layers.values():
        if array.ndim != 2:
            raise ValueError(
                "Shares must have the axes time and expert. "
                f"Received: shape {array.shape}. Pass one row for each epoch."
            )
        is_empty = np.isnan(array).all(axis=1, keepdims=True) if array.dtype.kind == "f" else False
        check_counts("shares", np.where(is_empty, 0, array), ("time", "E"))
    return one_panel_a_layer(layers, functools.partial(_draw_shares, first_epoch=first_epoch))


def _draw_shares(axes, shares, first_epoch):
    share = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
    fair = np.clip(share * shares.shape[1], 1 / 8, 8)
    bar = heat_map(
        axes, np.log2(fair.T), "times a fair share", cmap="RdBu_r", vmin=-3, vmax=3, origin="lower"
    )
    bar.set_ticks([-3, -1, 0, 1, 3], labels=["⅛ or less", "½", "1", "2", "8 or more"])
    axes.set(xlabel="epoch", ylabel="expert", facecolor="silver")
    count_on(axes.xaxis)
    axes.xaxis.set_major_formatter(lambda row, _: f"{first_epoch + row:.0f}")
    count_on(axes.yaxis)


def settling(checkpoints, num_experts=None):
    """How routing settles: the share of choices that stay, from checkpoint to checkpoint.

    Compares each checkpoint with the one before and with the last one, on the same tokens. The
    dotted line is what two unrelated routings would share.

    Args:
        checkpoints: list of what `inspection.record_routings` returned on the same data, or of
            (T, K) integer arrays, or of dicts of these; at least two.
        num_experts: E, for arrays; by default the highest index and one.

    Raises:
        ValueError: If there are fewer than two checkpoints.

    Returns:
        A `matplotlib.figure.Figure`.

    Example:

    >>> import numpy as np
    >>> draws = [np.random.default_rng(seed).integers(0, 8, (100, 2)) for seed in range(3)]
    >>> figure = keras_moe.visualization.settling(draws)

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.1.
    """
    if not isinstance(checkpoints, (list, tuple)):
        raise TypeError(
            "`checkpoints` must be a list. Received: an object of type "
            f"{type(checkpoints).__name__}. Pass one of what `inspection.record_routings` returned "
            "for each checkpoint."
        )
    if len(checkpoints) < 2:
        raise ValueError(
            "Settling needs at least two checkpoints to compare. "
            f"Received: {len(checkpoints)}. Record routings several times while training."
        )
    recorded = [routings(checkpoint, num_experts) for checkpoint in checkpoints]
    if any(moments.keys() != recorded[0].keys() for moments in recorded):
        raise ValueError(
            "All checkpoints must have the same layers. Received: "
            f"{[list(moments) for moments in recorded]}. Record them of one model."
        )
    layers = {name: [moment[name] for moment in recorded] for name in recorded[0]}
    for moments in layers.values():
        shapes = [moment.indices.shape for moment in moments]
        if len(set(shapes)) > 1:
            raise ValueError(
                "All checkpoints must be of the same tokens. Received: indices of the shapes "
                f"{shapes}. Record the same data each time."
            )
    return one_panel_a_layer(layers, _draw_settling)


def _draw_settling(axes, moments):
    numbers = np.arange(1, len(moments) + 1)
    tensors = [as_tensors(moment) for moment in moments]
    to_last = [float(router_saturation(earlier, tensors[-1])) for earlier in tensors[:-1]]
    to_previous = [float(router_saturation(a, b)) for a, b in zip(tensors, tensors[1:])]
    axes.plot(numbers[:-1], to_last, "o-", label="also at the last checkpoint")
    axes.plot(numbers[1:], to_previous, "s--", label="also at the checkpoint before")
    num_experts = max(len(moment.counts) for moment in moments)
    chance = moments[0].indices.shape[1] / num_experts
    axes.axhline(chance, color="grey", ls=":", label="by chance")
    axes.set(xlabel="checkpoint", ylabel="share of the choices", ylim=(0, 1.03))
    count_on(axes.xaxis)
    axes.legend(loc="lower right")
