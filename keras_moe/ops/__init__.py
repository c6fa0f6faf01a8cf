"""Pure functions on tensors: routing, plans, grouped products and losses."""

from keras_moe.ops.balance import (
    agreement,
    load_balance,
    masked_mean,
    noisy_load,
    router_entropy,
    router_z,
    sequence_load_balance,
    squared_importance_variation,
    squared_load_variation,
)
from keras_moe.ops.capacity import expert_capacity, plan_groups
from keras_moe.ops.expert_choice import expert_choice_routing, plan_expert_choice
from keras_moe.ops.grouped_matmul import grouped_matmul, grouped_outer
from keras_moe.ops.plans import GroupedPlan
from keras_moe.ops.platforms import platform
from keras_moe.ops.routing import (
    Routing,
    clean_logits,
    make_routing,
    top_k_routing,
)
from keras_moe.ops.selection import group_limited_scores, take_scores, top_k_indices
from keras_moe.ops.soft import SoftPlan, plan_soft, soft_routing
from keras_moe.ops.transport import balanced_assignment, sinkhorn_plan

__all__ = [
    "GroupedPlan",
    "Routing",
    "SoftPlan",
    "agreement",
    "balanced_assignment",
    "clean_logits",
    "expert_capacity",
    "expert_choice_routing",
    "group_limited_scores",
    "grouped_matmul",
    "grouped_outer",
    "load_balance",
    "make_routing",
    "masked_mean",
    "noisy_load",
    "plan_expert_choice",
    "plan_groups",
    "plan_soft",
    "platform",
    "router_entropy",
    "router_z",
    "sequence_load_balance",
    "sinkhorn_plan",
    "soft_routing",
    "squared_importance_variation",
    "squared_load_variation",
    "take_scores",
    "top_k_indices",
    "top_k_routing",
]


def __dir__():
    return __all__
