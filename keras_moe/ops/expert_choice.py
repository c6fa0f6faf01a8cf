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


def expert_choice_routing(logits, capacity_factor, mask, sequence_length=None):
    """Each expert takes its `ceil(capacity_factor * S / E)` best tokens of each sequence.

    S counts real tokens only; all tokens are one sequence without a `sequence_length`. The score is
    a softmax over the experts, and also the weight. Zhou et al. 2022 (arXiv:2202.09368), section
    3.2. Returns a `Routing` whose K is E, with unused places wherever an expert did not choose the
    token, and whose plan has as many rows as there are choices.
    """
    routing = _choose(logits, capacity_factor, mask, sequence_length)._replace(mask=mask)
    shards, sequences = backend.token_shards(), ops.shape(routing.plan.places)[0]
    # Sequences that lie on two devices are chosen from by both: every device has the rows of all.
    if shards is not None and sequences % shards.number == 0:
        return routing
    return routing._replace(plan=routing.plan.sort())


@backend.jit_when_eager
def _choose(logits, capacity_factor, mask, sequence_length):
    num_tokens, num_experts = ops.shape(logits)
    sequence_length = at_least(1, num_tokens) if sequence_length is None else sequence_length
    probs = softmax(logits)
    capacity = slots_of_expert(sequence_length, num_experts, 1, capacity_factor)
    # Padding adds no slots: its places in the static shapes stay empty.
    real = ops.reshape(ops.cast(mask, "int32"), (-1, sequence_length))
    capacities = slots_of_expert(ops.sum(real, axis=1), num_experts, 1, capacity_factor)
    # Last come tokens whose scores are NaN, then padding: backends sort NaN differently.
    scores = ops.stop_gradient(ops.where(probs >= 0, probs, -1.0))
    scores = ops.where(ops.expand_dims(mask, 1), scores, -2.0)
    scores = ops.reshape(scores, (-1, sequence_length, num_experts))
    are_known = isinstance(sequence_length, int) and isinstance(capacity, int)
    num_choices = (min if are_known else ops.minimum)(sequence_length, capacity)
    place = top_tokens(ops.transpose(scores, (0, 2, 1)), num_choices)  # in the sequence, (B, E, C)
    token = tokens_at(place, sequence_length)
    slot = ops.arange(ops.shape(place)[2], dtype="int32")
    has_slot = slot < ops.reshape(capacities, (-1, 1, 1))
    is_valid = has_slot & backend.gather_rows(mask, token)
    experts = ops.arange(num_experts, dtype="int32")
    of_expert = ops.expand_dims(experts, 1)
    chosen = token * num_experts + of_expert
    taken = ops.reshape(ops.cast(is_valid, "int32"), (-1,))
    taken = put(taken, ops.reshape(chosen, (-1,)), num_tokens * num_experts)
    taken = ops.reshape(taken, (num_tokens, num_experts)) > 0
    weights = ops.where(taken, probs, 0.0)
    of_choices = ops.take(ops.reshape(weights, (-1,)), chosen)
    plan = plan_choices(ops.where(is_valid, of_expert, -1), of_choices, place, mask)
    indices = ops.where(taken, experts, -1)
    return _make_routing(indices, weights, probs, logits, mask, plan.sizes, plan=plan)
