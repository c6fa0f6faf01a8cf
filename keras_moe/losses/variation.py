"""The two balance losses of the first sparse mixtures: even importance and even load."""

from keras_moe import ops
from keras_moe._internal.serialization import register
from keras_moe.losses.router_loss import RouterLoss


@register
class ImportanceVariation(RouterLoss):
    """Evens out the summed scores of the experts: their squared coefficient of variation.

    Args:
        weight: what the loss is multiplied by.

    Raises:
        ValueError: If `weight` is negative.

    Example:

    >>> loss = keras_moe.losses.ImportanceVariation(weight=1e-2)
    >>> router = keras_moe.routers.NoisyTopKRouter(num_experts=8)
    >>> value = loss(router(keras.random.normal((32, 64))))

    Reference: Shazeer et al. 2017 (arXiv:1701.06538), eq. 6 and 7, of the scores of all experts as
    in V-MoE (arXiv:2106.05974), appendix A.1.
    """

    balances = True

    def __init__(self, weight=1e-2):
        super().__init__(weight)

    def compute(self, routing):
        return ops.squared_importance_variation(routing)


@register
class LoadVariation(RouterLoss):
    """Evens out the load of the experts: its squared coefficient of variation.

    Of a noisy router the load is the expected number of assignments, which has a gradient. Of any
    other it is a count without one: use `LoadBalance` there.

    Args:
        weight: what the loss is multiplied by.

    Raises:
        ValueError: If `weight` is negative.

    Example:

    >>> loss = keras_moe.losses.LoadVariation(weight=1e-2)
    >>> router = keras_moe.routers.NoisyTopKRouter(num_experts=8)
    >>> value = loss(router(keras.random.normal((32, 64)), training=True))

    Reference: Shazeer et al. 2017 (arXiv:1701.06538), eq. 8 to 11.
    """

    balances = True

    def __init__(self, weight=1e-2):
        super().__init__(weight)

    def compute(self, routing):
        return ops.squared_load_variation(routing)
