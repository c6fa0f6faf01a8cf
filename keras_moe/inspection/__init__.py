"""Tools to look into a model: its MoE layers by name, their sizes, engines and routings."""

from keras_moe.inspection.finding import has_moe_layers, moe_layers
from keras_moe.inspection.recording import count_in_evaluation, record_routings, replaying
from keras_moe.inspection.summaries import (
    LayerDescription,
    LayerSummary,
    count_parameters,
    describe,
    summarize,
    summary,
)

__all__ = [
    "LayerDescription",
    "LayerSummary",
    "count_in_evaluation",
    "count_parameters",
    "describe",
    "has_moe_layers",
    "moe_layers",
    "record_routings",
    "replaying",
    "summarize",
    "summary",
]


def __dir__():
    return __all__
