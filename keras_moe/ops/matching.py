"""Matching of tokens and experts: experts pick their tokens, or each has its fair share of them.

Axes: T tokens, of which N are real, E experts, B sequences, C tokens that an expert picks from each
sequence, S tokens of a sequence.
"""

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.routing import Routing
from keras_moe.ops.selection import softmax, take_scores, top_k_indices
from keras_moe.ops.sorting import (
    at_least,
    ceil_divide,
    position_in_expert,
    put,
    slots_of_expert,
)


@backend.jit_when_eager
def expert_choice_routing(logits, capacity_factor, mask, sequence_length=None):
    """Each expert takes its `ceil(capacity_factor * S / E)` best tokens of each sequence.

    S counts real tokens only; all tokens are one sequence without a `sequence_length`. The score is
    a softmax over the experts, and also the weight. Zhou et al. 2022 (arXiv:2202.09368), section
    3.2. Returns a `Routing` whose K is E, with unused places wherever an expert did not choose the
    token. Its `details` have `places` (B, E, C), those in their sequence of each expert's tokens.
    """
    num_tokens, num_experts = ops.shape(logits)
    sequence_length = at_least(1, num_tokens) if sequence_length is None else sequence_length
    probs = softmax(logits)
    capacity = slots_of_expert(sequence_length, num_experts, 1, capacity_factor)
    # Padding adds no slots: its places in the static shapes stay empty.
    real = ops.reshape(ops.cast(mask, "int32"), (-1, sequence_length))
    capacities = slots_of_expert(ops.sum(real, axis=1), num_experts, 1, capacity_factor)
    # Last come tokens whose scores are NaN, then padding: backends sort NaN differently.
    scores = ops.stop_gradient(ops.where(ops.isnan(probs), -1.0, probs))
    scores = ops.where(ops.expand_dims(mask, 1), scores, -2.0)
    scores = ops.reshape(scores, (-1, sequence_length, num_experts))
    are_known = isinstance(sequence_length, int) and isinstance(capacity, int)
    num_choices = (min if are_known else ops.minimum)(sequence_length, capacity)
    scores = ops.transpose(scores, (0, 2, 1))
    if backend.needs_static_shapes():
        # XLA finds the largest without a sort of all.
        place = ops.top_k(scores, num_choices)[1]
    else:
        # Not `top_k`, which on PyTorch orders ties arbitrarily.
        place = ops.argsort(-scores, axis=-1)[..., :num_choices]
    place = ops.cast(place, "int32")  # in the sequence, (B, E, C)
    sequence = ops.arange(ops.shape(place)[0], dtype="int32")
    token = place + sequence_length * ops.reshape(sequence, (-1, 1, 1))
    slot = ops.arange(ops.shape(place)[2], dtype="int32")
    has_slot = slot < ops.reshape(capacities, (-1, 1, 1))
    is_valid = has_slot & backend.gather_rows(mask, token)
    experts = ops.arange(num_experts, dtype="int32")
    chosen = token * num_experts + ops.expand_dims(experts, 1)
    taken = ops.reshape(ops.cast(is_valid, "int32"), (-1,))
    taken = put(taken, ops.reshape(chosen, (-1,)), num_tokens * num_experts)
    taken = ops.reshape(taken, (num_tokens, num_experts)) > 0
    return Routing(
        indices=ops.where(taken, experts, -1),
        weights=ops.where(taken, probs, 0.0),
        probs=probs,
        logits=logits,
        mask=mask,
        counts=ops.sum(ops.cast(taken, "int32"), axis=0),
        details={"places": place},
    )


@backend.jit_when_eager
def sinkhorn_plan(logits, mask, iterations):
    """The plan closest to the softmax whose experts all have the same load.

    Rows and columns of `exp(logits)` are scaled in turn until each real token gives 1 and each
    expert receives N / E. In logarithms, because `exp` of a large logit is infinite, and for a
    fixed number of rounds, because a compiled loop is faster for it. Cuturi 2013
    (arXiv:1306.0895), algorithm 1; for routing Clark et al. 2022 (arXiv:2202.01169).

    Returns the logarithm of the plan, float32 (T, E); minus infinity for padding.
    """
    num_experts = logits.shape[-1]
    real = ops.expand_dims(mask, 1)
    num_real = ops.sum(ops.cast(mask, "float32"))
    target = ops.log(ops.maximum(num_real, 1.0) / num_experts)

    def scale(_, prices):
        received = ops.logsumexp(given(prices), axis=0)
        # An expert that receives nothing, not even rounding errors, keeps its price.
        return prices + ops.where(ops.isfinite(received), target - received, 0.0)

    def given(prices):
        rows = ops.where(real, logits + prices, 0.0)
        return ops.where(real, rows - ops.logsumexp(rows, axis=1, keepdims=True), float("-inf"))

    return given(ops.fori_loop(0, iterations, scale, ops.zeros((num_experts,), "float32")))


@backend.jit_when_eager
def balanced_assignment(scores, mask):
    """One expert for each token, none with more than `ceil(N / E)` tokens.

    Tokens propose to their best expert, experts keep their best proposals, and rejected tokens
    propose to their next expert (deferred acceptance, Gale and Shapley 1962). The result is stable:
    no token and expert both prefer each other to their assignment. BASE layers (arXiv:2103.16716)
    maximise the sum of the scores by an auction instead, whose number of rounds depends on the
    scores. Scores (T, E) that are not finite count as the lowest; padding is given expert 0.
    """
    num_tokens, num_experts = ops.shape(scores)[0], scores.shape[-1]
    scores = ops.where(ops.isfinite(scores), scores, -3e38)
    num_real = ops.sum(ops.cast(mask, "int32"))
    capacity = ceil_divide(num_real, num_experts)
    experts = ops.arange(num_experts, dtype="int32")

    def propose(open_to):
        open_scores = ops.where(open_to, scores, float("-inf"))
        choice = top_k_indices(open_scores, 1)
        return choice[:, 0], take_scores(open_scores, choice)[:, 0]

    def turn_away(open_to, rejected):
        choice, offer = propose(open_to)
        best_first = ops.cast(ops.argsort(-offer), "int32")
        expert = ops.take(ops.where(mask, choice, num_experts), best_first)
        place = position_in_expert(expert, num_experts + 1)
        refused = (place >= capacity) & (expert < num_experts)
        rejected = put(ops.cast(refused, "int32"), best_first, num_tokens)
        is_chosen = ops.expand_dims(choice, 1) == experts
        refusing = ops.expand_dims(rejected > 0, 1) & is_chosen
        return open_to & ~refusing, ops.sum(rejected)

    open_to, _ = ops.while_loop(
        lambda open_to, rejected: rejected > 0,
        turn_away,
        (ops.ones_like(scores, dtype="bool"), ops.ones((), "int32")),
    )
    choice, _ = propose(open_to)
    return ops.where(mask, choice, 0)
