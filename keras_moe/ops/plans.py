"""Plans: from a routing to the rows that move. Decided first; data moves afterwards.

Axes: T tokens, D features, E experts, K experts per token, N = T * K assignments, one row each.
"""

from fractions import Fraction
from typing import Any, NamedTuple

from keras import ops

from keras_moe import backend
from keras_moe.ops.grouped import Groups, combine_rows, dispatch_rows


class GroupedPlan(NamedTuple):
    """Assignments sorted by expert, each a row: an immutable record with two verbs.

    - `groups`: `ops.Groups`, the sizes of the groups and the maps between rows and tokens.
    - `weights` (T, K) float32: the combine weights of the routing.
    """

    groups: Any
    weights: Any

    def dispatch(self, tokens):
        """Rows grouped by expert, (N, D), from tokens (T, D)."""
        return dispatch_rows(tokens, self.groups)

    def combine(self, rows):
        """Tokens (T, D), each the weighted float32 sum of its rows; zero without any."""
        return combine_rows(rows, self.weights, self.groups)


def plan_groups(routing, capacity=None):
    """Sort the assignments of a routing by expert.

    Inside an expert all first choices stand before all second choices, each in the order of the
    tokens; an expert with a capacity serves the first so many of them (GShard, Lepikhin et al.
    2020, arXiv:2006.16668, algorithm 1). Padding and dropped assignments belong to no group.

    Args:
        routing: an `ops.Routing`.
        capacity: most rows of one expert, an integer or integer tensor, or None for all.

    Returns:
        A `GroupedPlan`.
    """
    num_tokens, top_k = ops.shape(routing.indices)
    num_experts = routing.counts.shape[0]
    nobody = num_experts
    # Choice-major: assignment k * T + t is the k-th choice of token t.
    served = ops.where(ops.expand_dims(routing.mask, 1), routing.indices, nobody)
    expert_of_assignment = ops.reshape(ops.transpose(served), (-1,))
    order, rank = _sort_by_expert(expert_of_assignment, num_experts + 1)
    sizes = routing.counts
    if capacity is not None:
        starts = ops.cumsum(sizes) - sizes
        start = ops.take(ops.append(starts, 0), expert_of_assignment)
        has_room = rank - start < capacity
        expert_of_assignment = ops.where(has_room, expert_of_assignment, nobody)
        order, rank = _sort_by_expert(expert_of_assignment, num_experts + 1)
        sizes = ops.minimum(sizes, capacity)
    is_served = expert_of_assignment < nobody
    rows = ops.where(is_served, rank, -1)
    groups = Groups(
        sizes=sizes,
        assignment_of_row=order,
        rows_of_token=ops.transpose(ops.reshape(rows, (top_k, num_tokens))),
    )
    return GroupedPlan(groups, routing.weights)


def expert_capacity(num_tokens, num_experts, top_k, capacity_factor):
    """Rows an expert has room for: `ceil(factor * T * K / E)`, at least 1.

    Args:
        num_tokens: T, an integer or an integer tensor. Padding counts, so that the capacity does
            not depend on the data.
        num_experts: E.
        top_k: K.
        capacity_factor: positive float, read to three decimals or the nearest simple fraction;
            1.0 has room for exactly balanced experts.

    Returns:
        An integer, or an int32 tensor where `num_tokens` is one.
    """
    # In integers, which round alike everywhere: in float32 a compiled quotient may come out just
    # above a whole number, and one row too many with it.
    share = Fraction(capacity_factor).limit_denominator(1000) * top_k / num_experts
    rows = -(-num_tokens * share.numerator // share.denominator)
    return max(1, rows) if isinstance(num_tokens, int) else ops.maximum(1, rows)


def dropped_fraction(routing, plan):
    """Share of the assignments that have no row, a float32 scalar; 0 without assignments."""
    assigned = ops.cast(ops.sum(routing.counts), "float32")
    served = ops.cast(ops.sum(plan.groups.sizes), "float32")
    return (assigned - served) / ops.maximum(assigned, 1.0)


def _sort_by_expert(expert_of_assignment, num_keys):
    """A stable order by expert, and for each assignment its place in it.

    Args:
        expert_of_assignment: (N,) int32, from 0 to `num_keys` - 1.
        num_keys: an integer.
    """
    num_rows = ops.shape(expert_of_assignment)[0]
    numbers = ops.arange(num_rows, dtype="int32")
    fits = isinstance(num_rows, int) and num_keys * num_rows < 2**31
    if backend.compiles_static_shapes() and fits:
        # Expert and number in one integer: XLA sorts plain integers several times as fast as
        # pairs, and no two are equal.
        order = backend.sort(expert_of_assignment * num_rows + numbers) % num_rows
    else:
        order = ops.cast(ops.argsort(expert_of_assignment), "int32")
    rank = ops.scatter(ops.expand_dims(order, 1), numbers, (num_rows,))
    return order, rank
