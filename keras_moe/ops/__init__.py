from keras_moe.ops.balance import load_balance, router_z
from keras_moe.ops.feed_forward import grouped_feed_forward
from keras_moe.ops.grouped import Groups
from keras_moe.ops.grouped_matmul import grouped_matmul
from keras_moe.ops.plans import GroupedPlan, dropped_fraction, expert_capacity, plan_groups
from keras_moe.ops.routing import Routing, top_k_indices, top_k_routing

__all__ = [
    "GroupedPlan",
    "Groups",
    "Routing",
    "dropped_fraction",
    "expert_capacity",
    "grouped_feed_forward",
    "grouped_matmul",
    "load_balance",
    "plan_groups",
    "router_z",
    "top_k_indices",
    "top_k_routing",
]
