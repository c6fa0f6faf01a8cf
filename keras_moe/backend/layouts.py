"""Layouts: the rows of a plan in one part or in several, on which a network runs.

What a network computes begins with empty sums, buffers and gradients, to which each part adds. A
buffer stores one vector for each row. `AllRows` explains all methods; the others have the same.
"""

from typing import Any

from keras import ops

from keras_moe.backend import padded


class Layout:
    """Abstract: `layout(backend, platform, problem)` divides the rows of a problem into parts."""

    # Whether the framework's own gradients are used: `Network.backward` is not called then.
    is_differentiable = False
    plan: Any

    def assignments(self):
        """Return zeros (K * T,), one for each assignment, in the order of their numbers."""
        return ops.zeros_like(ops.reshape(self.plan.experts, (-1,)), dtype="float32")

    def at_assignments(self, values):
        """Return these numbers as (T, K)."""
        return ops.transpose(ops.reshape(values, ops.shape(self.plan.experts)[::-1]))


class AllRows(Layout):
    """One part with all rows, for products whose sizes stay on the device.

    The layout and its part are one object. Sums, buffers and gradients do not begin with anything:
    those of the only part replace them.
    """

    def __init__(self, backend, platform, problem):
        plan = problem.plan
        self.backend, self.platform, self.plan, self.problem = backend, platform, plan, problem
        self.sizes, self.num_rows = plan.sizes, plan.num_rows()

    # The layout

    def for_each_part(self, function, maps, carry):
        """Call `carry = function(part, maps, carry)` for each part, and return the last carry.

        `maps` is {name: `LinearMap`}, of all experts. The function gets them, or those of the part.
        """
        return function(self, maps, carry)

    def sums(self, width):
        """Return sums (T, width), float32, without any row yet."""

    def buffer(self, width):
        """Return a buffer for vectors of a width."""

    def gradient(self, trained):
        """Return a gradient of a tensor (E, ...), without any row yet."""
        return trained  # of which only the dtype is used

    # A part with n rows

    def product(self, rows, kernels, bias=None, transposed=False):
        """Multiply rows (n, D) by the kernels of their experts, or the transposes: (n, H)."""
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
        """Return the number in the plan of each row, (n,) int32. Random draws go by them."""
        return ops.arange(self.num_rows, dtype="int32")

    def gather(self, tokens):
        """Return the token of each row, (n, D), of tokens (T, D)."""
        return self.backend.gather_rows(tokens, self.plan.token_of_row())

    def weights(self):
        """Return the combine weight of each row, (n, 1) float32."""
        return ops.expand_dims(self.plan.weight_of_row(self.problem.weights), 1)

    def read(self, buffer):
        """Return the rows (n, W) of a buffer."""
        return buffer

    def write(self, buffer, rows):
        """Write rows (n, W) into a buffer; return it, as all of the following do."""
        return rows

    def add_to_sums(self, sums, rows, weighted=False):
        """Add rows (n, W) to the sums of their tokens."""
        return self.plan.sum_rows(rows, self.problem.weights if weighted else None)

    def add_to_assignments(self, values, rows):
        """Add rows (n, 1) to the numbers of their assignments."""
        return self.plan.at_assignments(rows[:, 0])

    def add_gradient(self, total, field, left, right):
        """Add to a gradient: `left^T right` of each expert, or of a "bias" the sum of `right`."""
        if field != "bias":
            return self.backend.outer(left, right, self.sizes, total.dtype, self.platform)
        number = self.sizes.shape[0]
        sums = ops.segment_sum(ops.cast(right, "float32"), self._experts(), number + 1)[:number]
        return ops.cast(sums, total.dtype)

    def at_assignments(self, values):
        return values

    def _experts(self):
        """Return the expert of each row, (R,) int32; E past the last group."""
        return padded.interval(self.row_numbers(), ops.cumsum(self.sizes))


class AllTokens:
    """A part in which each expert computes every token, in one batched product."""

    def __init__(self, tokens, num_experts):
        self._tokens, self._num_experts = tokens, num_experts
        self.rows = ops.tile(tokens, (num_experts, 1))

    def product(self, rows, kernels, bias=None):
        # The tokens need not be copied for each expert.
        batch = ops.expand_dims(self._tokens, 0) if rows is self.rows else self.by_expert(rows)
        products = ops.matmul(batch, kernels.floats(rows.dtype))
        if bias is not None:
            products = products + ops.expand_dims(ops.cast(bias, rows.dtype), 1)
        return ops.reshape(products, (-1, products.shape[2]))

    def by_expert(self, rows):
        """Rows (E * T, W) as (E, T, W)."""
        return ops.reshape(rows, (self._num_experts, -1, rows.shape[1]))
