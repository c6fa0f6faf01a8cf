"""Routers that match tokens and experts evenly: Sinkhorn, balanced assignment, expert choice.

Axes: T tokens, E experts.
"""

import math
from typing import Any

from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.serialization import register
from keras_moe.ops.matching import balanced_assignment, expert_choice_routing, sinkhorn_plan
from keras_moe.ops.plans import ExpertChoicePlan
from keras_moe.ops.routing import Routing, weigh
from keras_moe.ops.selection import SCORES, top_k_indices
from keras_moe.routers.logit_router import LogitRouter


class MatchingRouter(LogitRouter):
    """Abstract: in training, tokens and experts are matched by `match(logits, mask)`."""

    causal = False
    default_losses = ()

    def route(self, tokens, mask, training, **context):
        logits = self.logits(tokens, training)
        score = "softmax" if self.top_k > 1 else "sigmoid"
        scores = SCORES[score](logits)
        if training:
            indices = self.match(ops.stop_gradient(logits), mask)
        else:
            indices = top_k_indices(scores, self.top_k)
        weights, probs = weigh(indices, logits, scores, score, renormalize=False)
        return Routing(indices, weights, probs, logits, mask)

    def match(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the experts (T, K) of each token in training."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `match`")


@register
class SinkhornRouter(MatchingRouter):
    """In training, tokens choose by a transport plan in which all experts have the same load.

    The weights are a sigmoid of the logits for `top_k=1`, else a softmax over all experts. In
    evaluation tokens choose by the logits. In training a token's experts depend on the whole batch.

    Args:
        top_k: Integer. Experts per token, K, at most E.
        iterations: Integer. Iterations of the algorithm, a fixed number, so that it compiles.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.

    Reference: Clark et al. 2022 (arXiv:2202.01169), section 3.2 and appendix B.
    """

    def __init__(
        self, num_experts: int | None = None, top_k: int = 1, iterations: int = 8, **kwargs: Any
    ):
        super().__init__(num_experts, **kwargs)
        self.top_k = check_integer("top_k", top_k)
        self.iterations = check_integer("iterations", iterations)
        self.check_num_experts()

    @property
    def shift_invariant(self):
        return self.top_k > 1

    def match(self, logits, mask):
        return top_k_indices(sinkhorn_plan(logits, mask, self.iterations), self.top_k)


@register
class BalancedAssignmentRouter(MatchingRouter):
    """In training every expert has the same number of tokens, assigned by preference.

    One expert per token, its weight the sigmoid of its logit. In evaluation a token goes to its
    best expert. In training its expert depends on the whole batch. The assignment is stable rather
    than optimal: no token and expert both prefer each other to their assignment.

    Arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.

    Reference: Lewis et al. 2021, BASE layers (arXiv:2103.16716), section 3.
    """

    top_k = 1
    shift_invariant = False

    def match(self, logits, mask):
        return ops.expand_dims(balanced_assignment(logits, mask), 1)


@register
class ExpertChoiceRouter(LogitRouter):
    """Each expert takes the same number of best tokens of each sequence.

    A token may have any number of experts, also none. Its experts depend on later tokens, so do not
    use it in language models. Inputs (batch, D) are one sequence, also in `predict`.

    Args:
        capacity_factor: Float above 0. Experts per token on average. An expert takes
            `ceil(capacity_factor * S / E)` of the S real tokens of a sequence.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`. K
    is E: entry e of `indices` is e, or -1 if expert e did not choose the token.

    Reference: Zhou et al. 2022 (arXiv:2202.09368), section 3.2.
    """

    causal = False
    default_losses = ()
    tokens_choose = False
    even_scopes = ("batch", "sequence", "global")

    def __init__(
        self, num_experts: int | None = None, *, capacity_factor: float = 2.0, **kwargs: Any
    ):
        super().__init__(num_experts, **kwargs)
        self.capacity_factor = check_number("capacity_factor", capacity_factor, above=0)

    @property
    def top_k(self) -> int:
        """All experts, each of which may choose the token."""
        return self.num_experts

    @property
    def mean_top_k(self):
        return min(self.capacity_factor, self.num_experts)

    def route(self, tokens, mask, training, sequence_length=None, **context):
        logits = self.logits(tokens, training)
        return expert_choice_routing(logits, self.capacity_factor, mask, sequence_length)

    def plan(self, routing, experts):
        num_rows = math.prod(ops.shape(routing.details["places"]))
        return ExpertChoicePlan.of_choices(experts, routing.weights, num_rows)
