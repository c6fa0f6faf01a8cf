"""Capacity: each expert serves only so many of the assignments of a routing.

Axes: T tokens, E experts, K experts per token.
"""

from fractions import Fraction

import keras
from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.sorting import at_least, ceil_divide, position_in_expert

# More than there can be, and small enough that twice as many fit into int32.
MAX_CAPACITY = 2**30


def drop_excess(
    experts, num_experts, capacity, priority=None, sequence_length=None, num_capacity_limited=None
):
    """Experts (T, K), -1 for the assignments that find no slot.

    An expert serves first choices before second ones, each in the order of the tokens, or the
    tokens of higher priority (T,) first: GShard, Lepikhin et al. 2020 (arXiv:2006.16668), algorithm
    1. The capacity is for each sequence, if a length is given, and only for the first
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
