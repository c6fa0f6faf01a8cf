"""Plans: from a routing to the rows that move. Decided first; data moves afterwards.

Axes: T tokens, D features, E experts, K experts per token, N = T * K assignments, one row each.
"""

from fractions import Fraction
from typing import Any, NamedTuple

from keras import ops

from keras_moe._internal.shape_checks import (
    check_fields,
    check_groups,
    check_is_bank,
    check_shapes,
    known,
    num_experts_of,
)
from keras_moe._internal.tensor_checks import check_divides, check_is_integer, check_size
from keras_moe._internal.validation import (
    check_positive_integer,
    check_positive_number,
    check_top_k,
    is_symbol,
    is_whole,
    shortened,
)
from keras_moe.backend import backend
from keras_moe.ops.assignments import Assignments, Choices
from keras_moe.ops.groups import check_row_numbers, combine_rows, dispatch_rows
from keras_moe.ops.selection import existing
from keras_moe.ops.sharded import admit_by_shard, splits_evenly
from keras_moe.ops.sizes import at_least
from keras_moe.ops.sorting import place_in_queue

# More than there can be, and small enough that twice as many fit into int32.
MOST_ROWS = 2**30


class GroupedPlan(NamedTuple):
    """Assignments sorted by expert, each a row: an immutable record with two verbs.

    - `groups`: `ops.Groups` or `ops.ChosenGroups`, the sizes of the groups and the maps between
      rows and tokens. Where a distribution spreads the tokens over devices, `ops.Assignments`
      or `ops.Choices`, which each device sorts for itself.
    - `weights`: the float32 combine weights, (T, K) or one for each choice.
    """

    groups: Any
    weights: Any

    def sort(self):
        """The same plan, its rows sorted on one device, or on each the rows of all."""
        if isinstance(self.groups, Choices):
            return GroupedPlan(self.groups.sort(), ops.reshape(self.weights, (-1,)))
        is_sorted = not isinstance(self.groups, Assignments)
        return self if is_sorted else self._replace(groups=self.groups.sort())

    def dispatch(self, tokens):
        """Rows grouped by expert, (N, D), from tokens (T, D)."""
        check_groups(self.groups, tokens=(tokens, "TD", "float"))
        check_row_numbers(self.groups)
        return dispatch_rows(ops.convert_to_tensor(tokens), self.groups)

    def combine(self, rows):
        """Tokens (T, D), each the weighted float32 sum of its rows; zero without any."""
        check_groups(self.groups, self.weights, rows=(rows, "ND", "float"))
        _check_enough(rows, self.groups)
        rows, weights = ops.convert_to_tensor(rows), ops.convert_to_tensor(self.weights)
        return combine_rows(rows, weights, self.groups)

    def run(self, experts, tokens):
        """What a bank of experts makes of tokens (T, D)."""
        check_is_bank(experts)
        return experts(tokens, self)

    def served(self):
        """Which tokens have a row, (T,) bool."""
        check_groups(self.groups)
        return self.groups.served()

    @backend.as_one_program
    def dropped_fraction(self, counts):
        """Share of the assignments (E,) that have no row, a float32 scalar; 0 without any."""
        check_shapes({"counts": (counts, "E", "number")}, **known(E=num_experts_of(self.groups)))
        assigned = ops.cast(ops.sum(counts), "float32")
        served = ops.cast(ops.sum(self.groups.sizes), "float32")
        return (assigned - served) / ops.maximum(assigned, 1.0)


def _check_enough(rows, groups):
    """A row for each assignment. A program that is traced may not know how many there are."""
    given, needed = rows.shape[0], groups.num_rows()
    if backend.knows_shapes() and is_whole(given) and is_whole(needed) and given < needed:
        raise ValueError(
            "`rows` must have a row for each assignment. Received: "
            f"rows.shape={tuple(rows.shape)} for {needed} assignments. Pass all rows of `dispatch`."
        )


