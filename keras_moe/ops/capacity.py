"""Capacity: each expert serves only so many of the assignments of a routing.

Axes: T tokens, E experts, K experts per token.
"""

import numbers
from fractions import Fraction

import keras
import numpy as np
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_integer, check_tensors
from keras_moe.backend import backend
from keras_moe.ops.plans import GroupedPlan
from keras_moe.ops.routing import Routing, convert_and_check
from keras_moe.ops.selection import mask_invalid
from keras_moe.ops.sorting import at_least, ceil_divide, position_in_expert

# More than there can be, and small enough that twice as many fit into int32.
MAX_CAPACITY = 2**30


def plan_groups(
    routing: Routing,
    capacity: int | Tensor | None = None,
    priority: Tensor | None = None,
) -> GroupedPlan:
    """Sort the assignments of a routing by expert.

    Inside an expert all first choices come before all second choices, each in the order of the
    tokens; an expert with a capacity serves the first so many of them (GShard, Lepikhin et al.
    2020, arXiv:2006.16668, algorithm 1). Padding and dropped assignments belong to no group.

    Args:
        routing: `ops.Routing`. Indices that are not an expert's belong to no group, like -1.
        capacity: Integer, integer tensor or None. Most rows of one expert, on each device where a
            distribution spreads the tokens; None for all.
        priority: Tensor (T,) or None. Tokens of higher priority find a slot first. None: in the
            order of the tokens.

    Returns:
        A `GroupedPlan`.

    Raises:
        ValueError: If the capacity is not positive.
        TypeError: If the indices are no integers.

    Example:

    >>> routing = keras_moe.ops.top_k_routing(keras.random.normal((6, 4)), top_k=2)
    >>> plan = keras_moe.ops.plan_groups(routing, capacity=2)
    >>> plan.dispatch(keras.random.normal((6, 16))).shape
    (12, 16)
    """
    indices, weights, _, _, mask, counts, *_ = routing
    routing = convert_and_check(Routing(indices, weights, None, None, mask, counts))
    if isinstance(capacity, (numbers.Number, np.ndarray)):  # no tensor
        capacity = check_integer("capacity", capacity)
    if priority is not None:
        priority = ops.convert_to_tensor(priority)
        check_tensors({"T": routing.mask.shape[0]}, priority=(priority, "T", "number"))
    num_experts = routing.counts.shape[0]
    experts = mask_invalid(routing.indices, num_experts, routing.mask)
    if capacity is not None:
        experts = drop_excess(experts, num_experts, capacity, priority)
    return GroupedPlan.of(experts, routing.weights, num_experts)


def drop_excess(
    experts, num_experts, capacity, priority=None, sequence_length=None, num_capacity_limited=None
):
    """Experts (T, K), -1 for the assignments that find no slot; see `plan_groups`.

    The capacity is for each sequence, if a length is given, and only for the first
    `num_capacity_limited` experts.
    """
    if isinstance(capacity, int):
        capacity = min(capacity, MAX_CAPACITY)

    def on_device(experts, priority):
        return _drop_excess(
            experts, priority, num_experts, capacity, sequence_length, num_capacity_limited
        )

    num_tokens, shards = ops.shape(experts)[0], backend.devices.token_shards()
    # Each device drops its own where no sequence has tokens on two of them.
    if shards is not None and (
        sequence_length is None or num_tokens % (shards.number * sequence_length) == 0
    ):
        padded, axes = (shards.pad(experts, -1), shards.pad(priority)), (shards.axes, shards.axes)
        return shards.on_each_device(on_device, padded, axes)[:num_tokens]
    return on_device(experts, priority)


@backend.jit_when_eager
def _drop_excess(experts, priority, num_experts, capacity, sequence_length, num_capacity_limited):
    num_tokens, top_k = ops.shape(experts)
    expert = ops.reshape(ops.transpose(experts), (-1,))
    queue, num_queues = ops.where(expert >= 0, expert, num_experts), num_experts + 1
    if sequence_length is not None:
        token = ops.arange(num_tokens, dtype="int32")
        queue = queue + num_queues * ops.tile(token // sequence_length, (top_k,))
        num_queues = num_queues * at_least(1, ceil_divide(num_tokens, sequence_length))
    order = None
    if priority is not None:
        # The negative of an unsigned integer is none.
        is_float = keras.backend.is_float_dtype(priority.dtype)
        falling = -ops.stop_gradient(priority) if is_float else ops.bitwise_not(priority)
        best_first = ops.cast(ops.argsort(falling), "int32")
        choices = ops.expand_dims(ops.arange(top_k, dtype="int32"), 1)
        order = ops.reshape(choices * num_tokens + best_first, (-1,))
    has_slot = position_in_expert(queue, num_queues, order) < capacity
    if num_capacity_limited is not None:
        has_slot = has_slot | (expert >= num_capacity_limited)
    served = ops.where(has_slot, expert, -1)
    return ops.transpose(ops.reshape(served, (top_k, num_tokens)))


@backend.jit_when_eager
def count_dropped(routing, experts):
    """How many assignments of a routing have no expert in (T, K), () int32, and their share."""
    dropped = ops.sum(ops.cast(ops.not_equal(routing.indices, experts), "int32"))
    assigned = ops.cast(ops.sum(routing.counts), "float32")
    return dropped, ops.cast(dropped, "float32") / ops.maximum(assigned, 1.0)


def slots_of_expert(num_tokens, num_experts, top_k, capacity_factor):
    """Slots of an expert: `ceil(factor * T * K / E)`, at least 1 and at most T * K.

    The factor is read to three decimals or the nearest simple fraction. An integer, or an int32
    tensor where the number of tokens is one.
    """
    # In integers: a compiled quotient in float32 may end just above a whole number.
    factor = min(Fraction(float(capacity_factor)).limit_denominator(1000), num_experts)
    share = Fraction(factor) * top_k / num_experts
    # The whole parts separately: the product of all tokens with the numerator may exceed 32 bits.
    whole, rest = num_tokens // share.denominator, num_tokens % share.denominator
    rows = whole * share.numerator + ceil_divide(rest * share.numerator, share.denominator)
    return at_least(1, rows)
