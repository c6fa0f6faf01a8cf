"""Plots of how a router decides."""

import numpy as np
from keras import ops

from keras_moe import metrics
from keras_moe.visualization import sources
from keras_moe.visualization.panels import count_on, heat_map, one_panel_a_layer


def coactivation(routings, num_experts=None):
    """Which experts serve the same tokens: share of the row's tokens that the column serves too.

    Args:
        routings: The result of `inspection.record_routings`, or integer indices (T, K) with -1
            for no expert, or a dict of these by layer.
        num_experts: Integer or None. E, for arrays; by default the highest index plus one.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If the indices are not integers (T, K).

    Example:

    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> routing = router(keras.random.normal((32, 64)))
    >>> figure = keras_moe.visualization.coactivation(routing.indices, num_experts=8)

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.2.
    """
    return one_panel_a_layer(sources.routings(routings, num_experts), _draw_coactivation)


def _draw_coactivation(axes, routing):
    share = ops.convert_to_numpy(metrics.coactivation(routing)).copy()
    np.fill_diagonal(share, np.nan)  # every expert is always together with itself
    heat_map(axes, share, "share of the row's tokens", vmin=0)
    axes.set(xlabel="also served by expert", ylabel="served by expert")
    count_on(axes.xaxis)
    count_on(axes.yaxis)


def confidence(routings):
    """How sure the router is: the highest probability of each token, as a histogram.

    The dotted line is chance, 1 / E: a peak there means a router without a preference, a peak at 1
    one that gives other experts no weight.

    Args:
        routings: The result of `inspection.record_routings`, or probabilities (T, E), or a dict of
            these by layer.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If there is no layer, or an array does not hold probabilities.

    Example:

    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> routing = router(keras.random.normal((32, 64)))
    >>> figure = keras_moe.visualization.confidence(routing.probs)
    """
    return one_panel_a_layer(sources.probabilities(routings), _draw_confidence)


def _draw_confidence(axes, probs):
    highest = probs.max(axis=1, initial=0)
    if len(highest):
        limit = min(1, 2 * highest.max())
        each = np.full(len(highest), 1 / len(highest))
        axes.hist(highest, bins=np.linspace(0, limit, 41), weights=each)
        axes.axvline(highest.mean(), color="C1", label=f"mean {highest.mean():.1%}")
        axes.set_xlim(0, limit)
    axes.axvline(1 / probs.shape[1], color="grey", ls=":", label="chance")
    axes.set(xlabel="highest probability of a token", ylabel="share of the tokens")
    # Not `loc="best"`: on a busy machine the search takes so long that Matplotlib warns.
    axes.legend(loc="upper right")
