"""Routers: layers that decide which experts serve which token."""

from functools import partial
from typing import Any

from keras_moe._internal.serialization import resolve
from keras_moe.routers.balancers import (
    BalancedAssignmentRouter,
    LossFreeBias,
    QuantileBias,
    SelectionBalancer,
    SinkhornRouter,
)
from keras_moe.routers.fixed import ForcedRouter, HashRouter
from keras_moe.routers.logit_router import LogitRouter
from keras_moe.routers.noisy import GShardRouter, NoisyTopKRouter, VMoERouter
from keras_moe.routers.router import Router
from keras_moe.routers.top_k import CosineRouter, GroupLimitedRouter, SelectionRouter, TopKRouter
from keras_moe.routers.unchosen import DenseRouter, ExpertChoiceRouter, SoftRouter
from keras_moe.routers.varying import ReLURouter, TopPRouter

BY_NAME = {
    "balanced_assignment": BalancedAssignmentRouter,
    "cosine": CosineRouter,
    "deepseek_v3": partial(GroupLimitedRouter, scaling_factor=2.5, balancer="loss_free"),
    "dense": DenseRouter,
    "expert_choice": ExpertChoiceRouter,
    "gshard": GShardRouter,
    "noisy_top_k": NoisyTopKRouter,
    "relu": ReLURouter,
    "sinkhorn": SinkhornRouter,
    "soft": SoftRouter,
    "switch": partial(TopKRouter, top_k=1, input_jitter=0.01),
    "top_k": TopKRouter,
    "top_p": TopPRouter,
    "v_moe": VMoERouter,
}


def get(identifier: Any, num_experts: int | None) -> Router:
    """Return a router for a number of experts.

    Args:
        identifier: A `Router`, a serialized one, or a name in `BY_NAME`, which stands for its
            defaults.
        num_experts: Integer. Number of experts of a router without one.

    Raises:
        TypeError: If `identifier` is none of these.
        ValueError: If the number does not fit the arguments of the router.
    """
    router = resolve("router", identifier, Router, BY_NAME, num_experts=num_experts)
    router.bind(num_experts)
    return router


__all__ = [
    "BY_NAME",
    "BalancedAssignmentRouter",
    "CosineRouter",
    "DenseRouter",
    "ExpertChoiceRouter",
    "ForcedRouter",
    "GShardRouter",
    "GroupLimitedRouter",
    "HashRouter",
    "LogitRouter",
    "LossFreeBias",
    "NoisyTopKRouter",
    "QuantileBias",
    "ReLURouter",
    "Router",
    "SelectionBalancer",
    "SelectionRouter",
    "SinkhornRouter",
    "SoftRouter",
    "TopKRouter",
    "TopPRouter",
    "VMoERouter",
    "get",
]


def __dir__():
    return __all__
