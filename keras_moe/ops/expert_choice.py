"""Expert choice: experts pick their tokens.

Axes: T tokens, E experts, B sequences, C tokens an expert picks from each sequence, S tokens of a
sequence.
"""

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.capacity import slots_of_expert
from keras_moe.ops.plans import plan_choices, tokens_at
from keras_moe.ops.routing import _make_routing
from keras_moe.ops.scores import softmax
from keras_moe.ops.selection import top_tokens
from keras_moe.ops.sorting import at_least, put


@backend.jit_when_eager
def expert_choice_routing(logits, capacity_factor, mask, sequence_length=None):
    """Each expert takes its `ceil(capacity_factor * S / E)` best tokens of each sequence.

    S counts real tokens only; all tokens are one sequence without a `sequence_length`. The score is
    a softmax over the experts, and also the weight. Zhou et al. 2022 (arXiv:2202.09368), section
    3.2. Returns a `Routing` whose K is E, with unused places wherever an expert did not choose the
    token, and for `plan_expert_choice` in `details`, both (B, E, C), the place in its sequence of
    each token that is chosen, and whether the choice counts.
    """
    num_tokens, num_experts = ops.shape(logits)
    sequence_length = at_least(1, num_tokens) if sequence_length is None else sequence_length
    probs = softmax(logits)
    capacity = slots_of_expert(sequence_length, num_experts, 1, capacity_factor)
    # Padding adds no slots: its places in the static shapes stay empty.
    real = ops.reshape(ops.cast(mask, "int32"), (-1, sequence_length))
    capacities = slots_of_expert(ops.sum(real, axis=1), num_experts, 1, capacity_factor)
    scores = ops.where(ops.expand_dims(mask, 1), ops.stop_gradient(probs), -1.0)
    scores = ops.reshape(scores, (-1, sequence_length, num_experts))
    are_known = isinstance(sequence_length, int) and isinstance(capacity, int)
    num_choices = (min if are_known else ops.minimum)(sequence_length, capacity)
    place = top_tokens(ops.transpose(scores, (0, 2, 1)), num_choices)  # in the sequence, (B, E, C)
    token = tokens_at(place, sequence_length)
    slot = ops.arange(ops.shape(place)[2], dtype="int32")
    has_slot = slot < ops.reshape(capacities, (-1, 1, 1))
    is_valid = has_slot & backend.gather_rows(mask, token)
    experts = ops.arange(num_experts, dtype="int32")
    chosen = ops.reshape(token * num_experts + ops.expand_dims(experts, 1), (-1,))
    taken = ops.reshape(ops.cast(is_valid, "int32"), (-1,))
    taken = put(taken, chosen, num_tokens * num_experts)
    taken = ops.reshape(taken, (num_tokens, num_experts)) > 0
    return _make_routing(
        indices=ops.where(taken, experts, -1),
        weights=ops.where(taken, probs, 0.0),
        probs=probs,
        logits=logits,
        mask=mask,
        counts=ops.sum(ops.cast(taken, "int32"), axis=0),
        details=(place, is_valid),
    )


def plan_expert_choice(routing):
    """The plan of a routing of `expert_choice_routing`: as many rows as there are choices."""
    places, is_valid = routing.details
    num_experts = places.shape[1]
    expert = ops.expand_dims(ops.arange(num_experts, dtype="int32"), 1)
    plan = plan_choices(ops.where(is_valid, expert, -1), None, places, routing.mask)
    chosen = plan.token_of_choice() * num_experts + expert
    plan = plan._replace(weights=ops.take(ops.reshape(routing.weights, (-1,)), chosen))
    shards = backend.token_shards()
    # Sequences that lie on two devices are chosen from by both: every device has the rows of all.
    splits = shards is not None and ops.shape(places)[0] % shards.number == 0
    return plan if splits else plan.sort()
