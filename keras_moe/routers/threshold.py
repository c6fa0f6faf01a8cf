"""Routers that send each token to all experts above a threshold, so to a varying number."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.serialization import register
from keras_moe.backend import backend
from keras_moe.ops.routing import Routing
from keras_moe.ops.selection import distribution, softmax, take_scores, top_k_indices
from keras_moe.ops.sorting import as_dtype
from keras_moe.routers.logit_router import LogitRouter


@register
class TopPRouter(LogitRouter):
    """A token goes to its best experts until their probabilities add up to `threshold`.

    Weights are the probabilities themselves. An uncertain router uses many experts;
    `losses.RouterEntropy` penalizes this. Unused positions of the K cost no computation.

    Args:
        threshold: Float from 0 to below 1. Sum of probabilities that is enough. Each token has at
            least one expert.
        max_top_k: Integer. Most experts per token, K, at most E. None: 4, or E if that is less.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.

    Reference: Huang et al. 2024 (arXiv:2403.07652), eq. 4 and 5.
    """

    min_top_k = 1

    def __init__(
        self,
        num_experts: int | None = None,
        *,
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
        logits = self.logits(tokens, training)
        probs = softmax(logits)
        indices = top_k_indices(probs, self.top_k)
        weights = take_scores(probs, indices)
        before = ops.cumsum(ops.stop_gradient(weights), axis=1) - ops.stop_gradient(weights)
        needed = ops.logical_or(before < self.threshold, ops.arange(self.top_k) == 0)
        indices = ops.where(needed, indices, -1)
        return Routing(indices, ops.where(needed, weights, 0.0), probs, logits, mask)


@register
class ReLURouter(LogitRouter):
    """The weights are `relu(logits)`: continuous, and zero for experts that are not used.

    In training the router adds an L1 loss of its weights. Its strength grows by `growth` while
    tokens have more than `top_k` experts on average, and shrinks while they have fewer. The loss
    weights each expert by its load, so no other balance loss is needed.

    Args:
        top_k: Integer. Experts per token on average that the loss aims at.
        max_top_k: Integer. Most experts per token, K, the best of those above zero. None: twice
            `top_k`. The cost of moving rows grows with it, even if fewer are used.
        growth: Float above 1. Factor by which the strength of the loss changes in a step.
        initial_strength: Float above 0. Strength of the loss at first, and its minimum.
        accumulation_steps: Integer. Micro-batches of an optimizer step, n, as for a
            `SelectionBalancer`. Each multiplies or divides the strength by `growth ** (1 / n)`.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.

    Reference: Wang et al. 2024, ReMoE (arXiv:2412.14711), eq. 5 to 9.
    """

    default_losses = ()
    max_top_k: Any = None
    min_top_k = 1
    shift_invariant = False

    def __init__(
        self,
        num_experts: int | None = None,
        top_k: int = 2,
        max_top_k: int | None = None,
        growth: float = 1.2,
        initial_strength: float = 1e-8,
        accumulation_steps: int = 1,
        **kwargs: Any,
    ):
        super().__init__(num_experts, **kwargs)
        self.top_k = check_integer("top_k", top_k)
        self.max_top_k = None if max_top_k is None else check_integer("max_top_k", max_top_k)
        self.growth = check_number("growth", growth, above=1)
        self.initial_strength = check_number("initial_strength", initial_strength, above=0)
        self.accumulation_steps = check_integer("accumulation_steps", accumulation_steps)
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
        initial = keras.initializers.Constant(self.initial_strength)
        self.strength = self.add_weight((), initial, trainable=False, name="strength")

    def route(self, tokens, mask, training, **context):
        logits = self.logits(tokens, training)
        scores = ops.relu(logits)
        indices = top_k_indices(scores, self.max_top_k)
        weights = take_scores(scores, indices)
        # `not <=` instead of `>`: a NaN score stays visible.
        indices = ops.where(ops.logical_not(weights <= 0), indices, -1)
        routing = Routing(indices, weights, distribution(scores), logits, mask)
        if training:
            loss = self._sparsity_loss(routing, scores)
            self.add_loss(as_dtype(loss, keras.config.floatx()))
        return routing

    def balance_advice(self):
        return f"The loss of the router balances the load: raise its growth of {self.growth:g}."

    def _sparsity_loss(self, routing, scores):
        """Return the loss, and change its strength for the next step."""
        # Over all scores above zero: those beyond `max_top_k` must shrink as well.
        real = ops.expand_dims(routing.mask, 1)
        counted = ops.concatenate([ops.logical_and(scores > 0, real), real], axis=1)
        totals = backend.devices.sum(ops.sum(ops.cast(counted, "float32"), axis=0))
        num_real = totals[-1]
        load = totals[:-1] / ops.maximum(num_real, 1.0)
        share = load * self.num_experts / self.top_k
        # A copy: PyTorch needs the old value for the gradient, after the assignment.
        strength = self.strength + 0.0
        if self.trainable:
            error = ops.where(num_real > 0, ops.sign(ops.sum(load) - self.top_k), 0.0)
            changed = strength * ops.power(self.growth ** (1 / self.accumulation_steps), error)
            # Below its initial value it has no effect and takes long to recover.
            self.strength.assign(ops.maximum(changed, self.initial_strength))
        return strength * ops.sum(ops.stop_gradient(share) * routing.mean(scores))
