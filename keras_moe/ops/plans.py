"""Plans: which expert serves which token, and how rows move there and back.

Axes: T tokens, D features, E experts, K experts per token, N assignments, one row each; with
expert choice B sequences, and C tokens that an expert chooses of each.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_tensors
from keras_moe.backend import backend
from keras_moe.ops.routing import count_assignments, counted, masked, served_and_counts
from keras_moe.ops.sorting import as_dtype, at_least


class GroupedPlan(NamedTuple):
    """Assignments of tokens to experts, and the rows of each expert.

    Where tokens choose experts, assignments are (T, K); their numbers are choice-major, `k * T + t`
    for the k-th choice of token t. Where experts choose tokens, they are (B, E, C), and a token may
    have any number of them.

    - `experts` (T, K) or (B, E, C) int32: the expert of each assignment, -1 where none serves it.
    - `weights`: float32 combine weights of the same shape.
    - `sizes` (E,) int32: the number of rows of each expert.
    - `places` (B, E, C) int32: the place of each token in its sequence; None where tokens choose.
    - `mask` (T,) bool: False for padding; None where tokens choose.
    - `order` (N,) int32: the assignment of each row. Rows are sorted by expert; rows of one expert
      keep the order of their assignments. Rows past the last group are padding, not computed.
    - `rows` (T, K) or (N,) int32: the row of each assignment, -1 where there is none.

    `order` and `rows` are None before each device of a distribution has sorted its own.
    """

    experts: Any
    weights: Any
    sizes: Any
    places: Any = None
    mask: Any = None
    order: Any = None
    rows: Any = None

    @classmethod
    def of(
        cls, experts: Tensor, weights: Tensor, num_experts: int, mask: Tensor | None = None
    ) -> "GroupedPlan":
        """The unsorted plan of experts (T, K), none for other numbers and outside a mask (T,)."""
        experts, sizes = served_and_counts(experts, mask, num_experts)
        return cls(experts, weights, sizes)

    @property
    def num_experts(self):
        return self.sizes.shape[0]

    @property
    def num_tokens(self):
        return (self.experts if self.places is None else self.mask).shape[0]

    # Two verbs

    @backend.jit_when_eager
    def dispatch(self, tokens: Tensor) -> Tensor:
        """Rows grouped by expert, (N, D), from tokens (T, D)."""
        tokens = ops.convert_to_tensor(tokens)
        check_tensors({"T": self.num_tokens}, tokens=(tokens, "TD", "float"))

        def forward(tokens, plan, save):
            return backend.gather_rows(tokens, plan.token_of_row()), ()

        def backward(tokens, plan, saved, gradient):
            return plan.sum_rows(gradient)

        return backend.differentiable(forward, backward, tokens, self._context())

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
            return plan.sum_rows(*inputs), ()

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
        return backend.differentiable(forward, backward, (rows, *weights), self._context())

    def _context(self):
        """The sorted plan as a structure of integers, which have no gradient."""
        return self.sort()._replace(weights=None)

    # Sorting

    @backend.jit_when_eager
    def sort(self) -> "GroupedPlan":
        """The same plan with `order` and `rows`."""
        if self.order is not None:
            return self
        number = self.num_experts
        expert = self._flat(ops.where(self.experts >= 0, self.experts, number))
        order, rank = backend.order_and_rank(expert, number + 1)
        rows = ops.where(expert < number, rank, -1)
        if self.places is None:
            rows = ops.transpose(ops.reshape(rows, (self.experts.shape[1], -1)))
        return self._replace(order=order, rows=rows)

    def with_rows(self) -> "GroupedPlan":
        """The sorted plan; on a mesh the plan as it is, as each device sorts its own part."""
        return self if backend.devices.token_shards() is not None else self.sort()

    def _flat(self, values):
        """Values of assignments as a vector (N,), by their numbers."""
        return ops.reshape(ops.transpose(values) if self.places is None else values, (-1,))

    # Rows, tokens and assignments of a sorted plan

    def num_rows(self):
        return ops.size(self.experts) if self.order is None else ops.shape(self.order)[0]

    def token_of_row(self) -> Tensor:
        """The token each row is a copy of, (N,) int32."""
        if self.places is None:
            return self.order % ops.shape(self.experts)[0]
        return ops.take(self._flat(self.token_of_choice()), self.order)

    def token_of_choice(self) -> Tensor:
        """The token of each assignment (B, E, C) where experts choose."""
        sequences = ops.shape(self.places)[0]
        return tokens_at(self.places, ops.shape(self.mask)[0] // at_least(1, sequences))

    def weight_of_row(self, weights: Tensor) -> Tensor:
        """The weight of each row, (N,), from weights of assignments."""
        return ops.take(self._flat(weights), self.order)

    def at_assignments(self, values: Tensor) -> Tensor:
        """Values of rows (N,) as values of assignments, zero where there is no row."""
        picked = backend.gather_rows(values, ops.maximum(self.rows, 0))
        return ops.reshape(ops.where(self.rows >= 0, picked, 0.0), ops.shape(self.experts))

    def sum_rows(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """For each token the float32 sum (T, D) of its rows, weighted by `weights` or by 1."""
        by_token = self._gather_and_sum if self.places is None else self._scatter_sum
        return as_dtype(by_token(rows, weights), rows.dtype)

    def _gather_and_sum(self, rows, weights):
        return backend.sum_chosen_rows(rows, self.rows, weights)

    def _scatter_sum(self, rows, weights):
        num_rows, num_tokens = self.num_rows(), ops.shape(self.mask)[0]
        picked = as_dtype(rows[:num_rows], "float32")
        if weights is not None:
            picked = picked * ops.expand_dims(self.weight_of_row(weights), 1)
        served = ops.arange(num_rows, dtype="int32") < ops.sum(self.sizes)
        # Unserved rows may hold anything: they add zero to the first token.
        picked = ops.where(ops.expand_dims(served, 1), picked, 0.0)
        token = ops.where(served, self.token_of_row(), 0)
        return ops.segment_sum(picked, token, at_least(1, num_tokens))[:num_tokens]

    # Parts and summaries

    def of_first(self, num_experts: int) -> "GroupedPlan":
        """The assignments to the first experts; the rows of the others are padding."""
        is_served = self.experts < num_experts
        rows = None if self.rows is None else ops.where(is_served, self.rows, -1)
        experts = ops.where(is_served, self.experts, -1)
        return self._replace(experts=experts, sizes=self.sizes[:num_experts], rows=rows)

    def of_experts(self, first: Any, number: int) -> "GroupedPlan":
        """The unsorted plan of `number` experts from `first` on, under numbers from 0."""
        if self.places is None:
            return GroupedPlan.of(self.experts - first, self.weights, number)
        sequences, _, choices = ops.shape(self.experts)
        experts, weights, places = (
            ops.slice(each, (0, first, 0), (sequences, number, choices))
            for each in (self.experts, self.weights, self.places)
        )
        own = ops.expand_dims(ops.arange(number, dtype="int32"), 1)
        return plan_choices(ops.where(experts >= 0, own, -1), weights, places, self.mask)

    def by_assignment(self) -> "GroupedPlan":
        """The plan of tokens that were repeated K times, each with one choice of weight 1."""
        num_tokens, top_k = ops.shape(self.experts)
        plan = self._replace(
            experts=ops.reshape(self.experts, (-1, 1)),
            weights=ops.ones_like(ops.reshape(self.weights, (-1, 1))),
        )
        if self.order is None:
            return plan
        choice, token = self.order // num_tokens, self.order % num_tokens
        return plan._replace(order=token * top_k + choice, rows=ops.reshape(self.rows, (-1, 1)))

    def weight_at(self, first: int, last: int) -> Tensor:
        """The sum of a token's weights for the experts `first` to `last` - 1, (T, 1)."""
        inside = (self.experts >= first) & (self.experts < last)
        return ops.sum(ops.where(inside, self.weights, 0.0), axis=1, keepdims=True)

    def served(self) -> Tensor:
        """Which tokens have a row, (T,) bool."""
        if self.places is None:
            return ops.any(self.experts >= 0, axis=1)
        plan = self.sort()
        return plan.sum_rows(ops.ones((plan.num_rows(), 1), "float32"))[:, 0] > 0.5

    @backend.jit_when_eager
    def dropped_fraction(self, counts: Tensor) -> Tensor:
        """Share of the assignments (E,) that have no row, a float32 scalar; 0 without any."""
        assigned = ops.cast(ops.sum(counts), "float32")
        served = ops.cast(ops.sum(self.sizes), "float32")
        return ops.maximum(assigned - served, 0.0) / ops.maximum(assigned, 1.0)


