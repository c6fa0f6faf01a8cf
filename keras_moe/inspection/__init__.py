"""Tools to look into a model: its MoE layers by name, their sizes, engines and routings."""

from keras_moe._internal.former_names import former_names
from keras_moe.inspection.recording import count_in_evaluation, record_routings, replay_routings
from keras_moe.inspection.summaries import (
    LayerSummary,
    count_parameters,
    has_moe_layers,
    moe_layers,
    summarize,
)

__all__ = [
    "LayerSummary",
    "count_in_evaluation",
    "count_parameters",
    "has_moe_layers",
    "moe_layers",
    "record_routings",
    "replay_routings",
    "summarize",
]

__getattr__ = former_names(__name__)
__dir__ = __all__.copy
