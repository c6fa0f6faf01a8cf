"""Plans: the rows of each expert, and how tokens become rows and rows tokens.

Axes: T tokens, D features, E experts, K places for experts of a token, N rows.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_tensors
from keras_moe.backend import backend
from keras_moe.ops.selection import mask_invalid
from keras_moe.ops.sorting import as_dtype, at_least, put


class GroupedPlan(NamedTuple):
    """Assignments of tokens to experts as rows, grouped by expert.

    An assignment is a token and one of the places for its experts. Its number is `k * T + t` for
    place k of token t: all first choices come first.

    - `experts` (T, K) int32: the expert of each assignment, -1 where none serves it.
    - `weights` (T, K): float32 combine weights.
    - `sizes` (E,) int32: the number of rows of each expert.
    - `assignment_of_row` (N,) int32: rows are sorted by expert, and those of one expert by the
      numbers of their assignments. Rows past the last group are padding, not computed.
    - `row_of_assignment` (T, K) int32: -1 where there is none.
    """

    experts: Any
    weights: Any
    sizes: Any
    assignment_of_row: Any
    row_of_assignment: Any

    @classmethod
    def of(
        cls, experts: Tensor, weights: Tensor, num_experts: int, sizes: Tensor | None = None
    ) -> "GroupedPlan":
        """The plan of experts (T, K) from 0 to `num_experts` - 1, or -1 for none.

        `sizes` (E,) int32 is how many there are of each, None if this is not known.
        """
        return cls(experts, weights, *_sort(experts, num_experts, sizes))

    def of_experts(
        self, experts: Tensor, weights: Tensor, first: Any, number: int
    ) -> "GroupedPlan":
        """The part of a plan for experts `first` to `first + number - 1`, renumbered from 0."""
        return self.of(mask_invalid(experts - first, number), weights, number)

    @property
    def num_experts(self):
        return self.sizes.shape[0]

    @property
    def num_tokens(self):
        return self.experts.shape[0]

    def num_rows(self):
        return ops.shape(self.assignment_of_row)[0]

    # Dispatch and combine

    @backend.jit_when_eager
    def dispatch(self, tokens: Tensor) -> Tensor:
        """Rows grouped by expert, (N, D), from tokens (T, D)."""
        tokens = ops.convert_to_tensor(tokens)
        check_tensors({"T": self.num_tokens}, tokens=(tokens, "TD", "float"))

        def forward(tokens, plan, save):
            return backend.gather_rows(tokens, plan.token_of_row()), ()

        def backward(tokens, plan, saved, gradient):
            return as_dtype(plan.sum_rows(gradient), gradient.dtype)

        return backend.differentiable(forward, backward, tokens, self)

    @backend.jit_when_eager
    def combine(self, rows: Tensor) -> Tensor:
        """Tokens (T, D), each the weighted float32 sum of its rows; zero without any.

        Weights of None are 1.
        """
        rows = ops.convert_to_tensor(rows)
        check_tensors(rows=(rows, "ND", "float"))
        given, needed = rows.shape[0], self.num_rows()
        if isinstance(given, int) and isinstance(needed, int) and given < needed:
            raise ValueError(
                "`rows` must have a row for each assignment. "
                f"Received: rows.shape={tuple(rows.shape)} for {needed} assignments"
            )

        # The gradient of `sum_rows` for the rows is a gather.
        def forward(inputs, plan, save):
            return as_dtype(plan.sum_rows(*inputs), inputs[0].dtype), ()

        def backward(inputs, plan, saved, gradient):
            row_gradient = backend.gather_rows(gradient, plan.token_of_row())
            if len(inputs) == 1:
                return (row_gradient,)
            rows, weights = inputs
            weight_gradient = row_sums(row_gradient, rows)
            row_weights = ops.cast(plan.weight_of_row(weights), rows.dtype)
            return (
                row_gradient * ops.expand_dims(row_weights, 1),
                ops.cast(plan.at_assignments(weight_gradient[:, 0]), weights.dtype),
            )

        weights = () if self.weights is None else (ops.convert_to_tensor(self.weights),)
        return backend.differentiable(forward, backward, (rows, *weights), self)

    # Rows, tokens and assignments

    def token_of_row(self) -> Tensor:
        """The token each row is a copy of, (N,) int32."""
        return self.assignment_of_row % ops.shape(self.experts)[0]

    def weight_of_row(self, weights: Tensor) -> Tensor:
        """The weight of each row, (N,), from weights of assignments."""
        flat = ops.reshape(ops.transpose(weights), (-1,))
        return backend.gather_rows(flat, self.assignment_of_row)

    def at_assignments(self, values: Tensor) -> Tensor:
        """Values of rows (N,) as values of assignments (T, K), zero where there is no row."""
        rows = self.row_of_assignment
        picked = backend.gather_rows(values, backend.fill_unserved(rows, rows, 0))
        return backend.fill_unserved(picked, rows, 0.0)

    def sum_rows(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """For each token the float32 sum (T, D) of its rows, weighted by `weights` or by 1."""
        return backend.sum_chosen_rows(rows, self.row_of_assignment, weights)

    # Parts and summaries

    def of_first(self, num_experts: int) -> "GroupedPlan":
        """The assignments to the first experts; the rows of the others are padding."""
        is_served = self.experts < num_experts
        return self._replace(
            experts=ops.where(is_served, self.experts, -1),
            sizes=self.sizes[:num_experts],
            row_of_assignment=ops.where(is_served, self.row_of_assignment, -1),
        )

    def by_assignment(self) -> "GroupedPlan":
        """The plan of tokens that were repeated K times, each with one expert of weight 1."""
        num_tokens, top_k = ops.shape(self.experts)
        place, token = self.assignment_of_row // num_tokens, self.token_of_row()
        return GroupedPlan(
            experts=ops.reshape(self.experts, (-1, 1)),
            weights=ops.ones_like(ops.reshape(self.weights, (-1, 1))),
            sizes=self.sizes,
            assignment_of_row=token * top_k + place,
            row_of_assignment=ops.reshape(self.row_of_assignment, (-1, 1)),
        )

    def weight_at(self, first: int, last: int) -> Tensor:
        """The sum of a token's weights for the experts `first` to `last` - 1, (T, 1)."""
        inside = (self.experts >= first) & (self.experts < last)
        return ops.sum(ops.where(inside, self.weights, 0.0), axis=1, keepdims=True)


