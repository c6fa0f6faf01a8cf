"""Balance by assignment."""

from keras import ops

from keras_moe._internal.serialization import register
from keras_moe.ops import balanced_assignment, top_k_indices, top_k_routing
from keras_moe.routers.logit_router import LogitRouter


@register
class BalancedAssignmentRouter(LogitRouter):
    """In training every expert has the same number of tokens, assigned by preference.

    One expert per token, its weight the sigmoid of its logit. In evaluation a token goes to its
    best expert, whatever the load. In training a token's expert depends on the whole batch. Use it
    without a balance loss.

    BASE layers also add the input times one minus the weight; here the residual connection around
    the layer adds it. The assignment is stable rather than optimal: see `ops.balanced_assignment`.

    Args:
        num_experts: number of experts, E.
        **kwargs: `input_jitter`, `logit_noise`, `kernel_initializer`, `kernel_regularizer` and
            `seed`, as in `TopKRouter`, and `name`.

    Raises:
        ValueError: If an argument is out of its range.

    Call arguments:
        tokens: (T, D) float tensor.
        mask: (T,) bool tensor, False for padding, or None.
        training: whether the assignment is balanced, and noise drawn.

    Returns:
        An `ops.Routing`.

    Example:

    >>> router = keras_moe.routers.BalancedAssignmentRouter(num_experts=4)
    >>> routing = router(keras.random.normal((32, 64)), training=True)
    >>> keras.ops.convert_to_numpy(routing.counts).tolist()
    [8, 8, 8, 8]

    Reference: Lewis et al. 2021, BASE layers (arXiv:2103.16716), section 3.
    """

    causal = False
    default_losses = ()
    shift_invariant = False

    def __init__(self, num_experts=None, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.top_k = 1

    def route(self, tokens, mask, training):
        logits, mask = self.checked_logits(tokens, mask, training)

        def select(scores):
            if not training:
                return top_k_indices(scores, 1)
            return ops.expand_dims(balanced_assignment(ops.stop_gradient(logits), mask), 1)

        return top_k_routing(logits, 1, mask, "sigmoid", renormalize=False, select=select)
