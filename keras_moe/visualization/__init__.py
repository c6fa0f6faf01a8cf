"""Plots of what experts do. Needs matplotlib: `pip install matplotlib`.

Every function returns a `matplotlib.figure.Figure` and takes its data in one of three forms: an
array or nested list, a dict of arrays by the name of the layer, or the result of
`inspection.record_routings(model, batches)`. Each layer has a panel of its own.
"""

from keras_moe.visualization.plots import (
    coactivation,
    confidence,
    settling,
    shares_over_time,
    specialization,
)

__all__ = ["coactivation", "confidence", "settling", "shares_over_time", "specialization"]


def __dir__():
    return __all__
