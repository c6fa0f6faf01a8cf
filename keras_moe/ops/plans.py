"""Plans: from a routing to the rows that move. Decided first; data moves afterwards.

Axes: T tokens, D features, E experts, K experts per token, N = T * K assignments, one row each.
"""

from fractions import Fraction
from typing import Any, NamedTuple

from keras import ops

from keras_moe._internal.checks import check_integer, check_number, check_tensors, is_kind
from keras_moe._internal.types import Tensor
from keras_moe.backend import backend
from keras_moe.ops.assignments import (
    Assignments,
    Choices,
    at_least,
    ceil_divide,
    check_sequence_length,
    check_size,
    place_in_queue,
)
from keras_moe.ops.groups import check_groups, combine_rows, dispatch_rows
from keras_moe.ops.routing import Routing, check_routing, count_assignments
from keras_moe.ops.selection import existing
from keras_moe.ops.sharded import admit_by_shard, splits_evenly

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

    def sort(self) -> "GroupedPlan":
        """The same plan, its rows sorted on one device, or on each the rows of all."""
        if isinstance(self.groups, Choices):
            return GroupedPlan(self.groups.sort(), ops.reshape(self.weights, (-1,)))
        is_sorted = not isinstance(self.groups, Assignments)
        return self if is_sorted else self._replace(groups=self.groups.sort())

    def dispatch(self, tokens: Tensor) -> Tensor:
        """Rows grouped by expert, (N, D), from tokens (T, D)."""
        tokens = ops.convert_to_tensor(tokens)
        check_groups(self.groups, tokens=(tokens, "TD", "float"))
        return dispatch_rows(tokens, self.groups)

    def combine(self, rows: Tensor) -> Tensor:
        """Tokens (T, D), each the weighted float32 sum of its rows; zero without any."""
        rows, weights = ops.convert_to_tensor(rows), ops.convert_to_tensor(self.weights)
        check_groups(self.groups, weights, rows=(rows, "ND", "float"))
        given, needed = rows.shape[0], self.groups.num_rows()
        if isinstance(given, int) and isinstance(needed, int) and given < needed:
            raise ValueError(
                "`rows` must have a row for each assignment. "
                f"Received: rows.shape={tuple(rows.shape)} for {needed} assignments"
            )
        return combine_rows(rows, weights, self.groups)

    def served(self) -> Tensor:
        """Which tokens have a row, (T,) bool."""
        return self.groups.served()

    def by_assignment(self) -> "GroupedPlan":
        """The plan of tokens that were repeated K times, each with one choice of weight 1."""
        ones = ops.ones_like(ops.reshape(self.weights, (-1, 1)))
        return GroupedPlan(self.groups.by_assignment(), ones)

    @backend.as_one_program
    def dropped_fraction(self, counts: Tensor) -> Tensor:
        """Share of the assignments (E,) that have no row, a float32 scalar; 0 without any."""
        assigned = ops.cast(ops.sum(counts), "float32")
        served = ops.cast(ops.sum(self.groups.sizes), "float32")
        return ops.maximum(assigned - served, 0.0) / ops.maximum(assigned, 1.0)


def plan_groups(
    routing: Routing,
    capacity: int | Tensor | None = None,
    first: Tensor | None = None,
    sequence_length: int | None = None,
    num_limited: int | None = None,
) -> GroupedPlan:
    """Sort the assignments of a routing by expert.

    Inside an expert all first choices come before all second choices, each in the order of the
    tokens; an expert with a capacity serves the first so many of them (GShard, Lepikhin et al.
    2020, arXiv:2006.16668, algorithm 1). Padding and dropped assignments belong to no group.

    Args:
        routing: `ops.Routing`. Indices that are not an expert's belong to no group, like -1.
        capacity: Integer, integer tensor or None. Most rows of one expert, None for all. Where a
            distribution spreads the tokens over devices, it holds for those of each device.
        first: Tensor (T,) or None. Urgency of each token: where a capacity is set the most urgent
            tokens come first. None: in the order of the tokens.
        sequence_length: Integer or None. If given, the capacity holds for each run of so many
            tokens alone.
        num_limited: Integer or None. If given, the capacity holds for the first so many experts
            only.

    Returns:
        A `GroupedPlan`.

    Raises:
        ValueError: If a size is not positive.
        TypeError: If the indices are no integers.
    """
    routing = check_routing(routing, "indices", "weights", "mask", "counts")
    num_tokens = routing.mask.shape[0]
    if capacity is not None:
        capacity = check_size("capacity", capacity)
    if first is not None:
        first = ops.convert_to_tensor(first)
        check_tensors({"T": num_tokens}, first=(first, "T", "number"))
    sequence_length = check_sequence_length(sequence_length, num_tokens)
    if num_limited is not None:
        num_limited = check_integer("num_limited", num_limited)
    # Those of a routing whose indices were replaced, or of a soft one, count something else.
    counts = count_assignments(routing.indices, routing.mask, routing.counts.shape[0])
    routing = routing._replace(counts=counts)
    return _plan_groups(routing, capacity, first, sequence_length, num_limited)