def plan_choices(experts, weights, places, mask):
    """The unsorted plan of choices (B, E, C); `experts` is -1 where a choice is not served."""
    sizes = ops.sum(ops.cast(experts >= 0, "int32"), axis=(0, 2))
    return GroupedPlan(experts, weights, sizes, places, mask)


def tokens_at(places, sequence_length):
    """The tokens at places (B, ...) of their sequences."""
    first = ops.arange(ops.shape(places)[0], dtype="int32") * sequence_length
    return places + ops.reshape(first, (-1, *[1] * (len(places.shape) - 1)))


def row_sums(left, right):
    """(N, 1) float32 sums of the products along the last axis."""
    products = ops.cast(left, "float32") * ops.cast(right, "float32")
    return ops.sum(products, axis=1, keepdims=True)


def plan_routing(routing, has_padding=True):
    """The unsorted plan of a routing, without a limit."""
    num_experts = (routing.logits if routing.counts is None else routing.counts).shape[-1]
    mask = routing.mask if has_padding else None
    return GroupedPlan.of(routing.indices, routing.weights, num_experts, mask)


def complete(routing, mask, is_full):
    """The routing of a router with its plan and its counts, in which padding has no weight.

    `is_full` is True if the mask (T,) of the call has no padding.
    """
    if routing.mask is not mask:  # A user-defined router may not know about all of the padding.
        routing, is_full = _without_padding(routing, mask), False
    if not is_full:
        routing = masked(routing)
    elif isinstance(mask.shape[0], int):
        routing = routing._replace(shares=1.0 / max(mask.shape[0], 1))
    # Planned here, whatever the router returns: nothing is read or written out of range.
    plan = routing.plan or plan_routing(routing, has_padding=not is_full)
    counts = plan.sizes if routing.counts is None else routing.counts
    return counted(routing._replace(plan=plan, counts=counts))


def _without_padding(routing, mask):
    """A routing without counts at padding that its router did not know."""
    extra = count_assignments(routing.indices, routing.mask & ~mask, routing.logits.shape[-1])

    def without_extra(counts):
        return counts if counts is None else counts - ops.cast(extra, counts.dtype)

    return routing._replace(
        mask=routing.mask & mask,
        counts=without_extra(routing.counts),
        load=without_extra(routing.load),
    )


def plan_experts(experts, num_experts):
    """The plan of experts (T, K), -1 for none, with weights of 1."""
    return GroupedPlan.of(experts, ops.ones_like(experts, "float32"), num_experts)
