"""Groups: where the rows of each expert are, and how rows belong to tokens.

Axes: T tokens, D features, E experts, K experts per token, R rows.

There are two kinds, with one interface. Where tokens choose experts, a token has at most K rows,
and all sums over them are gathers. Where experts choose tokens, a token may have any number.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe._internal.checks import check_tensors
from keras_moe._internal.types import Tensor
from keras_moe.backend import backend


class Groups(NamedTuple):
    """The rows of each expert, where each token chose K experts.

    - `sizes` (E,) int32: sizes of the groups, which follow one another in the order of the experts.
      Rows past the last group are padding and are not computed.
    - `assignment_of_row` (R,) int32: which assignment each row is; `k * T + t` is the k-th choice
      of token t.
    - `rows_of_token` (T, K) int32: the rows of each token, -1 where there is none.
    """

    sizes: Any
    assignment_of_row: Any
    rows_of_token: Any

    @property
    def num_experts(self):
        return self.sizes.shape[0]

    @property
    def num_tokens(self):
        return self.rows_of_token.shape[0]

    def axes(self) -> Any:
        """The axes of the fields, and those of the weights of a plan."""
        return "E", "R", "TK", "TK"

    def num_rows(self):
        return ops.shape(self.assignment_of_row)[0]

    def token_of_row(self) -> Tensor:
        """The token each row is a copy of, (R,) int32."""
        return self.assignment_of_row % ops.shape(self.rows_of_token)[0]

    def weight_of_row(self, weights: Tensor) -> Tensor:
        """The weight of each row, (R,), from weights (T, K)."""
        return ops.take(ops.reshape(ops.transpose(weights), (-1,)), self.assignment_of_row)

    def at_assignments(self, values: Tensor) -> Tensor:
        """Values of rows (R,) as values of assignments (T, K), zero where there is no row."""
        picked = backend.gather_rows(values, ops.maximum(self.rows_of_token, 0))
        return ops.where(self.rows_of_token >= 0, picked, 0.0)

    def weight_gradients(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """For each weight the product of its row (R, D) and the gradient of its token, (T, K).

        The same gathers as those of `sum_rows`: a compiler may do both at once.
        """
        of_choices = []
        for choice in range(self.rows_of_token.shape[1]):
            row = self.rows_of_token[:, choice]
            products = row_sums(backend.gather_rows(rows, ops.maximum(row, 0)), gradient)
            of_choices.append(ops.where(ops.expand_dims(row >= 0, 1), products, 0.0))
        return ops.concatenate(of_choices, axis=1)

    def of_first(self, num_experts: int) -> "Groups":
        """The groups of the first experts; the rows of the others are padding."""
        sizes, rows = self.sizes[:num_experts], self.rows_of_token
        return self._replace(sizes=sizes, rows_of_token=ops.where(rows < ops.sum(sizes), rows, -1))

    def weight_at(self, weights: Tensor, first: int, last: int) -> Tensor:
        """The sum of a token's weights for the experts `first` to `last` - 1, (T, 1)."""
        ends = ops.cumsum(self.sizes)
        start = ends[first] - self.sizes[first] if first < ends.shape[0] else ends[-1]
        rows = self.rows_of_token
        inside = ops.logical_and(rows >= start, rows < (ends[last - 1] if last > first else start))
        return ops.sum(ops.where(inside, weights, 0.0), axis=1, keepdims=True)

    def served(self) -> Tensor:
        """Which tokens have a row, (T,) bool."""
        return ops.any(self.rows_of_token >= 0, axis=1)

    def by_assignment(self) -> "Groups":
        """The same rows, where token t * K + k is the k-th choice of token t, (T * K, 1)."""
        num_tokens, top_k = ops.shape(self.rows_of_token)
        choice, token = self.assignment_of_row // num_tokens, self.assignment_of_row % num_tokens
        return self._replace(
            assignment_of_row=token * top_k + choice,
            rows_of_token=ops.reshape(self.rows_of_token, (-1, 1)),
        )

    def sum_rows(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """For each token the float32 sum of its rows (R, D), weighted by weights (T, K) or by 1.

        A gather, not a scatter: tokens are written once, in order, and need no atomic adds. The
        result (T, D) has the dtype of `rows`.
        """
        total = 0.0
        for choice in range(self.rows_of_token.shape[1]):
            row = self.rows_of_token[:, choice]
            picked = ops.cast(backend.gather_rows(rows, ops.maximum(row, 0)), "float32")
            if weights is not None:
                picked = picked * ops.cast(weights[:, choice : choice + 1], "float32")
            # `where`, not a product: a row that was never computed may hold anything, even NaN.
            total = total + ops.where(ops.expand_dims(row >= 0, 1), picked, 0.0)
        return ops.cast(total, rows.dtype)


class ChosenGroups(NamedTuple):
    """The rows of each expert, where each expert chose tokens.

    - `sizes` (E,) int32: as in `Groups`.
    - `choice_of_row` (R,) int32: which choice each row is.
    - `row_of_choice` (R,) int32: where each choice went, -1 where it is not computed.
    - `token_of_choice` (R,) int32: the token each choice is.
    - `mask` (T,) bool: False for padding.
    """

    sizes: Any
    choice_of_row: Any
    row_of_choice: Any
    token_of_choice: Any
    mask: Any

    @property
    def num_experts(self):
        return self.sizes.shape[0]

    @property
    def num_tokens(self):
        return self.mask.shape[0]

    def axes(self) -> Any:
        """The axes of the fields, and those of the weights of a plan."""
        return "E", "R", "R", "R", "T", "R"

    def num_rows(self):
        return ops.shape(self.choice_of_row)[0]

    def token_of_row(self) -> Tensor:
        """The token each row is a copy of, (R,) int32."""
        return ops.take(self.token_of_choice, self.choice_of_row)

    def weight_of_row(self, weights: Tensor) -> Tensor:
        """The weight of each row, (R,), from weights of the choices (R,)."""
        return ops.take(weights, self.choice_of_row)

    def at_assignments(self, values: Tensor) -> Tensor:
        """Values of rows as values of choices, (R,), zero where there is no row."""
        picked = backend.gather_rows(values, ops.maximum(self.row_of_choice, 0))
        return ops.where(self.row_of_choice >= 0, picked, 0.0)

    def weight_gradients(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """For each weight the product of its row (R, D) and the gradient of its token, (R,)."""
        gradients = backend.gather_rows(gradient, self.token_of_row())
        return self.at_assignments(row_sums(gradients, rows[: self.num_rows()])[:, 0])

    def served(self) -> Tensor:
        """Which tokens have a row, (T,) bool."""
        rows = ops.ones((self.num_rows(), 1), "float32")
        return self.sum_rows(rows)[:, 0] > 0.5

    def sum_rows(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """For each token the weighted float32 sum of its rows; see `Groups.sum_rows`."""
        num_rows, num_tokens = self.num_rows(), ops.shape(self.mask)[0]
        picked = ops.cast(rows[:num_rows], "float32")
        if weights is not None:
            row_weights = ops.cast(self.weight_of_row(weights), "float32")
            picked = picked * ops.expand_dims(row_weights, 1)
        served = ops.arange(num_rows, dtype="int32") < ops.sum(self.sizes)
        # Unserved rows may hold anything: they go to a spare token that is sliced off below.
        token = ops.where(served, self.token_of_row(), num_tokens)
        totals = ops.segment_sum(picked, token, num_tokens + 1)[:num_tokens]
        return ops.cast(totals, rows.dtype)


def check_groups(groups, weights=None, **tensors):
    """Check that groups or assignments fit the weights of a plan, and other tensors."""
    if not hasattr(groups, "axes"):
        raise TypeError(
            "`groups` must be one of the kinds of groups in `ops`, such as `plan.groups`. "
            f"Received: an object of type {type(groups).__name__}"
        )
    *axes, axes_of_weights = groups.axes()
    for name, field, letters in zip(groups._fields, groups, axes):
        tensors[f"groups.{name}"] = (field, letters)
    if weights is not None:
        tensors["weights"] = (weights, axes_of_weights, "float")
    check_tensors(**tensors)


@backend.as_one_program
def dispatch_rows(tokens, groups):
    """The rows of all groups, (R, D), from tokens (T, D); the gradient is `sum_rows`."""

    def forward(tokens, groups, keep):
        return backend.gather_rows(tokens, groups.token_of_row()), ()

    def backward(tokens, groups, saved, gradient):
        return groups.sum_rows(gradient)

    return backend.differentiable(forward, backward, tokens, groups)


@backend.as_one_program
def collect_rows(rows, groups):
    """`sum_rows` without weights, (T, D), whose gradient is `dispatch_rows`."""

    def forward(rows, groups, keep):
        return groups.sum_rows(rows), ()

    def backward(rows, groups, saved, gradient):
        return backend.gather_rows(gradient, groups.token_of_row())

    return backend.differentiable(forward, backward, rows, groups)


@backend.as_one_program
def combine_rows(rows, weights, groups):
    """`sum_rows` with gradients for rows and weights that are gathers."""

    def forward(inputs, groups, keep):
        rows, weights = inputs
        return groups.sum_rows(rows, weights), ()

    def backward(inputs, groups, saved, gradient):
        rows, weights = inputs
        row_gradient = backend.gather_rows(gradient, groups.token_of_row())
        weight_gradient = row_sums(row_gradient, rows)
        row_weights = ops.cast(groups.weight_of_row(weights), rows.dtype)
        return (
            row_gradient * ops.expand_dims(row_weights, 1),
            ops.cast(groups.at_assignments(weight_gradient[:, 0]), weights.dtype),
        )

    return backend.differentiable(forward, backward, (rows, weights), groups)


def row_sums(left, right):
    """(R, 1) float32 sums of the products along the last axis."""
    products = ops.cast(left, "float32") * ops.cast(right, "float32")
    return ops.sum(products, axis=1, keepdims=True)
