from keras_moe.routers.router import Router
from keras_moe.routers.top_k import TopKRouter
from keras_moe.serialization import resolve

_BY_NAME = {"top_k": TopKRouter}


def get(identifier, num_experts):
    """A router from an instance, a config, or a name, which stands for its class with defaults.

    Args:
        identifier: a `Router`, a serialized one, or "top_k".
        num_experts: number of experts of a router that is given by name.

    Raises:
        ValueError: If `identifier` is none of these.
    """
    return resolve("router", identifier, Router, _BY_NAME, num_experts=num_experts)


__all__ = ["Router", "TopKRouter", "get"]
