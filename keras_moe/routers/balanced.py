"""Routers that match tokens and experts evenly in training."""

from keras import ops

from keras_moe._internal.checks import check_integer
from keras_moe._internal.serialization import register
from keras_moe.ops.routing import _top_k_routing
from keras_moe.ops.selection import _top_k_indices
from keras_moe.ops.transport import _balanced_assignment, _sinkhorn_plan
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
        num_experts: Integer. Number of experts, E.
        top_k: Integer. Experts per token, K, at most E.
        iterations: Integer. Rounds of the algorithm; fixed, so that it compiles.
        **kwargs: `input_jitter`, `logit_noise`, `kernel_initializer`, `kernel_regularizer` and
            `seed`, as in `TopKRouter`, and `name`.

    Raises, call arguments and returns: as for `TopKRouter`, without `indices`.

    Example:

    >>> router = keras_moe.routers.SinkhornRouter(num_experts=8, top_k=1)
    >>> router(keras.random.normal((32, 64)), training=True).indices.shape
    (32, 1)

    Reference: Clark et al. 2022 (arXiv:2202.01169), section 3.2 and appendix B.
    """

    causal = False
    default_losses = ()

    def __init__(self, num_experts=None, top_k=1, iterations=8, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.top_k = check_integer("top_k", top_k)
        self.iterations = check_integer("iterations", iterations)
        self.check_num_experts()

    @property
    def shift_invariant(self):
        return self.top_k > 1

    def route(self, tokens, mask, training):
        logits, mask = self.logits(tokens, mask, training)

        def select(scores):
            if training:
                scores = _sinkhorn_plan(ops.stop_gradient(logits), mask, self.iterations)
            return _top_k_indices(scores, self.top_k)

        score = "softmax" if self.top_k > 1 else "sigmoid"
        return _top_k_routing(logits, self.top_k, mask, score, renormalize=False, select=select)

    def get_config(self):
        return {**super().get_config(), "top_k": self.top_k, "iterations": self.iterations}


@register
class BalancedAssignmentRouter(LogitRouter):
    """In training every expert has the same number of tokens, assigned by preference.

    One expert per token, its weight the sigmoid of its logit. In evaluation a token goes to its
    best expert, whatever the load. In training a token's expert depends on the whole batch. Use it
    without a balance loss.

    BASE layers also add the input times one minus the weight; here the residual connection around
    the layer adds it. The assignment is stable rather than optimal: see `ops.balanced_assignment`.

    Args:
        num_experts: Integer. Number of experts, E.
        **kwargs: `input_jitter`, `logit_noise`, `kernel_initializer`, `kernel_regularizer` and
            `seed`, as in `TopKRouter`, and `name`.

    Raises, call arguments and returns: as for `TopKRouter`, without `indices`.

    Example:

    >>> router = keras_moe.routers.BalancedAssignmentRouter(num_experts=4)
    >>> routing = router(keras.random.normal((32, 64)), training=True)
    >>> keras.ops.convert_to_numpy(routing.counts).tolist()
    [8, 8, 8, 8]

    Reference: Lewis et al. 2021, BASE layers (arXiv:2103.16716), section 3.
    """

    top_k = 1
    causal = False
    default_losses = ()
    shift_invariant = False

    def route(self, tokens, mask, training):
        logits, mask = self.logits(tokens, mask, training)

        def select(scores):
            if not training:
                return _top_k_indices(scores, 1)
            return ops.expand_dims(_balanced_assignment(ops.stop_gradient(logits), mask), 1)

        return _top_k_routing(logits, 1, mask, "sigmoid", renormalize=False, select=select)