def plan_groups(routing, capacity=None, first=None, sequence_length=None, num_limited=None):
    """Sort the assignments of a routing by expert.

    Inside an expert all first choices stand before all second choices, each in the order of the
    tokens; an expert with a capacity serves the first so many of them (GShard, Lepikhin et al.
    2020, arXiv:2006.16668, algorithm 1). Padding and dropped assignments belong to no group.

    Args:
        routing: an `ops.Routing`.
        capacity: most rows of one expert, an integer or integer tensor, or None for all. Where a
            distribution spreads the tokens over devices, it holds for those of each device.
        first: (T,) urgency of each token: where a capacity is set the most urgent tokens stand
            first. None: in the order of the tokens.
        sequence_length: where given, the capacity holds for each run of so many tokens alone.
        num_limited: where given, the capacity holds for the first so many experts only.

    Returns:
        A `GroupedPlan`. Indices that are not an expert's belong to no group, like -1.

    Raises:
        ValueError, TypeError: If a size is not positive or the indices are no integers.
    """
    check_fields(routing, "indices", "weights", "mask", "counts")
    if capacity is not None:
        capacity = check_size("capacity", capacity)
        if is_whole(capacity):
            capacity = min(capacity, MOST_ROWS)
    if sequence_length is not None:
        check_divides("sequence_length", sequence_length, routing.mask.shape[0])
    if num_limited is not None:
        check_positive_integer("num_limited", num_limited)
    if first is not None:
        check_shapes({"routing.mask": (routing.mask, "T"), "first": (first, "T", "number")})
    # Whatever a router of the user's own returns, nothing is read or written out of range.
    indices = existing(routing.indices, routing.counts.shape[0], routing.mask)
    assignments = Assignments(indices, routing.counts)
    shards = backend.token_shards()
    if capacity is not None:

        def admit(assignments, first):
            return _admit(assignments, capacity, first, sequence_length, num_limited)

        is_split = shards is not None and splits_evenly(shards, assignments, sequence_length)
        assignments = (
            admit_by_shard(shards, admit, assignments, first)
            if is_split
            else admit(assignments, first)
        )
    # Under a distribution each device sorts those of its own tokens and experts.
    return GroupedPlan(assignments.sort() if shards is None else assignments, routing.weights)


@backend.as_one_program
def _admit(assignments, capacity, first, sequence_length, num_limited):
    """The assignments that find a slot in their expert."""
    num_tokens, top_k = ops.shape(assignments.experts)
    num_experts = assignments.num_experts
    expert_of_assignment = assignments.choice_major()
    token = ops.arange(num_tokens, dtype="int32")
    queue, num_queues = expert_of_assignment, num_experts + 1
    if sequence_length is not None:
        sequence = ops.tile(token // sequence_length, (top_k,))
        queue = queue + num_queues * sequence
        num_queues = num_queues * at_least(1, -(-num_tokens // sequence_length))
    place = place_in_queue(queue, num_queues, _turns(first, num_tokens, top_k))
    has_slot = place < capacity
    if num_limited is not None:
        has_slot = ops.logical_or(has_slot, expert_of_assignment >= num_limited)
    # Beyond the last expert: not served.
    experts = ops.where(has_slot, expert_of_assignment, num_experts)
    return Assignments.of(ops.transpose(ops.reshape(experts, (top_k, num_tokens))), num_experts)


def expert_capacity(num_tokens, num_experts, top_k, capacity_factor):
    """Slots of an expert: `ceil(factor * T * K / E)`, at least 1 and at most T * K.

    Args:
        num_tokens: T, an integer or an integer tensor. Padding counts, so that the capacity does
            not depend on the data.
        num_experts: E.
        top_k: K.
        capacity_factor: positive float, read to three decimals or the nearest simple fraction;
            1.0 is enough for exactly balanced experts.

    Returns:
        An integer, or an int32 tensor where `num_tokens` is one.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if hasattr(num_tokens, "dtype"):
        check_is_integer("num_tokens", num_tokens)
    elif not is_symbol(num_tokens) and (not is_whole(num_tokens) or num_tokens < 0):
        raise ValueError(
            "`num_tokens` must be an integer of at least 0. Received: "
            f"num_tokens={shortened(num_tokens)}. Pass how many tokens there are."
        )
    check_positive_integer("num_experts", num_experts)
    check_top_k(top_k, num_experts)
    capacity_factor = check_positive_number("capacity_factor", capacity_factor)
    # In integers, which round the same way everywhere: in float32 a compiled quotient may end just
    # above a whole number, which gives one slot too many.
    factor = min(Fraction(float(capacity_factor)).limit_denominator(1000), num_experts)
    share = Fraction(factor) * top_k / num_experts
    # The whole parts separately: the product of all tokens with the numerator may exceed 32 bits.
    whole, rest = num_tokens // share.denominator, num_tokens % share.denominator
    rows = whole * share.numerator - (-rest * share.numerator // share.denominator)
    return at_least(1, rows)


def _turns(first, num_tokens, top_k):
    """The order in which assignments take their places, or None for that of their numbers."""
    if first is None:
        return None
    urgent_first = ops.cast(ops.argsort(-ops.stop_gradient(ops.convert_to_tensor(first))), "int32")
    choices = ops.expand_dims(ops.arange(top_k, dtype="int32"), 1)
    return ops.reshape(choices * num_tokens + urgent_first, (-1,))