def _plan_groups(routing, capacity=None, first=None, sequence_length=None, num_limited=None):
    # Whatever a user-defined router returns, nothing is read or written out of range.
    indices = existing(routing.indices, routing.counts.shape[0], routing.mask)
    assignments = Assignments(indices, routing.counts)
    if is_kind("float", routing.counts):  # sums of weights
        assignments = Assignments.of(indices, routing.counts.shape[0])
    shards = backend.token_shards()
    if capacity is not None:
        if isinstance(capacity, int):
            capacity = min(capacity, MOST_ROWS)

        def admit(assignments, first):
            return _admit(assignments, capacity, first, sequence_length, num_limited)

        is_split = shards is not None and splits_evenly(shards, assignments, sequence_length)
        assignments = (
            admit_by_shard(shards, admit, assignments, first)
            if is_split
            else admit(assignments, first)
        )
    return _plan_of(assignments, routing.weights)


def plan_experts(experts, num_experts):
    """The plan of experts (T, K), -1 for none, with weights of 1."""
    return _plan_of(Assignments.of(experts, num_experts), ops.ones_like(experts, "float32"))


def _plan_of(assignments, weights):
    # Under a distribution each device sorts those of its own tokens and experts.
    is_split = backend.token_shards() is not None
    return GroupedPlan(assignments if is_split else assignments.sort(), weights)


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
        num_queues = num_queues * at_least(1, ceil_divide(num_tokens, sequence_length))
    place = place_in_queue(queue, num_queues, _turns(first, num_tokens, top_k))
    has_slot = place < capacity
    if num_limited is not None:
        has_slot = ops.logical_or(has_slot, expert_of_assignment >= num_limited)
    # Beyond the last expert: not served.
    experts = ops.where(has_slot, expert_of_assignment, num_experts)
    return Assignments.of(ops.transpose(ops.reshape(experts, (top_k, num_tokens))), num_experts)


def _turns(first, num_tokens, top_k):
    """The order in which assignments take their places, or None for that of their numbers."""
    if first is None:
        return None
    urgent_first = ops.cast(ops.argsort(-ops.stop_gradient(first)), "int32")
    choices = ops.expand_dims(ops.arange(top_k, dtype="int32"), 1)
    return ops.reshape(choices * num_tokens + urgent_first, (-1,))


def expert_capacity(
    num_tokens: int | Tensor, num_experts: int, top_k: int, capacity_factor: float
) -> int | Tensor:
    """Slots of an expert: `ceil(factor * T * K / E)`, at least 1 and at most T * K.

    Args:
        num_tokens: Integer or integer tensor, T. Padding counts, so that the capacity does not
            depend on the data.
        num_experts: Integer, E.
        top_k: Integer, K.
        capacity_factor: Positive float, read to three decimals or the nearest simple fraction;
            1.0 is enough for exactly balanced experts.

    Returns:
        An integer, or an int32 tensor where `num_tokens` is one.

    Raises:
        ValueError: If an argument is out of its range.
    """
    return _expert_capacity(
        check_size("num_tokens", num_tokens, minimum=0),
        check_integer("num_experts", num_experts),
        check_integer("top_k", top_k),
        check_number("capacity_factor", capacity_factor, above=0),
    )


def _expert_capacity(num_tokens, num_experts, top_k, capacity_factor):
    # In integers, which round the same way everywhere: in float32 a compiled quotient may end just
    # above a whole number, which gives one slot too many.
    factor = min(Fraction(float(capacity_factor)).limit_denominator(1000), num_experts)
    share = Fraction(factor) * top_k / num_experts
    # The whole parts separately: the product of all tokens with the numerator may exceed 32 bits.
    whole, rest = num_tokens // share.denominator, num_tokens % share.denominator
    rows = whole * share.numerator + ceil_divide(rest * share.numerator, share.denominator)
    return at_least(1, rows)
