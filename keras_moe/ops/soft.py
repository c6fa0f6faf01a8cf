"""Soft mixtures: experts run on weighted means of tokens, and nothing is chosen.

Axes: T tokens, B sequences, S tokens of a sequence, E experts, P slots of an expert for each
sequence, M = E * P.
"""

import math
from typing import Any, NamedTuple

from keras import ops

from keras_moe._internal import Tensor
from keras_moe.backend import backend
from keras_moe.ops.plans import GroupedPlan
from keras_moe.ops.routing import Routing
from keras_moe.ops.selection import softmax, take_scores, top_k_indices
from keras_moe.ops.sorting import at_least


def soft_routing(logits, num_experts, mask, sequence_length=None):
    """Each slot is a mean of the tokens of a sequence, each token a mean of the slots' outputs.

    Puigcerver et al. 2023, Soft MoE (arXiv:2308.00951), eq. 1 to 3. In the logits (T, E * P) the
    slots of an expert are neighbours; all tokens are one sequence without a `sequence_length`.

    Returns a `Routing` that names for each token the expert it takes most from, with K = 1 and that
    expert's share as weight; the logit of an expert is the logsumexp of the logits of its slots.
    Its `details` are the fields of a `SoftPlan`.
    """
    num_tokens, num_slots = ops.shape(logits)[0], logits.shape[1]
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
    return Routing(
        indices=indices,
        weights=take_scores(probs, indices),
        probs=probs,
        logits=logits,
        mask=mask,
        counts=ops.zeros((num_experts,), "int32") + ops.shape(by_sequence)[0] * slots,
        details={"to_slots": to_slots, "back": back},
    )


class SoftPlan(NamedTuple):
    """Slots instead of rows, to `dispatch` tokens to and `combine` outputs from.

    - `to_slots` (B, S, M): each token's share of a slot.
    - `back` (B, S, M): each slot's share of a token.
    """

    to_slots: Any
    back: Any

    def dispatch(self, tokens: Tensor, num_experts: int) -> tuple[Tensor, GroupedPlan]:
        """Slots (B * M, ...) from tokens (T, ...), and the `GroupedPlan` of the slots as tokens."""
        sequences, length, num_slots = ops.shape(self.back)
        of_token = tokens.shape[1:]
        tokens = ops.reshape(tokens, (sequences, length, math.prod(of_token)))
        slots = ops.einsum(f"bsm,bsd->{_order()}d", ops.cast(self.to_slots, tokens.dtype), tokens)
        number = ops.arange(sequences * num_slots, dtype="int32")
        weights = ops.ones((sequences * num_slots, 1), "float32")
        if _order() == "bm":
            expert = number % num_slots // (num_slots // num_experts)
            plan = GroupedPlan.of(ops.expand_dims(expert, 1), weights, num_experts)
        else:
            share = sequences * num_slots // num_experts
            plan = GroupedPlan(
                experts=ops.expand_dims(number // at_least(1, share), 1),
                weights=weights,
                sizes=ops.zeros((num_experts,), "int32") + share,
                assignment_of_row=number,
                row_of_assignment=ops.expand_dims(number, 1),
            )
        return ops.reshape(slots, (-1, *of_token)), plan

    def combine(self, outputs: Tensor) -> Tensor:
        """Tokens (T, ...) from the outputs (B * M, ...) of the slots."""
        sequences, _, num_slots = ops.shape(self.back)
        sizes = (sequences, num_slots) if _order() == "bm" else (num_slots, sequences)
        of_output, back = outputs.shape[1:], ops.cast(self.back, outputs.dtype)
        outputs = ops.reshape(outputs, (*sizes, math.prod(of_output)))
        tokens = ops.einsum(f"bsm,{_order()}d->bsd", back, outputs)
        return ops.reshape(tokens, (-1, *of_output))


def _order():
    """The axes of slots, by expert; on a mesh of devices by sequence, which lie on one device."""
    return "mb" if backend.devices.token_shards() is None else "bm"
