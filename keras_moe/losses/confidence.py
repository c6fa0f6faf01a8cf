"""Losses for routers that are decided, but not by logits that explode."""

from keras_moe._internal.serialization import register
from keras_moe.losses.router_loss import RouterLoss
from keras_moe.ops.balance import _router_entropy, _router_z


@register
class RouterZ(RouterLoss):
    """Keeps router logits small: mean over real tokens of `logsumexp(logits) ** 2`.

    Args:
        weight: Float, at least 0. Factor of the loss.

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
        return _router_z(routing)


@register
class RouterEntropy(RouterLoss):
    """Keeps routers decided: mean over real tokens of the entropy of the scores, in nats.

    A router that chooses by a threshold, as `routers.TopPRouter` does, pays for indecision with
    more experts, and has no other reason to avoid it.

    Args:
        weight: Float, at least 0. Factor of the loss.

    Raises:
        ValueError: If `weight` is negative.

    Example:

    >>> loss = keras_moe.losses.RouterEntropy(weight=1e-4)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8)
    >>> value = loss(router(keras.random.normal((32, 64))))

    Reference: Huang et al. 2024 (arXiv:2403.07652), eq. 6.
    """

    def __init__(self, weight=1e-4):
        super().__init__(weight)

    def compute(self, routing):
        return _router_entropy(routing)
