"""Routers without a discrete choice: dense gates, soft slots and learned selectors."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal.base_layer import reseeded
from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.serialization import register
from keras_moe.backend import backend
from keras_moe.ops.routing import Routing
from keras_moe.ops.selection import cosine_logits, l2_normalize, softmax
from keras_moe.ops.soft import SoftPlan, soft_routing
from keras_moe.routers.logit_router import LogitRouter
from keras_moe.routers.router import Router


@register
class DenseRouter(LogitRouter):
    """All experts process each token, weighted by a softmax: `y = sum_e p_e f_e(x)`.

    The best choice for a few small experts. Arguments, errors, call arguments and returns: as for
    `LogitRouter`, without `indices`.

    References: Jacobs et al. 1991, "Adaptive mixtures of local experts"; Jordan and Jacobs 1994,
    "Hierarchical mixtures of experts and the EM algorithm".
    """

    default_losses = ()
    serves_all = True
    counted_by_weight = True

    @property
    def top_k(self) -> int:
        """All experts."""
        return self.num_experts

    def route(self, tokens, mask, training, **context):
        logits = self.logits(tokens, training)
        probs = softmax(logits)
        experts = ops.arange(self.num_experts, dtype="int32")
        indices = ops.broadcast_to(experts, ops.shape(probs))
        return Routing(indices, probs, probs, logits, mask)


@register
class SoftRouter(LogitRouter):
    """Each expert processes a few slots of each sequence, each a weighted mean of its tokens.

    The experts process `num_experts * slots` rows per sequence. Each output depends on the whole
    sequence, so do not use it in language models. Inputs (batch, D) are a sequence.

    Args:
        slots: Integer. Slots of each expert for each sequence, P.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.
    `indices` contains the expert with the largest weight for each token, although all are used.

    Reference: Puigcerver et al. 2023 (arXiv:2308.00951), eq. 1 to 3 and, for the unit norms and the
    scale, section 2.3.
    """

    top_k = 1
    causal = False
    default_losses = ()
    tokens_choose = False
    even_scopes = ("batch", "global")  # in a sequence `indices` are counted
    serves_tasks = False
    normalizes_kernel = True

    def __init__(self, num_experts: int | None = None, *, slots: int = 1, **kwargs: Any):
        super().__init__(num_experts, **kwargs)
        self.slots = check_integer("slots", slots)

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")

    def kernel_shape(self, features):
        return features, self.num_experts * self.slots

    def project(self, tokens):
        return cosine_logits(tokens, self.scale * l2_normalize(self.kernel, axis=0))

    def route(self, tokens, mask, training, sequence_length=None, **context):
        logits = self.logits(tokens, training)
        return soft_routing(logits, self.num_experts, mask, sequence_length)

    def plan(self, routing, experts):
        return SoftPlan(**routing.details)


@register
class DSelectKRouter(Router):
    """Up to `top_k` experts, chosen by selectors whose choice becomes exact in training.

    A selector encodes the number of its expert in bits. Each bit is a smooth step of a learned
    number: between 0 and 1 at first, so that all experts are used, and exactly 0 or 1 in the end.
    `losses.SelectorEntropy`, the default loss, makes the selectors choose. Experts of weight 0 are
    not computed, which changes no output and no gradient.

    Args:
        top_k: Integer. Number of selectors, K, at most E. Two may select the same expert.
        per_example: Boolean. Whether experts depend on the token. False: all tokens have the same
            experts and weights, as for the tasks of a `layers.MultiGateMixtureOfExperts`.
        gamma: Float above 0. Width of the smooth step, from `-gamma / 2` to `gamma / 2`.
        seed: Integer seed of the initial weights, or None.

    Other arguments, errors and call arguments: as for `Router`, without `indices`.

    Returns:
        An `ops.Routing` with E choices per token. The index of an expert of weight 0 is -1. Its
        `details` have `selectors` (T, K, E), the scores of each selector.

    Example:

    >>> router = keras_moe.routers.DSelectKRouter(num_experts=8, top_k=2)
    >>> routing = router(keras.random.normal((32, 64)))
    >>> routing.weights.shape, routing.details["selectors"].shape
    ((32, 8), (32, 2, 8))

    Reference: Hazimeh et al. 2021, "DSelect-k: Differentiable Selection in the Mixture of Experts
    with Applications to Multi-Task Learning" (arXiv:2106.03760), section 3.
    """

    default_losses = ("selector_entropy",)
    counted_by_weight = True
    has_fixed_top_k = True
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
        selectors = _selector_scores(_smooth_step(bits / self.gamma), self.num_experts)
        weights = ops.einsum("tk,tke->te", softmax(logits), selectors)
        # `not <=` instead of `>`: a NaN weight stays visible.
        serves = ops.logical_not(weights <= 0)
        indices = ops.where(serves, ops.arange(self.num_experts, dtype="int32"), -1)
        details = {"selectors": selectors}
        return Routing(indices, weights, weights, weights, mask, details=details)


def _smooth_step(values):
    """From exactly 0 below -1/2 to exactly 1 above 1/2, a cubic between, with slopes of 0 there.

    Hazimeh et al. 2021 (arXiv:2106.03760), eq. 4, with a width of 1.
    """
    values = ops.clip(values + 0.5, 0.0, 1.0)
    # The minimum, as rounding may exceed 1.
    return ops.minimum(ops.square(values) * (3.0 - 2.0 * values), 1.0)


@backend.jit_when_eager
def _selector_scores(bits, num_experts):
    """Shares (..., E) of the experts from the chance (..., M) that each bit of their number is 1.

    Hazimeh et al. 2021 (arXiv:2106.03760), eq. 3. Where E is no power of 2, an expert without a
    partner that differs in the highest bit alone does without that bit: shares always sum to 1.
    """
    shares = ops.ones((*ops.shape(bits)[:-1], 1), bits.dtype)
    for place in range(bits.shape[-1]):
        bit = bits[..., place : place + 1]
        number = min(2**place, num_experts - 2**place)  # of experts that the bit tells apart
        pairs, single = shares[..., :number], shares[..., number:]
        shares = ops.concatenate([pairs * (1.0 - bit), single, pairs * bit], axis=-1)
    return shares
