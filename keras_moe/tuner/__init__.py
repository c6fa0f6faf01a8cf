"""Hyperparameter search for models with MoE layers, with KerasTuner.

Needs KerasTuner: `pip install "keras-tuner[bayesian]" six`.
"""

try:
    import keras_tuner  # noqa: F401
except ImportError as error:
    raise ImportError(
        "`keras_moe.tuner` needs KerasTuner, which is not installed. "
        'Run `pip install "keras-tuner[bayesian]" six`.'
    ) from error

from keras_moe.tuner.cost import CostMonitor, ParetoRow, WithinBudget, format_table, pareto_table
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
__dir__ = __all__.copy
