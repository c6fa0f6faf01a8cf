"""Hyperparameter search for models with MoE layers, with KerasTuner.

Needs KerasTuner: `pip install "keras-tuner[bayesian]" six`.
"""

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
