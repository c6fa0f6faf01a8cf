"""Layouts: the rows of all groups in one part or in several.

A layout has one method that computes, `run`: see `Parts.run`. A buffer stores one vector for each
row of the plan; each layout stores it in its own way. `of_assignments` makes one from values of
assignments (T, K), and `at_assignments` is the inverse. Each part has `product(rows, kernels,
bias=None, transposed=False)` of its rows, and, but for `AllTokens`, `row_numbers()`, (n,) int32.
"""

from typing import Any

from keras import ops

from keras_moe.backend import padded


class Parts:
    """Abstract: a list of one or more `parts`, run one after the other; a buffer lists their rows.

    `to_buffer` makes one from rows (R, W), and `to_rows` is the inverse. `gather(tokens)` returns a
    buffer with the token of each row. The gradient of a trained tensor (E, ...) starts as
    `empty(tensor)`. Each part's `gradient(field, left, right, total)` adds its share to the total
    and returns it.
    """

    plan: Any
    parts: Any
    gather: Any
    empty: Any
    to_buffer: Any
    to_rows: Any

    def of_assignments(self, values):
        return self.to_buffer(ops.expand_dims(self.plan.weight_of_row(values), 1))

    def at_assignments(self, buffer):
        return self.plan.at_assignments(self.to_rows(buffer)[:, 0])

    def run(self, function, maps, by_token, by_row, widths, trained, weights=None):
        """Run a function on each part.

        Return float32 sums (T, W) of the rows of each token, a list of buffers, and the gradients
        of `trained`.

        Args:
            function: `function(part, maps, *rows)` returns a list of rows (n, W), of which the
                first are summed and the others saved in buffers, and {(name, field): (left,
                right)}, factors of the gradients of `trained`.
            maps: {name: `LinearMap`} of all experts.
            by_token: tensors (T, D). The function gets the token of each of the part's rows.
            by_row: buffers. The function gets the part's rows.
            widths: W of the rows in the list; None if a buffer has values of assignments.
            trained: {(name, field): tensor}, of the fields of a `LinearMap`.
            weights: (T, K), of the rows in the sums; None: 1.
        """
        totals = {key: self.empty(tensor) for key, tensor in trained.items()}
        all_saved = []

        def summed():
            # Each part's gradients are in place before the next part's are computed.
            for part, *rows in zip(self.parts, *map(self.gather, by_token), *by_row):
                (outputs, *saved), factors = function(part, maps, *rows)
                all_saved.append(saved)
                for (name, field), total in totals.items():
                    totals[name, field] = part.gradient(field, *factors[name, field], total)
                yield outputs

        sums = self.sum_rows(summed(), widths[0], weights)
        return sums, [list(rows) for rows in zip(*all_saved)], totals

    def sum_rows(self, rows_of_parts, width, weights):
        """Return float32 sums (T, width) of the rows of each token, weighted by (T, K) or by 1."""
        return self.plan.sum_rows(self.to_rows(list(rows_of_parts)), weights)


class AllRows(Parts):
    """One part with all rows, for products whose sizes stay on the device."""

    def __init__(self, backend, problem, platform):
        plan = problem.plan
        self.backend, self.platform, self.parts, self.plan = backend, platform, [self], plan
        self.sizes, self.num_rows = plan.sizes, plan.num_rows()
        self.token_of_row = plan.token_of_row()

    def gather(self, tokens):
        return [self.backend.gather_rows(tokens, self.token_of_row)]

    def to_buffer(self, rows):
        return [rows]

    def to_rows(self, buffer):
        return buffer[0]

    def product(self, rows, kernels, bias=None, transposed=False):
        products = self.backend.product(rows, kernels, self.sizes, transposed, self.platform)
        if bias is None:
            return products
        if self.platform == "tpu":  # a product, which XLA fuses with what follows, unlike a gather
            chosen = ops.one_hot(self._experts(), self.sizes.shape[0], dtype=rows.dtype)
            return products + ops.matmul(chosen, ops.cast(bias, rows.dtype))
        # A spare bias for rows past the last group, which may hold anything.
        bias = ops.pad(bias, ((0, 1), (0, 0)))
        return products + ops.cast(self.backend.gather_rows(bias, self._experts()), rows.dtype)

    def row_numbers(self):
        return ops.arange(self.num_rows, dtype="int32")

    def _experts(self):
        """Return the expert of each row, (R,) int32; E past the last group."""
        return padded.interval(self.row_numbers(), ops.cumsum(self.sizes))

    def empty(self, trained):
        return trained

    def gradient(self, field, left, right, trained):
        if field != "bias":
            return self.backend.outer(left, right, self.sizes, trained.dtype, self.platform)
        number = self.sizes.shape[0]
        total = ops.segment_sum(ops.cast(right, "float32"), self._experts(), number + 1)[:number]
        return ops.cast(total, trained.dtype)


class AllTokens:
    """A part in which each expert computes every token, in one batched product."""

    def __init__(self, tokens, num_experts):
        self._tokens, self._num_experts = tokens, num_experts
        self.rows = ops.tile(tokens, (num_experts, 1))
        self._last: Any = (None, None)

    def product(self, rows, kernels, bias=None):
        # The tokens need not be copied for each expert.
        batch = ops.expand_dims(self._tokens, 0) if rows is self.rows else self.by_expert(rows)
        products = ops.matmul(batch, kernels.floats(rows.dtype))
        if bias is not None:
            products = products + ops.expand_dims(ops.cast(bias, rows.dtype), 1)
        self._last = products, ops.reshape(products, (-1, products.shape[2]))
        return self._last[1]

    def by_expert(self, rows):
        """Rows (E * T, W) as (E, T, W)."""
        if rows is self._last[1]:  # `torch.export` knows less of what is shaped there and back.
            return self._last[0]
        return ops.reshape(rows, (self._num_experts, ops.shape(self._tokens)[0], rows.shape[1]))
