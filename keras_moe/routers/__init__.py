"""Routers: layers that decide which experts serve which token."""

from functools import partial

from keras_moe._internal.serialization import resolve
from keras_moe.routers import balancers
from keras_moe.routers.balanced_assignment import BalancedAssignmentRouter
from keras_moe.routers.balancers import LossFreeBias, QuantileBias, SelectionBalancer
from keras_moe.routers.cosine import CosineRouter
from keras_moe.routers.dense import DenseRouter
from keras_moe.routers.expert_choice import ExpertChoiceRouter
from keras_moe.routers.forced import ForcedRouter
from keras_moe.routers.group_limited import GroupLimitedRouter
from keras_moe.routers.gshard import GShardRouter
from keras_moe.routers.hash import HashRouter
from keras_moe.routers.logit_router import LogitRouter
from keras_moe.routers.noisy_top_k import NoisyTopKRouter
from keras_moe.routers.relu import ReLURouter
from keras_moe.routers.router import Router
from keras_moe.routers.selection_router import SelectionRouter
from keras_moe.routers.sinkhorn import SinkhornRouter
from keras_moe.routers.soft import SoftRouter
from keras_moe.routers.top_k import TopKRouter
from keras_moe.routers.top_p import TopPRouter
from keras_moe.routers.v_moe import VMoERouter

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


def get(identifier, num_experts):
    """A router from an instance, a config, or a name in `BY_NAME`.

    Args:
        identifier: a `Router`, a serialized one, or a name, which stands for its defaults.
        num_experts: number of experts of a router that is given by name, or has none of its own.

    Raises:
        ValueError: If `identifier` is none of these.
    """
    is_name = isinstance(identifier, str) and identifier in balancers.BY_NAME
    if is_name or isinstance(identifier, SelectionBalancer):
        raise ValueError(
            f"A balancer is a part of a router. Received: router={identifier!r}. "
            f"Pass `router=routers.TopKRouter(balancer={identifier!r})`."
        )
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
