"""Tools to look into a model: its MoE layers by name, their sizes and routings."""

from keras_moe.inspection.recording import count_in_evaluation, record_routings, replay_routings
from keras_moe.inspection.summaries import LayerSummary, count_parameters, moe_layers, summarize

__all__ = [
    "LayerSummary",
    "count_in_evaluation",
    "count_parameters",
    "moe_layers",
    "record_routings",
    "replay_routings",
    "summarize",
]

__dir__ = __all__.copy
