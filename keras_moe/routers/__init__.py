"""Routers: layers that choose the experts of each token."""

from functools import partial
from typing import Any

from keras_moe._internal.serialization import resolve
from keras_moe.routers.balancers import LossFreeBias, QuantileBias, SelectionBalancer
from keras_moe.routers.hashing import HashRouter
from keras_moe.routers.logit_router import LogitRouter
from keras_moe.routers.matching import BalancedAssignmentRouter, ExpertChoiceRouter, SinkhornRouter
from keras_moe.routers.noisy import GShardRouter, NoisyTopKRouter, VMoERouter
from keras_moe.routers.router import Router
from keras_moe.routers.soft import DenseRouter, DSelectKRouter, SoftRouter
from keras_moe.routers.threshold import ReLURouter, TopPRouter
from keras_moe.routers.top_k import CosineRouter, GroupLimitedRouter, TopKRouter

IDENTIFIERS: dict[str, Any] = {
    "balanced_assignment": BalancedAssignmentRouter,
    "cosine": CosineRouter,
    "dense": DenseRouter,
    "dselect_k": DSelectKRouter,
    "expert_choice": ExpertChoiceRouter,
    "group_limited": partial(GroupLimitedRouter, scaling_factor=2.5, balancer="loss_free"),
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


def get(identifier: Any, num_experts: int | None = None, **kwargs: Any) -> Router:
    """Return a router from one, its config, or a name.

    Args:
        identifier: A `Router`, its config, or a name: "balanced_assignment", "cosine", "dense",
            "dselect_k", "expert_choice", "gshard", "noisy_top_k", "relu", "sinkhorn", "soft",
            "top_k", "top_p" or "v_moe", each with the defaults of its class; "group_limited", a
            `GroupLimitedRouter` with `scaling_factor=2.5, balancer="loss_free"`; or "switch", a
            `TopKRouter` with `top_k=1, input_jitter=0.01`.
        num_experts: Integer. Number of experts of a router without one, or None.
        **kwargs: Other arguments of a router that is given by name, such as `top_k`.

    Raises:
        TypeError: If `identifier` is none of these.
        ValueError: If the number does not fit the arguments of the router.
    """
    if kwargs and not isinstance(identifier, str):
        rule = "Arguments of a router go with its name"
        raise TypeError(f"{rule}. Received: {', '.join(kwargs)} with router={identifier}")
    kwargs |= {"num_experts": num_experts, "example": "`HashRouter(vocabulary_size=10_000)`"}
    router = resolve("router", identifier, Router, IDENTIFIERS, **kwargs)
    if num_experts is not None:
        router.bind(num_experts)
    return router


__all__ = [
    "BalancedAssignmentRouter",
    "CosineRouter",
    "DSelectKRouter",
    "DenseRouter",
    "ExpertChoiceRouter",
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
    "SinkhornRouter",
    "SoftRouter",
    "TopKRouter",
    "TopPRouter",
    "VMoERouter",
    "get",
]

__dir__ = __all__.copy
