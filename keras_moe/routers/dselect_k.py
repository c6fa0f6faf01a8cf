"""DSelect-k: a choice of experts that is smooth in training, and in the end exact."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.initializers import reseeded
from keras_moe._internal.serialization import register
from keras_moe.ops.routing import _make_routing
from keras_moe.ops.scores import selector_scores, smooth_step, softmax
from keras_moe.routers.router import Router


@register
class DSelectKRouter(Router):
    """Up to `top_k` experts, chosen by selectors whose choice becomes exact in training.

    A selector encodes the number of its expert in about log2 E bits. Each bit is a smooth step of a
    number that is learned: between 0 and 1 at first, so that all experts serve, and exactly 0 or 1
    in the end. The weights of the selectors come from a softmax. Nothing is discontinuous, unlike
    the choice of a `TopKRouter`.

    Experts whose weight is exactly 0 are not computed, in training and in inference, and neither
    the outputs nor a gradient change by that. `losses.SelectorEntropy`, the loss by default, makes
    the selectors choose; raise its weight if, at the end, more than `top_k` experts have weights.

    Args:
        num_experts: Integer. Number of experts, E. None: the number of the layer around the router.
        top_k: Integer. Number of selectors, K, at most E. Two may select the same expert.
        per_example: Boolean. Whether a token has a choice of its own. False: all tokens have the
            same experts and weights, as where each task of a
            `layers.MultiGateMixtureOfExperts` should find its experts.
        gamma: Float above 0. Width of the smooth step. A bit is exact when its number leaves the
            interval from `-gamma / 2` to `gamma / 2`.
        seed: Integer seed of the initial weights, or None.
        **kwargs: `name` and `trainable`, as in any Keras layer.

    Raises and call arguments: as for `Router`, without `indices`.

    Returns:
        An `ops.Routing` with E choices per token. The index of an expert of weight 0 is -1.

    Example:

    >>> router = keras_moe.routers.DSelectKRouter(num_experts=8, top_k=2)
    >>> routing = router(keras.random.normal((32, 64)))
    >>> routing.weights.shape, routing.selectors.shape
    ((32, 8), (32, 2, 8))

    Reference: Hazimeh et al. 2021, "DSelect-k: Differentiable Selection in the Mixture of Experts
    with Applications to Multi-Task Learning" (arXiv:2106.03760), section 3.
    """

    default_losses = ("selector_entropy",)
    min_top_k = 1

    def __init__(
        self,
        num_experts: int | None = None,
        top_k: int = 2,
        per_example: bool = True,
        gamma: float = 1.0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(num_experts, **kwargs)
        self.top_k = check_integer("top_k", top_k)
        self.per_example = bool(per_example)
        self.gamma = check_number("gamma", gamma, above=0)
        self.seed = None if seed is None else check_integer("seed", seed, minimum=0)
        self.check_num_experts()

    @property
    def max_top_k(self) -> int:
        """All experts: each may have a weight until the selectors have chosen."""
        return self.num_experts

    def build(self, tokens_shape):
        # Of each selector the logit of its weight, and its bits.
        width = self.top_k * (1 + (self.num_experts - 1).bit_length())
        limit = self.gamma / 100
        small = keras.initializers.RandomUniform(-limit, limit, seed=self.seed)
        if self.per_example:
            self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: tokens_shape[-1]})
            self.kernel = self.add_weight(
                name="kernel", shape=(tokens_shape[-1], width), initializer=small
            )
        self.bias = self.add_weight(name="bias", shape=(width,), initializer=reseeded(small, 1))

    def route(self, tokens, mask, training, **context):
        num_tokens = ops.shape(tokens)[0]
        if self.per_example:
            projected = ops.matmul(tokens, self.kernel) + self.bias
        else:
            projected = ops.broadcast_to(self.bias, (num_tokens, *self.bias.shape))
        logits, bits = projected[:, : self.top_k], projected[:, self.top_k :]
        bits = ops.reshape(bits, (num_tokens, self.top_k, bits.shape[1] // self.top_k))
        selectors = selector_scores(smooth_step(bits / self.gamma), self.num_experts)
        weights = ops.einsum("tk,tke->te", softmax(logits), selectors)
        # `not <=` instead of `>`: a NaN weight stays visible.
        serves = ops.logical_not(weights <= 0)
        indices = ops.where(serves, ops.arange(self.num_experts, dtype="int32"), -1)
        routing = _make_routing(indices, weights, weights, weights, mask)
        return routing._replace(selectors=selectors)

    def get_config(self):
        return {
            **super().get_config(),
            "top_k": self.top_k,
            "per_example": self.per_example,
            "gamma": self.gamma,
            "seed": self.seed,
        }
