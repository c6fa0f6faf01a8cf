"""Routing without top-k: every expert with a positive logit serves."""

from functools import partial

import keras
from keras import ops

from keras_moe._internal.serialization import register
from keras_moe._internal.validation import (
    check_positive_integer,
    check_positive_number,
    check_top_k,
)
from keras_moe.backend import backend
from keras_moe.ops import make_routing, masked_mean, take_scores, top_k_indices
from keras_moe.ops.scores import distribution
from keras_moe.routers.logit_router import LogitRouter


def _check_growth(name, value):
    value = check_positive_number(name, value, example=1.2)
    if not value > 1:
        raise ValueError(
            f"`{name}` must be above 1, or the loss could not adapt. Received: "
            f"{name}={value!r}. Pass, for example, 1.2."
        )
    return value


@register
class ReLURouter(LogitRouter):
    """The weights are `relu(logits)`: continuous, and zero for experts that do not serve.

    In training the router adds an L1 loss of its weights, whose strength it adapts until `top_k`
    experts serve a token on average: it grows by `growth` while there are more and shrinks while
    there are fewer. The loss weights each expert by its load, so that it also balances: no other
    balance loss is needed.

    Args:
        num_experts: number of experts, E.
        top_k: experts per token on average that the loss aims at.
        max_top_k: most experts per token, K; if more than K are above zero, the best K serve. None:
            twice `top_k`. The cost of moving rows grows with it, used or not.
        growth: factor by which the strength of the loss changes in a step, above 1.
        initial_strength: strength of the loss at first, positive.
        **kwargs: `input_jitter`, `logit_noise`, `kernel_initializer`, `kernel_regularizer` and
            `seed`, as in `TopKRouter`, and `name`.

    Raises:
        ValueError: If an argument is out of its range.

    Call arguments:
        tokens: (T, D) float tensor.
        mask: (T,) bool tensor, False for padding, or None.
        training: whether the loss is added and adapted, and noise drawn.

    Returns:
        An `ops.Routing`.

    Example:

    >>> router = keras_moe.routers.ReLURouter(num_experts=8, top_k=2)
    >>> router(keras.random.normal((32, 64))).weights.shape
    (32, 4)

    Reference: Wang et al. 2024, ReMoE (arXiv:2412.14711), eq. 5 to 9.
    """

    default_losses = ()
    shift_invariant = False

    _attribute_checks = {
        "top_k": check_positive_integer,
        "growth": _check_growth,
        "initial_strength": partial(check_positive_number, example=1e-8),
    }
    _fixed_attributes = ("initial_strength",)

    def __init__(
        self, num_experts=None, top_k=2, max_top_k=None, growth=1.2, initial_strength=1e-8, **kwargs
    ):
        super().__init__(num_experts, **kwargs)
        self.top_k = top_k
        if max_top_k is None and num_experts is not None:
            max_top_k = min(2 * top_k, num_experts)
        if max_top_k is not None:
            max_top_k = check_top_k(max_top_k, num_experts, "ReLURouter", name="max_top_k")
        if max_top_k is not None and max_top_k < top_k:
            raise ValueError(
                "`max_top_k` must be at least `top_k`, the mean that the loss aims at. Received: "
                f"max_top_k={max_top_k}, top_k={top_k}. Raise the one or lower the other."
            )
        self._max_top_k = max_top_k
        self.growth = growth
        self.initial_strength = initial_strength

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.strength = self.add_weight(
            name="strength",
            shape=(),
            initializer=keras.initializers.Constant(self.initial_strength),
            trainable=False,
        )

    def balance_advice(self):
        return f"The loss of the router balances the load: raise its growth of {self.growth:g}."

    @property
    def max_top_k(self):
        return self._max_top_k

    @property
    def min_top_k(self):
        return 1

    def route(self, tokens, mask, training):
        logits, mask = self.checked_logits(tokens, mask, training)
        scores = ops.relu(logits)
        indices = top_k_indices(scores, self.max_top_k)
        weights = take_scores(scores, indices)
        # `not <=` instead of `>`: a NaN score stays visible.
        indices = ops.where(ops.logical_not(weights <= 0), indices, -1)
        routing = make_routing(indices, weights, distribution(scores), logits, mask)
        if training:
            self._add_sparsity_loss(routing, scores)
        return routing

    def _add_sparsity_loss(self, routing, scores):
        # Over all scores above zero: those beyond `max_top_k` must shrink as well.
        serves = ops.logical_and(scores > 0, ops.expand_dims(routing.mask, 1))
        serves_or_real = ops.concatenate([serves, ops.expand_dims(routing.mask, 1)], axis=1)
        totals = backend.sum_over_replicas(ops.sum(ops.cast(serves_or_real, "float32"), axis=0))
        num_serving, num_real = totals[:-1], totals[-1]
        load = num_serving / ops.maximum(num_real, 1.0)
        share = load * self.num_experts / self.top_k
        mean_scores = masked_mean(scores, routing.mask)
        # A tensor of its own: PyTorch needs the old value for the gradient, after the assignment.
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
        return {
            **super().get_config(),
            "top_k": self.top_k,
            "max_top_k": self.max_top_k,
            "growth": self.growth,
            "initial_strength": self.initial_strength,
        }
