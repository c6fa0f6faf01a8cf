"""Plots of what experts do. Needs matplotlib: `pip install matplotlib`.

Every function returns a `matplotlib.figure.Figure` with a panel for each layer. It takes an array
or nested list, a dict of arrays by the name of the layer, or the result of
`inspection.record_routings(model, batches)`.
"""

from keras_moe.visualization.plots import (
    coactivation,
    confidence,
    settling,
    shares_over_time,
    specialization,
)

__all__ = ["coactivation", "confidence", "settling", "shares_over_time", "specialization"]
__dir__ = __all__.copy
