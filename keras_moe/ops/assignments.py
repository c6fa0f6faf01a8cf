"""Assignments: which expert serves which token, and how they are sorted by expert.

There are two kinds, as of groups: those of tokens that choose experts, and of experts that choose
tokens. Both have the interface that `sharded` needs:

- `parts`: tuple of tensors whose first axis is split over devices as that of the tokens is.
- `sort_part(parts, weights, first, number)`: of such parts the groups of so many experts from
  `first` on, and the weights that go with them.

Axes: T tokens, E experts, K experts per token, N = T * K assignments, B sequences, S tokens of a
sequence, C tokens that an expert chooses of it.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe._internal.checks import check_integer
from keras_moe._internal.types import Tensor
from keras_moe.backend import backend
from keras_moe.ops.groups import ChosenGroups, Groups


class Assignments(NamedTuple):
    """The assignments that are served.

    - `experts` (T, K) int32: the expert of each assignment, -1 where none serves it.
    - `sizes` (E,) int32: how many each expert serves.
    """

    experts: Any
    sizes: Any

    @property
    def num_experts(self):
        return self.sizes.shape[0]

    @property
    def num_tokens(self):
        return self.experts.shape[0]

    @classmethod
    def of(cls, experts: Tensor, num_experts: int) -> "Assignments":
        """Those to the first `num_experts` experts; any other number (T, K) is none."""
        served = ops.logical_and(experts >= 0, experts < num_experts)
        experts = ops.where(served, experts, -1)
        return cls(experts, backend.count_integers(ops.reshape(experts, (-1,)), num_experts))

    def axes(self):
        return "TK", "E", "TK"

    @property
    def parts(self):
        return (self.experts,)

    @classmethod
    def sort_part(cls, parts, weights, first, number):
        (experts,) = parts
        return cls.of(experts - first, number).sort(), weights

    def choice_major(self) -> Tensor:
        """The expert of each assignment k * T + t, (N,), E where none serves it."""
        experts = ops.where(self.experts >= 0, self.experts, self.num_experts)
        return ops.reshape(ops.transpose(experts), (-1,))

    def of_first(self, num_experts: int) -> "Assignments":
        """The assignments to the first experts."""
        experts = ops.where(self.experts < num_experts, self.experts, -1)
        return Assignments(experts, self.sizes[:num_experts])

    def weight_at(self, weights: Tensor, first: int, last: int) -> Tensor:
        """The sum of a token's weights for the experts `first` to `last` - 1, (T, 1)."""
        inside = ops.logical_and(self.experts >= first, self.experts < last)
        return ops.sum(ops.where(inside, weights, 0.0), axis=1, keepdims=True)

    def served(self) -> Tensor:
        """Which tokens have an assignment that is served, (T,) bool."""
        return ops.any(self.experts >= 0, axis=1)

    def by_assignment(self) -> "Assignments":
        """The same, where token t * K + k is the k-th choice of token t, (T * K, 1)."""
        return self._replace(experts=ops.reshape(self.experts, (-1, 1)))

    @backend.as_one_program
    def sort(self) -> Groups:
        """The `Groups` of rows sorted by expert: inside one in the order of the assignments."""
        (num_tokens, top_k), num_experts = ops.shape(self.experts), self.num_experts
        expert_of_assignment = self.choice_major()
        order, rank = sort_by_expert(expert_of_assignment, num_experts + 1)
        rows = ops.where(expert_of_assignment < num_experts, rank, -1)
        return Groups(
            sizes=self.sizes,
            assignment_of_row=order,
            rows_of_token=ops.transpose(ops.reshape(rows, (top_k, num_tokens))),
        )


