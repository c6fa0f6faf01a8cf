"""Plots of what changes while a model trains."""

import functools

import numpy as np

from keras_moe.metrics import router_saturation
from keras_moe.visualization.panels import count_on, heat_map, one_panel_a_layer
from keras_moe.visualization.sources import by_layer, routings


def shares_over_time(shares, first_epoch=0):
    """How much of the work each expert does from epoch to epoch, in multiples of a fair share.

    Red is an expert with more than a fair share, blue one with less; the darkest blue is an eighth
    or nothing at all.

    Args:
        shares: Counts or shares (time, E), or a dict of these by layer, such as
            `ExpertMonitor.shares`. A row of NaN is grey.
        first_epoch: Integer. Number of the first row, as for a training that was resumed.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If an array does not have two axes, or a negative number.

    Example:

    >>> shares = [[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1], [0.7, 0.3, 0.0, 0.0]]
    >>> figure = keras_moe.visualization.shares_over_time({"moe": shares})
    """
    layers = by_layer(shares)
    for array in layers.values():
        if array.ndim != 2 or (array < 0).any():
            raise ValueError(
                "Shares must be numbers (time, E) of at least 0, or NaN. "
                f"Received: {array.dtype} of shape {array.shape}"
            )
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
    dotted line is the share that two unrelated routings would have in common.

    Args:
        checkpoints: List of at least two results of `inspection.record_routings` on the same data,
            or of integer arrays (T, K), or of dicts of these.
        num_experts: Integer or None. E, for arrays; by default the highest index plus one.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If there are fewer than two checkpoints, or they differ in their layers or
            tokens.

    Example:

    >>> import numpy as np
    >>> draws = [np.random.default_rng(seed).integers(0, 8, (100, 2)) for seed in range(3)]
    >>> figure = keras_moe.visualization.settling(draws)

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.1.
    """
    recorded = [routings(checkpoint, num_experts) for checkpoint in checkpoints]
    if len(recorded) < 2 or any(moment.keys() != recorded[0].keys() for moment in recorded):
        raise ValueError(
            "`checkpoints` must be at least two of the same layers. "
            f"Received: {[list(moment) for moment in recorded]}"
        )
    layers = {name: [moment[name] for moment in recorded] for name in recorded[0]}
    return one_panel_a_layer(layers, _draw_settling)


def _draw_settling(axes, moments):
    numbers = np.arange(1, len(moments) + 1)
    to_last = [float(router_saturation(earlier, moments[-1])) for earlier in moments[:-1]]
    to_previous = [float(router_saturation(a, b)) for a, b in zip(moments, moments[1:])]
    axes.plot(numbers[:-1], to_last, "o-", label="also at the last checkpoint")
    axes.plot(numbers[1:], to_previous, "s--", label="also at the checkpoint before")
    chance = moments[0].indices.shape[1] / len(moments[0].counts)
    axes.axhline(chance, color="grey", ls=":", label="by chance")
    axes.set(xlabel="checkpoint", ylabel="share of the choices", ylim=(0, 1.03))
    count_on(axes.xaxis)
    axes.legend(loc="lower right")
