"""Top-2 routing that uses its second expert at random."""

from keras import ops

from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_positive_number
from keras_moe.ops import draws, make_routing, take_scores, top_k_indices
from keras_moe.ops.scores import distribution, softmax
from keras_moe.routers.logit_router import LogitRouter


@register
class GShardRouter(LogitRouter):
    """Two experts per token; in training the second serves only as often as its weight deserves.

    The two best probabilities are divided by their sum. In training the second expert is kept with
    probability `min(1, weight / threshold)`: a second expert that hardly counts is not worth a
    slot. In evaluation it always serves, so that results are deterministic; Mesh TensorFlow draws
    there too.

    Args:
        num_experts: number of experts, E, at least 2.
        threshold: weight at or above which the second expert always serves; positive.
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

    >>> router = keras_moe.routers.GShardRouter(num_experts=8)
    >>> router(keras.random.normal((32, 64)), training=True).indices.shape
    (32, 2)

    Reference: Lepikhin et al. 2020 (arXiv:2006.16668), section 2.2; the threshold is that of
    Mesh TensorFlow.
    """

    _attribute_checks = {"threshold": check_positive_number}

    def __init__(self, num_experts=None, threshold=0.2, **kwargs):
        super().__init__(num_experts, **kwargs)
        if num_experts == 1:
            raise ValueError(
                "`GShardRouter` sends each token to two experts. Received: "
                f"num_experts={num_experts}. Use `TopKRouter(1, top_k=1)` for a single one."
            )
        self.threshold = threshold
        self.top_k = 2

    def route(self, tokens, mask, training):
        logits, mask = self.checked_logits(tokens, mask, training)
        probs = softmax(logits)
        indices = top_k_indices(probs, 2)
        weights = distribution(take_scores(probs, indices))
        if training:
            second = ops.stop_gradient(weights[:, 1:])
            kept = self._noise(draws.uniform, second) * self.threshold < second
            kept = ops.concatenate([ops.ones_like(kept), kept], axis=1)
            indices = ops.where(kept, indices, -1)
            weights = ops.where(kept, weights, 0.0)
        return make_routing(indices, weights, probs, logits, mask)

    def get_config(self):
        return {**super().get_config(), "threshold": self.threshold}