class Choices(NamedTuple):
    """The tokens that each expert chooses of each sequence; their weights are (B, E, C) too.

    - `place` (B, E, C) int32: the place in its sequence of each token that is chosen.
    - `is_valid` (B, E, C) bool: False where a choice is not served.
    - `mask` (T,) bool: False for padding.
    """

    place: Any
    is_valid: Any
    mask: Any

    @property
    def num_experts(self):
        return self.place.shape[1]

    @property
    def num_tokens(self):
        return self.mask.shape[0]

    def axes(self):
        return "BEC", "BEC", "T", "BEC"

    @property
    def sizes(self):
        return ops.sum(ops.cast(self.is_valid, "int32"), axis=(0, 2))

    @property
    def parts(self):
        return tuple(self)

    @classmethod
    def sort_part(cls, parts, weights, first, number):
        *of_choices, mask = parts
        sequences, _, places = ops.shape(weights)
        place, is_valid, weights = (
            backend.slice_at(each, (0, first, 0), (sequences, number, places))
            for each in (*of_choices, weights)
        )
        return cls(place, is_valid, mask).sort(), ops.reshape(weights, (-1,))

    def tokens(self) -> Tensor:
        """The token of each choice, (B, E, C) int32."""
        length = ops.shape(self.mask)[0] // at_least(1, ops.shape(self.place)[0])
        return tokens_at(self.place, length)

    def served(self) -> Tensor:
        """Which tokens have a choice that is served, (T,) bool."""
        return self.sort().served()

    @backend.as_one_program
    def sort(self) -> ChosenGroups:
        """The `ChosenGroups` of rows sorted by expert, of choices in the order of (B, E, C)."""
        num_experts = self.num_experts
        expert = ops.expand_dims(ops.arange(num_experts, dtype="int32"), 1)
        expert = ops.reshape(ops.where(self.is_valid, expert, num_experts), (-1,))
        order, rank = sort_by_expert(expert, num_experts + 1)
        return ChosenGroups(
            sizes=self.sizes,
            choice_of_row=order,
            row_of_choice=ops.where(ops.reshape(self.is_valid, (-1,)), rank, -1),
            token_of_choice=ops.reshape(self.tokens(), (-1,)),
            mask=self.mask,
        )


def tokens_at(place, sequence_length):
    """The tokens at places (B, ...) of their sequences."""
    first = ops.arange(ops.shape(place)[0], dtype="int32") * sequence_length
    return place + ops.reshape(first, (-1, *[1] * (len(place.shape) - 1)))


def at_least(least, size):
    """The larger of two sizes; an integer stays one, so that shapes stay known."""
    return max(least, size) if isinstance(size, int) else backend.larger_size(least, size)


def ceil_divide(size, divisor):
    """The quotient of two sizes, rounded up. Not `-(-size // divisor)`: ONNX rounds it to zero."""
    return (size + divisor - 1) // divisor


def check_size(name, size, minimum=1):
    """Return a size as a Python integer; a tensor or a symbol as it is."""
    is_known = backend.knows_shapes() and not ops.is_tensor(size)
    return check_integer(name, size, minimum) if is_known else size


def check_sequence_length(length, num_tokens):
    """Return a length that divides the number of tokens, where both are known, or None."""
    if length is None:
        return None
    length = check_size("sequence_length", length)
    if isinstance(length, int) and isinstance(num_tokens, int) and num_tokens % length:
        raise ValueError(
            "`sequence_length` must divide the number of tokens. "
            f"Received: sequence_length={length}, {num_tokens} tokens"
        )
    return length


def place_in_queue(queue, num_queues, turns=None):
    """How many entries of the same queue precede each entry, (N,) int32; `turns` is their order."""
    if turns is not None:
        places = place_in_queue(ops.take(queue, turns), num_queues)
        return put(places, turns)
    _, rank = sort_by_expert(queue, num_queues)
    sizes = queue_sizes(queue, num_queues)
    return rank - ops.take(ops.cumsum(sizes) - sizes, queue)


@backend.as_one_program
def queue_sizes(queue, num_queues):
    """The length of each queue, (num_queues,) int32."""
    return ops.segment_sum(ops.ones_like(queue), queue, num_queues)


def sort_by_expert(expert_of_assignment, num_keys):
    """A stable order of numbers (N,) from 0 to `num_keys` - 1, and the place of each in it."""
    num_rows = ops.shape(expert_of_assignment)[0]
    numbers = ops.arange(num_rows, dtype="int32")
    fits = isinstance(num_rows, int) and num_keys * num_rows < 2**31
    if (backend.compiles_static_shapes() and fits) or backend.lacks_stable_sort():
        # Expert and number in one integer: XLA sorts plain integers several times as fast as
        # pairs, and no two are equal.
        order = backend.sort(expert_of_assignment * num_rows + numbers) % num_rows
    else:
        order = ops.cast(ops.argsort(expert_of_assignment), "int32")
    return order, put(numbers, order)


def put(values, places, size=None):
    """(size,) zeros, or N of them, but `values` (N,) at their `places` (N,), which all differ."""
    # `torch.vmap` writes only into what depends on its inputs.
    zeros = ops.zeros_like(places) if size is None else ops.zeros((size,))
    # Not `ops.scatter`, which on PyTorch adds one value after the other in Python.
    return ops.scatter_update(ops.cast(zeros, values.dtype), ops.expand_dims(places, 1), values)
