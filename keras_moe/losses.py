"""Router losses: objects that turn a routing into a scalar that training adds to its loss."""

from keras_moe import ops
from keras_moe.serialization import register, resolve
from keras_moe.validation import check_not_negative


class RouterLoss:
    """Abstract: a weighted scalar of a routing.

    A subclass implements `compute(routing)`, which returns the loss before its weight.

    Args:
        weight: what the loss is multiplied by, at least 0.
    """

    def __init__(self, weight):
        check_not_negative("weight", weight)
        self.weight = weight

    def __call__(self, routing):
        return self.weight * self.compute(routing)

    def compute(self, routing):
        raise NotImplementedError(f"{type(self).__name__} must implement `compute(routing)`.")

    def get_config(self):
        return {"weight": self.weight}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@register
class LoadBalance(RouterLoss):
    """Spreads tokens over the experts: `E * sum_e f_e * P_e`, 1 at balance, more when skewed.

    `f_e` is expert e's share of all assignments over all K choices, before any drop; `P_e` is its
    mean probability. Padding counts in neither. The gradient flows through `P` only.

    Implementations differ in this loss. This one divides `f` by K, so the same weight serves every
    `top_k`, and is computed for each layer alone, so that layers cannot cancel each other.

    Args:
        weight: what the loss is multiplied by.

    Raises:
        ValueError: If `weight` is negative.

    Example:

    >>> loss = keras_moe.losses.LoadBalance(weight=1e-2)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> value = loss(router(keras.random.normal((32, 64))))

    Reference: Fedus et al. 2021 (arXiv:2101.03961), eq. 4 to 6.
    """

    def __init__(self, weight=1e-2):
        super().__init__(weight)

    def compute(self, routing):
        return ops.load_balance(routing)


@register
class RouterZ(RouterLoss):
    """Keeps router logits small: mean over real tokens of `logsumexp(logits) ** 2`.

    Args:
        weight: what the loss is multiplied by.

    Raises:
        ValueError: If `weight` is negative.

    Example:

    >>> loss = keras_moe.losses.RouterZ(weight=1e-3)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> value = loss(router(keras.random.normal((32, 64))))

    Reference: Zoph et al. 2022, ST-MoE (arXiv:2202.08906), eq. 5.
    """

    def __init__(self, weight=1e-3):
        super().__init__(weight)

    def compute(self, routing):
        return ops.router_z(routing)


_BY_NAME = {"load_balance": LoadBalance, "router_z": RouterZ}


def get(identifier):
    """A router loss from an instance, a config, "load_balance" or "router_z".

    Raises:
        ValueError: If `identifier` is none of these.
    """
    return resolve("router_losses", identifier, RouterLoss, _BY_NAME)


__all__ = ["LoadBalance", "RouterLoss", "RouterZ", "get"]
