"""Pure functions on tensors: routing, plans and grouped products."""

from keras_moe.ops.balance import masked_mean
from keras_moe.ops.capacity import expert_capacity, plan_groups
from keras_moe.ops.grouped_matmul import grouped_matmul, grouped_outer
from keras_moe.ops.plans import GroupedPlan
from keras_moe.ops.platforms import platform
from keras_moe.ops.routing import Routing, make_routing, top_k_routing
from keras_moe.ops.selection import top_k_indices

__all__ = [
    "GroupedPlan",
    "Routing",
    "expert_capacity",
    "grouped_matmul",
    "grouped_outer",
    "make_routing",
    "masked_mean",
    "plan_groups",
    "platform",
    "top_k_indices",
    "top_k_routing",
]

__dir__ = __all__.copy
