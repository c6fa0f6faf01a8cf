"""Routers that give tokens different numbers of experts."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.initializers import reseeded
from keras_moe._internal.serialization import register
from keras_moe.backend import backend
from keras_moe.ops.routing import _make_routing
from keras_moe.ops.scores import distribution, selector_scores, smooth_step, softmax
from keras_moe.ops.selection import take_scores, top_k_indices
from keras_moe.routers.logit_router import LogitRouter
from keras_moe.routers.router import Router


@register
class TopPRouter(LogitRouter):
    """A token goes to its best experts until their probabilities add up to `threshold`.

    Weights are the probabilities themselves. An undecided router uses many experts;
    `losses.RouterEntropy` penalizes indecision. Unused places of the K cost nothing in the experts.

    Args:
        threshold: Float from 0 to below 1. Sum of probabilities that is enough. At least one expert
            serves each token.
        max_top_k: Integer. Most experts per token, K, at most E. None: 4, or E if that is less.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.

    Reference: Huang et al. 2024 (arXiv:2403.07652), eq. 4 and 5.
    """

    min_top_k = 1

    def __init__(
        self,
        num_experts: int | None = None,
        threshold: float = 0.4,
        max_top_k: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(num_experts, **kwargs)
        self.threshold = check_number("threshold", threshold, below=1)
        self.top_k = None if max_top_k is None else check_integer("max_top_k", max_top_k)
        self.check_num_experts()

    def check_num_experts(self):
        if self.top_k is None and self.num_experts is not None:
            self.top_k = min(4, self.num_experts)
        super().check_num_experts()

    def route(self, tokens, mask, training, **context):
        logits, mask = self.logits(tokens, mask, training)
        probs = softmax(logits)
        indices = top_k_indices(probs, self.top_k)
        weights = take_scores(probs, indices)
        before = ops.cumsum(ops.stop_gradient(weights), axis=1) - ops.stop_gradient(weights)
        needed = before < self.threshold
        needed = ops.logical_or(needed, ops.arange(self.top_k) == 0)
        indices = ops.where(needed, indices, -1)
        return _make_routing(indices, ops.where(needed, weights, 0.0), probs, logits, mask)

    def get_config(self):
        config = super().get_config()
        return {**config, "threshold": self.threshold, "max_top_k": self.max_top_k}


@register
class ReLURouter(LogitRouter):
    """The weights are `relu(logits)`: continuous, and zero for experts that do not serve.

    In training the router adds an L1 loss of its weights, whose strength grows by `growth` while
    more than `top_k` experts serve a token on average and shrinks while there are fewer. The loss
    weights each expert by its load, so no other balance loss is needed.

    Args:
        top_k: Integer. Experts per token on average that the loss aims at.
        max_top_k: Integer. Most experts per token, K, the best of those above zero. None: twice
            `top_k`. The cost of moving rows grows with it, used or not.
        growth: Float above 1. Factor by which the strength of the loss changes in a step.
        initial_strength: Float above 0. Strength of the loss at first, and the least.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.

    Reference: Wang et al. 2024, ReMoE (arXiv:2412.14711), eq. 5 to 9.
    """

    default_losses = ()
    max_top_k: Any = None
    min_top_k = 1

    def __init__(
        self,
        num_experts: int | None = None,
        top_k: int = 2,
        max_top_k: int | None = None,
        growth: float = 1.2,
        initial_strength: float = 1e-8,
        **kwargs: Any,
    ):
        super().__init__(num_experts, **kwargs)
        self.top_k = check_integer("top_k", top_k)
        self.max_top_k = None if max_top_k is None else check_integer("max_top_k", max_top_k)
        self.growth = check_number("growth", growth, above=1)
        self.initial_strength = check_number("initial_strength", initial_strength, above=0)
        self.check_num_experts()

    def check_num_experts(self):
        if self.num_experts == 1 or (self.num_experts and self.max_top_k is None):
            self.max_top_k = min(2 * self.top_k, self.num_experts)
        super().check_num_experts()
        if self.max_top_k is not None and self.max_top_k < self.top_k:
            rule = "`max_top_k` must be at least `top_k`"
            raise ValueError(f"{rule}. Received: max_top_k={self.max_top_k}, top_k={self.top_k}")

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.strength = self.add_weight(
            name="strength",
            shape=(),
            initializer=keras.initializers.Constant(self.initial_strength),
            trainable=False,
        )

    def route(self, tokens, mask, training, **context):
        logits, mask = self.logits(tokens, mask, training)
        scores = ops.relu(logits)
        indices = top_k_indices(scores, self.max_top_k)
        weights = take_scores(scores, indices)
        # `not <=` instead of `>`: a NaN score stays visible.
        indices = ops.where(ops.logical_not(weights <= 0), indices, -1)
        routing = _make_routing(indices, weights, distribution(scores), logits, mask)
        if training:
            self._add_sparsity_loss(routing, scores)
        return routing

    def _add_sparsity_loss(self, routing, scores):
        # Over all scores above zero: those beyond `max_top_k` must shrink as well.
        real = ops.expand_dims(routing.mask, 1)
        counted = ops.concatenate([ops.logical_and(scores > 0, real), real], axis=1)
        totals = ops.sum(ops.cast(counted, "float32"), axis=0)
        totals = backend.sum_over_replicas(totals)
        num_serving, num_real = totals[:-1], totals[-1]
        load = num_serving / ops.maximum(num_real, 1.0)
        share = load * self.num_experts / self.top_k
        mean_scores = routing.mean(scores)
        # A copy: PyTorch needs the old value for the gradient, after the assignment.
        strength = self.strength + 0.0
        self.add_loss(strength * ops.sum(ops.stop_gradient(share) * mean_scores))
        if not self.trainable:
            return
        error = ops.sign(ops.sum(load) - self.top_k)
        error = ops.where(num_real > 0, error, 0.0)
        changed = strength * ops.power(self.growth, error)
        # Below its initial value it has no effect and takes long to recover.
        self.strength.assign(ops.maximum(changed, self.initial_strength))

    def get_config(self):
        names = ("top_k", "max_top_k", "growth", "initial_strength")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


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
        top_k: Integer. Number of selectors, K, at most E. Two may select the same expert.
        per_example: Boolean. Whether a token has a choice of its own. False: all tokens have the
            same experts and weights, as where each task of a
            `layers.MultiGateMixtureOfExperts` should find its experts.
        gamma: Float above 0. Width of the smooth step. A bit is exact when its number leaves the
            interval from `-gamma / 2` to `gamma / 2`.
        seed: Integer seed of the initial weights, or None.

    Other arguments, errors and call arguments: as for `Router`, without `indices`.

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
    counted_by_weight = True

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

    def compute_output_spec(self, tokens, *args, **kwargs):
        selectors = keras.KerasTensor((tokens.shape[0], self.top_k, self.num_experts), "float32")
        return super().compute_output_spec(tokens, *args, **kwargs)._replace(selectors=selectors)

    def get_config(self):
        names = ("top_k", "per_example", "gamma", "seed")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
