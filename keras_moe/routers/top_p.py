"""As many experts as a token needs."""

from functools import partial

from keras import ops

from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_fraction, check_top_k
from keras_moe.ops import make_routing, take_scores, top_k_indices
from keras_moe.ops.scores import softmax
from keras_moe.routers.logit_router import LogitRouter


@register
class TopPRouter(LogitRouter):
    """A token goes to its best experts until their probabilities add up to `threshold`.

    Weights are the probabilities themselves. An undecided router uses many experts;
    `losses.RouterEntropy` penalizes indecision. Shapes are those of `max_top_k`; a place that is
    not used costs nothing in the experts.

    Args:
        num_experts: number of experts, E.
        threshold: sum of probabilities that is enough, from 0 to below 1. At least one expert
            serves each token.
        max_top_k: most experts per token, K, from 1 to E.
        **kwargs: `input_jitter`, `logit_noise`, `kernel_initializer`, `kernel_regularizer` and
            `seed`, as in `TopKRouter`, and `name`.

    Raises:
        ValueError: If an argument is out of its range.

    Call arguments:
        tokens: (T, D) float tensor.
        mask: (T,) bool tensor, False for padding, or None.
        training: whether noise is drawn.

    Returns:
        An `ops.Routing`.

    Example:

    >>> router = keras_moe.routers.TopPRouter(num_experts=8, threshold=0.4)
    >>> router(keras.random.normal((32, 64))).indices.shape
    (32, 4)

    Reference: Huang et al. 2024 (arXiv:2403.07652), eq. 4 and 5.
    """

    _attribute_checks = {"threshold": partial(check_fraction, fix="Pass, for example, 0.4.")}

    def __init__(self, num_experts=None, threshold=0.4, max_top_k=None, **kwargs):
        super().__init__(num_experts, **kwargs)
        if max_top_k is None and num_experts is not None:
            max_top_k = min(4, num_experts)
        if max_top_k is not None:
            max_top_k = check_top_k(max_top_k, num_experts, "TopPRouter", name="max_top_k")
        self.threshold = threshold
        self.top_k = max_top_k

    @property
    def min_top_k(self):
        return 1

    def route(self, tokens, mask, training):
        logits, mask = self.checked_logits(tokens, mask, training)
        probs = softmax(logits)
        indices = top_k_indices(probs, self.top_k)
        weights = take_scores(probs, indices)
        before = ops.cumsum(ops.stop_gradient(weights), axis=1) - ops.stop_gradient(weights)
        needed = before < self.threshold
        needed = ops.logical_or(needed, ops.arange(self.top_k) == 0)
        indices = ops.where(needed, indices, -1)
        return make_routing(indices, ops.where(needed, weights, 0.0), probs, logits, mask)

    def get_config(self):
        config = super().get_config()
        return {**config, "threshold": self.threshold, "max_top_k": self.max_top_k}
