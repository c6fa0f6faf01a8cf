"""Capacity: how many slots an expert has, and which tokens get them first.

Axes: T tokens, E experts, K experts per token.
"""

from typing import Any

import keras
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_choice, check_integer, check_number
from keras_moe._internal.serialization import Configured, register
from keras_moe.backend import backend
from keras_moe.ops.routing import Routing
from keras_moe.ops.selection import take_scores, top_k_indices
from keras_moe.ops.sorting import at_least, ceil_divide, position_in_expert, slots_of_expert

PRIORITIES = ("position", "probability", "random")
# More than there can be, and small enough that twice as many fit into int32.
MAX_CAPACITY = 2**30


@register
class Capacity(Configured):
    """Gives each expert `ceil(factor * T * K / E)` slots for a batch of T tokens.

    First choices get slots before second ones. An assignment without a slot contributes zero; other
    weights do not change. Padding takes no slot, but counts in T. On a mesh T is the number of
    tokens on one device. In a language model, later tokens take slots from earlier ones, unless K
    is 1 and `priority` is "position".

    Args:
        factor: Positive float, rounded to a fraction with a denominator of at most 1,000. 1.0 is
            enough for exactly balanced experts. With `routers.ReLURouter` and `routers.TopPRouter`
            K is `max_top_k`.
        minimum: Integer. Least number of slots of an expert.
        multiple_of: Integer. The number of slots is rounded up to a multiple of this.
        evaluation_factor: Positive float, the factor outside of training. None: no limit, so a
            token's output does not depend on the rest of the batch.
        priority: String. Which of equal choices get slots first: "position", those of earlier
            tokens; "probability", of tokens with a larger best probability (arXiv:2106.05974,
            section 4.2); "random".
        per_sequence: Boolean. Whether T is the length of a sequence and its tokens compete among
            themselves only. False: T is the whole batch.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> layer = keras_moe.layers.MixtureOfExperts(
    ...     keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=32),
    ...     capacity_factor=keras_moe.layers.Capacity(1.25, priority="probability"),
    ... )

    References: Lepikhin et al. 2020 (arXiv:2006.16668), algorithm 1; Fedus et al. 2021
    (arXiv:2101.03961), eq. 3.
    """

    def __init__(
        self,
        factor: float,
        minimum: int = 1,
        multiple_of: int = 1,
        evaluation_factor: float | None = None,
        priority: str = "position",
        per_sequence: bool = False,
    ):
        # Errors name the argument of the layer.
        self.factor = check_number("capacity_factor", factor, above=0)
        self.minimum = check_integer("minimum", minimum)
        self.multiple_of = check_integer("multiple_of", multiple_of)
        if evaluation_factor is not None:
            evaluation_factor = check_number("evaluation_factor", evaluation_factor, above=0)
        self.evaluation_factor = evaluation_factor
        self.priority = check_choice("priority", priority, PRIORITIES)
        self.per_sequence = bool(per_sequence)

    @classmethod
    def get(cls, identifier: Any) -> "Capacity | None":
        """Return a `Capacity` from an instance, a config, a factor, or None for no limit."""
        if isinstance(identifier, dict):
            identifier = keras.saving.deserialize_keras_object(identifier)
        return identifier if identifier is None or isinstance(identifier, cls) else cls(identifier)

    def drop_excess(
        self,
        routing: Routing,
        sequence_length: int | None,
        training: bool | None,
        seed: keras.random.SeedGenerator,
        num_capacity_limited: int,
    ) -> Tensor:
        """Return the experts (T, K) of a routing, -1 for the assignments that find no slot.

        `seed` draws random priorities. Only the first `num_capacity_limited` experts have a limit.
        """
        factor = self.factor if training else self.evaluation_factor
        if factor is None:
            return routing.indices
        length, top_k = ops.shape(routing.indices)
        shards = backend.devices.token_shards()
        if shards is not None:
            length = ceil_divide(length, shards.number)
        sequence_length = sequence_length if self.per_sequence else None
        if sequence_length is not None:
            length = sequence_length
        num_experts = routing.counts.shape[0]
        slots = slots_of_expert(length, num_experts, top_k, factor)
        slots = at_least(self.minimum, slots)
        slots = ceil_divide(slots, self.multiple_of) * self.multiple_of
        priority = None
        if self.priority == "probability":
            # Not `ops.max`, which fails without tokens.
            priority = take_scores(routing.probs, top_k_indices(routing.probs, 1))[:, 0]
        elif self.priority == "random":
            priority = keras.random.uniform(ops.shape(routing.mask), seed=seed)
        if isinstance(slots, int):
            slots = min(slots, MAX_CAPACITY)
        settings = num_experts, slots, sequence_length, num_capacity_limited

        def drop(experts, priority):
            return drop_excess(experts, priority, *settings)

        experts, num_tokens = routing.indices, ops.shape(routing.indices)[0]
        # Each device drops its own where no sequence has tokens on two of them.
        if shards is None or (
            sequence_length is not None and num_tokens % (shards.number * sequence_length)
        ):
            return drop(experts, priority)
        padded, axes = (shards.pad(experts, -1), shards.pad(priority)), (shards.axes, shards.axes)
        return shards.on_each_device(drop, padded, axes)[:num_tokens]


@backend.jit_when_eager
def drop_excess(
    experts, priority, num_experts, capacity, sequence_length=None, num_capacity_limited=None
):
    """Experts (T, K), -1 for the assignments that find no slot.

    First choices get slots before second ones, in the order of the tokens or, if given, by priority
    (T,), the highest first: GShard, Lepikhin et al. 2020 (arXiv:2006.16668), algorithm 1. If a
    length is given, the capacity is that of each sequence. It limits only the first
    `num_capacity_limited` experts.
    """
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
