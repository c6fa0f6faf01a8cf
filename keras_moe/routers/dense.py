"""The mixture before sparsity: every expert serves every token."""

from keras import ops

from keras_moe._internal.serialization import register
from keras_moe.ops import make_routing
from keras_moe.ops.scores import softmax
from keras_moe.routers.logit_router import LogitRouter


@register
class DenseRouter(LogitRouter):
    """All experts serve each token, weighted by a softmax: `y = sum_e p_e f_e(x)`.

    The cost is that of all experts. It is the reference whose cost sparse routers reduce, and the
    best choice for a handful of small experts. A `TopKRouter` with `top_k` as many as experts
    computes the same, takes the same weights, and can choose fewer later.

    Args:
        num_experts: number of experts, E, and experts per token.
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

    >>> router = keras_moe.routers.DenseRouter(num_experts=4)
    >>> router(keras.random.normal((32, 64))).weights.shape
    (32, 4)

    References: Jacobs et al. 1991, "Adaptive mixtures of local experts"; Jordan and Jacobs 1994,
    "Hierarchical mixtures of experts and the EM algorithm".
    """

    default_losses = ()

    _kept_attributes = ("top_k",)
    _instead_of_setting = "Make another one; a `TopKRouter` has a `top_k` that can be set."

    @property
    def top_k(self):
        """All experts."""
        return self.num_experts

    def route(self, tokens, mask, training):
        logits, mask = self.checked_logits(tokens, mask, training)
        probs = softmax(logits)
        experts = ops.arange(self.num_experts, dtype="int32")
        indices = ops.broadcast_to(experts, ops.shape(probs))
        counts = ops.zeros_like(experts) + ops.sum(ops.cast(mask, "int32"))
        return make_routing(indices, probs, probs, logits, mask, counts=counts)
