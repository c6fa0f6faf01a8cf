"""Expert usage, decisions and specialization: pure functions, and Keras metrics of usage."""

from keras_moe._internal.former_names import former_names
from keras_moe.metrics.decisions import (
    coactivation,
    count_table,
    expert_saliency,
    mutual_information,
    router_saturation,
    unserved_fraction,
)
from keras_moe.metrics.usage import (
    DeadExpertsOverWindow,
    DroppedFraction,
    UsageMetric,
    dead_experts,
    dropped_fraction,
    expert_share,
    load_entropy,
    load_imbalance,
)
from keras_moe.ops.balance import router_entropy

__all__ = [
    "DeadExpertsOverWindow",
    "DroppedFraction",
    "UsageMetric",
    "coactivation",
    "count_table",
    "dead_experts",
    "dropped_fraction",
    "expert_saliency",
    "expert_share",
    "load_entropy",
    "load_imbalance",
    "mutual_information",
    "router_entropy",
    "router_saturation",
    "unserved_fraction",
]

__getattr__ = former_names(__name__)
__dir__ = __all__.copy
