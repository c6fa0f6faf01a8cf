"""Hyperparameter search for models with MoE layers, with KerasTuner.

Needs KerasTuner: `pip install "keras-tuner[bayesian]" six`. `SearchSpace` makes the layers,
`CostMonitor` measures what they cost, `WithinBudget` is an objective that knows the cost,
`DefaultsFirst` begins with what was picked by hand, and `pareto_table` shows what a lower loss
costs.
"""

try:
    import keras_tuner  # noqa: F401
except ImportError as error:
    raise ImportError(
        "`keras_moe.tuner` needs KerasTuner, which is not installed. "
        'Run `pip install "keras-tuner[bayesian]" six`.'
    ) from error

from keras_moe.tuner.cost import (
    CostMonitor,
    ParetoRow,
    WithinBudget,
    format_table,
    pareto_table,
)
from keras_moe.tuner.search_space import DefaultsFirst, SearchSpace

__all__ = [
    "CostMonitor",
    "DefaultsFirst",
    "ParetoRow",
    "SearchSpace",
    "WithinBudget",
    "format_table",
    "pareto_table",
]


def __dir__():
    return __all__
