"""Soft mixtures: experts run on weighted means of tokens, and nothing is chosen.

Axes: T tokens, B sequences, S tokens of a sequence, E experts, P slots of an expert for each
sequence, M = E * P, D features.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe._internal.shape_checks import check_details, check_is_bank, check_shapes, known
from keras_moe._internal.tensor_checks import check_divides
from keras_moe._internal.validation import check_positive_integer, is_whole
from keras_moe.backend import backend
from keras_moe.ops.assignments import Assignments
from keras_moe.ops.groups import Groups
from keras_moe.ops.plans import GroupedPlan
from keras_moe.ops.routing import clean_logits, make_routing
from keras_moe.ops.scores import softmax
from keras_moe.ops.selection import take_scores, top_k_indices
from keras_moe.ops.sizes import at_least


def soft_routing(logits, num_experts, mask=None, sequence_length=None):
    """Each slot is a mean of the tokens of a sequence, each token a mean of the slots' outputs.

    Puigcerver et al. 2023, Soft MoE (arXiv:2308.00951), eq. 1 to 3.

    Args:
        logits: (T, E * P) tensor, computed on in float32; the slots of an expert are neighbours.
        num_experts: E.
        mask: (T,) bool tensor, False for padding, or None.
        sequence_length: S, or None where all tokens are one sequence.

    Returns:
        A `Routing` that names for each token the expert it takes most from, with K = 1 and that
        expert's share as weight; the logit of an expert is the logsumexp of those of its slots.
        `details` holds the weights for `plan_soft`: to slots and back, both (B, S, M).
    """
    check_positive_integer("num_experts", num_experts)
    logits, mask = clean_logits(logits, mask)
    num_tokens, num_slots = ops.shape(logits)[0], logits.shape[1]
    check_divides("sequence_length", sequence_length, num_tokens)
    if num_slots % num_experts:
        raise ValueError(
            "Each expert must have as many slots as the others. Received: "
            f"{num_slots} logits for num_experts={num_experts}. Change one of them."
        )
    length = at_least(1, num_tokens) if sequence_length is None else sequence_length
    by_sequence = ops.reshape(logits, (-1, length, num_slots))
    real = ops.reshape(mask, (-1, length, 1))
    back = ops.where(real, softmax(by_sequence), 0.0)
    # Not minus infinity, which has no softmax where all is padding; the slots are zero there.
    to_slots = ops.where(real, softmax(ops.where(real, by_sequence, -3e38), axis=1), 0.0)

    slots = num_slots // num_experts
    logits = ops.logsumexp(ops.reshape(logits, (num_tokens, num_experts, slots)), axis=-1)
    probs = softmax(logits)
    indices = top_k_indices(probs, 1)
    num_runs = ops.shape(by_sequence)[0] * slots
    return make_routing(
        indices=indices,
        weights=take_scores(probs, indices),
        probs=probs,
        logits=logits,
        mask=mask,
        counts=ops.zeros((num_experts,), "int32") + num_runs,
        details=(to_slots, back),
    )


class SoftPlan(NamedTuple):
    """Slots instead of rows.

    - `to_slots` (B, S, M): each token's share of a slot.
    - `back` (B, S, M): each slot's share of a token.
    """

    to_slots: Any
    back: Any

    def run(self, experts, tokens):
        """What a bank of experts makes of tokens (T, D), by way of the slots."""
        check_is_bank(experts)
        of_slots = {"to_slots": self.to_slots, "back": self.back}
        check_shapes({name: (each, "BSM", "float") for name, each in of_slots.items()})
        batch, run, num_slots = self.back.shape
        check_shapes({"tokens": (tokens, "TD", "float")}, **known(T=batch and run and batch * run))
        if is_whole(num_slots) and num_slots % experts.num_experts:
            raise ValueError(
                "A plan must have as many slots for each expert of the bank that follows it. "
                f"Received: {num_slots} slots, and a bank with num_experts={experts.num_experts}. "
                "Give router and bank the same number of experts."
            )
        num_experts = experts.num_experts
        sequences, length, num_slots = ops.shape(self.back)
        features = tokens.shape[-1]
        by_sequence = ops.reshape(tokens, (sequences, length, features))
        to_slots = ops.cast(self.to_slots, tokens.dtype)
        # All slots of an expert behind one another, or under a distribution those of a sequence,
        # which are where the sequence is.
        is_spread = backend.token_shards() is not None
        order = "bm" if is_spread else "mb"
        slots = ops.einsum(f"bsm,bsd->{order}d", to_slots, by_sequence)
        rows = ops.reshape(slots, (-1, features))
        plan = _assigned_slots if is_spread else _one_row_a_slot
        outputs = experts(rows, plan(sequences, num_slots, num_experts))
        width = outputs.shape[-1]
        outputs = ops.reshape(outputs, (*ops.shape(slots)[:2], width))
        mixed = ops.einsum(f"bsm,{order}d->bsd", ops.cast(self.back, outputs.dtype), outputs)
        return ops.reshape(mixed, (-1, width))

    def served(self):
        """All tokens, (T,) bool."""
        sequences, length, _ = ops.shape(self.back)
        return ops.ones((sequences * length,), "bool")

    def dropped_fraction(self, counts):
        """0, a float32 scalar: every token is a part of every slot."""
        check_shapes({"counts": (counts, "E", "number")})
        return ops.zeros((), "float32")


def plan_soft(routing):
    """The plan of `soft_routing`."""
    check_details(routing, "soft_routing")
    return SoftPlan(*routing.details)


def _assigned_slots(sequences, num_slots, num_experts):
    slot = ops.arange(sequences * num_slots, dtype="int32") % num_slots
    experts = ops.expand_dims(slot // (num_slots // num_experts), 1)
    weights = ops.ones_like(experts, dtype="float32")
    return GroupedPlan(Assignments.of(experts, num_experts), weights)


def _one_row_a_slot(sequences, num_slots, num_experts):
    num_rows = sequences * num_slots
    rows = ops.arange(num_rows, dtype="int32")
    groups = Groups(
        sizes=ops.zeros((num_experts,), "int32") + num_rows // num_experts,
        assignment_of_row=rows,
        rows_of_token=ops.expand_dims(rows, 1),
    )
    return GroupedPlan(groups, ops.ones((num_rows, 1), "float32"))
