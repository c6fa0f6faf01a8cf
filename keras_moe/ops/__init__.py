"""Pure functions on tensors: routing, plans and grouped products."""

from keras_moe.backend.base import any_derivative, platform
from keras_moe.ops.grouped_matmul import grouped_matmul
from keras_moe.ops.plans import GroupedPlan
from keras_moe.ops.routing import Routing, top_k_routing

__all__ = [
    "GroupedPlan",
    "Routing",
    "any_derivative",
    "grouped_matmul",
    "platform",
    "top_k_routing",
]

__dir__ = __all__.copy
