"""Balance by optimal transport."""

from keras import ops

from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_positive_integer
from keras_moe.ops import sinkhorn_plan, top_k_indices, top_k_routing
from keras_moe.routers.logit_router import LogitRouter


@register
class SinkhornRouter(LogitRouter):
    """In training, tokens choose from a plan in which all experts have the same load.

    The plan decides which experts are chosen; weights are the scores themselves: a sigmoid of the
    logit for `top_k=1`, a softmax over all experts otherwise. In evaluation tokens choose by the
    logits, as there is no batch to balance over, and a token's experts depend on itself alone. In
    training they depend on the whole batch, so later tokens leak a little. Use it without a balance
    loss.

    Args:
        num_experts: number of experts, E.
        top_k: experts per token, K, from 1 to E.
        iterations: rounds of the algorithm; fixed, so that it compiles.
        **kwargs: `input_jitter`, `logit_noise`, `kernel_initializer`, `kernel_regularizer` and
            `seed`, as in `TopKRouter`, and `name`.

    Raises:
        ValueError: If an argument is out of its range.

    Call arguments:
        tokens: (T, D) float tensor.
        mask: (T,) bool tensor, False for padding, or None.
        training: whether the plan is balanced, and noise drawn.

    Returns:
        An `ops.Routing`.

    Example:

    >>> router = keras_moe.routers.SinkhornRouter(num_experts=8, top_k=1)
    >>> router(keras.random.normal((32, 64)), training=True).indices.shape
    (32, 1)

    Reference: Clark et al. 2022 (arXiv:2202.01169), section 3.2 and appendix B.
    """

    causal = False
    default_losses = ()

    _attribute_checks = {"top_k": check_positive_integer, "iterations": check_positive_integer}

    def __init__(self, num_experts=None, top_k=1, iterations=8, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.top_k = top_k
        self.iterations = iterations

    def route(self, tokens, mask, training):
        logits, mask = self.checked_logits(tokens, mask, training)

        def select(scores):
            if training:
                scores = sinkhorn_plan(ops.stop_gradient(logits), mask, self.iterations)
            return top_k_indices(scores, self.top_k)

        score = "softmax" if self.shift_invariant else "sigmoid"
        return top_k_routing(logits, self.top_k, mask, score, renormalize=False, select=select)

    @property
    def shift_invariant(self):
        return self.top_k > 1

    def get_config(self):
        return {**super().get_config(), "top_k": self.top_k, "iterations": self.iterations}