class ExpertChoicePlan(GroupedPlan):
    """The plan of experts that choose their tokens: place e is expert e, so K is E.

    It has N rows, fewer than its T * E assignments.
    """

    __slots__ = ()

    @classmethod
    def of_choices(cls, experts: Tensor, weights: Tensor, num_rows: Any) -> "ExpertChoicePlan":
        """The plan of experts (T, E), -1 for none, with at most `num_rows` assignments."""
        return cls(experts, weights, *_compact(experts, num_rows))

    def of_experts(self, experts, weights, first, number):
        # All tokens that an expert has chosen may be among these.
        num_tokens = ops.shape(experts)[0]
        most = min(self.num_rows() // self.num_experts, num_tokens)
        experts, weights = (
            ops.slice(each, (0, first), (num_tokens, number)) for each in (experts, weights)
        )
        return self.of_choices(mask_invalid(experts - first, number), weights, most * number)

    def sum_rows(self, rows, weights=None):
        # A scatter: most of the E places of a token have no row.
        num_rows, num_tokens = self.num_rows(), ops.shape(self.experts)[0]
        picked = as_dtype(rows[:num_rows], "float32")
        if weights is not None:
            picked = picked * ops.expand_dims(self.weight_of_row(weights), 1)
        numbers = ops.reshape(ops.transpose(self.row_of_assignment), (-1,))
        found = backend.gather_rows(numbers, self.assignment_of_row)
        served = found == ops.arange(num_rows, dtype="int32")
        # Unserved rows may hold anything: they add zero to the first token.
        picked = ops.where(ops.expand_dims(served, 1), picked, 0.0)
        token = ops.where(served, self.token_of_row(), 0)
        return ops.segment_sum(picked, token, at_least(1, num_tokens))[:num_tokens]


@backend.jit_when_eager
def _sort(experts, num_experts, sizes):
    """Sizes, the assignment of each row, and the row of each assignment: see `GroupedPlan`."""
    # What no expert serves comes last.
    ranked = ops.transpose(backend.fill_unserved(experts, experts, num_experts))
    order, rank = backend.order_and_rank(ops.reshape(ranked, (-1,)), num_experts + 1)
    rows = ops.transpose(ops.reshape(rank, (experts.shape[1], -1)))
    rows = backend.fill_unserved(rows, experts, -1)
    if backend.is_complete(experts):
        backend.mark_complete(rows)
    if sizes is None:
        sizes = backend.count_integers(ranked, num_experts)
    return sizes, order, rows


@backend.jit_when_eager
def _compact(experts, num_rows):
    """As `_sort`, for experts (T, E): the numbers of their assignments are sorted by expert."""
    served = ops.cast(ops.transpose(experts >= 0), "int32")
    flat = ops.reshape(served, (-1,))
    row = ops.where(flat > 0, ops.cumsum(flat) - 1, -1)
    numbers = ops.arange(ops.shape(flat)[0], dtype="int32")
    # What no expert serves goes to a place that is cut off.
    order = put(numbers, ops.where(flat > 0, row, num_rows), num_rows + 1)[:num_rows]
    rows = ops.reshape(row, (experts.shape[1], -1))
    return ops.sum(served, axis=1), order, ops.transpose(rows)


def row_sums(left, right):
    """(N, 1) float32 sums of the products along the last axis."""
    products = ops.cast(left, "float32") * ops.cast(right, "float32")
    return ops.sum(products, axis=1, keepdims=True)
