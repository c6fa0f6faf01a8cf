"""Expert usage, decisions and specialization: pure functions, and Keras metrics of usage."""

from keras_moe.metrics.decisions import (
    coactivation,
    count_table,
    expert_saliency,
    mutual_information,
    router_confidence,
    router_saturation,
    unserved_fraction,
)
from keras_moe.metrics.usage import (
    DeadExperts,
    DeadExpertsOverWindow,
    DroppedFraction,
    ExpertShare,
    LoadEntropy,
    LoadImbalance,
    active_fraction,
    dead_experts,
    dead_experts_over_window,
    dropped_fraction,
    expert_share,
    load_entropy,
    load_imbalance,
    load_variation,
    max_share,
    utilization_quantiles,
)
from keras_moe.ops.balance import router_entropy

__all__ = [
    "DeadExperts",
    "DeadExpertsOverWindow",
    "DroppedFraction",
    "ExpertShare",
    "LoadEntropy",
    "LoadImbalance",
    "active_fraction",
    "coactivation",
    "count_table",
    "dead_experts",
    "dead_experts_over_window",
    "dropped_fraction",
    "expert_saliency",
    "expert_share",
    "load_entropy",
    "load_imbalance",
    "load_variation",
    "max_share",
    "mutual_information",
    "router_confidence",
    "router_entropy",
    "router_saturation",
    "unserved_fraction",
    "utilization_quantiles",
]


def __dir__():
    return __all__
