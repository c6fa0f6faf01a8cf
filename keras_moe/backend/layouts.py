"""Layouts: how the rows of all groups are computed, in one part or in several.

A layout has `parts`, each with `product(rows, kernels, bias=None, transposed=False)` of its rows.
`gather` and `split` give the rows of each part, `join` is the inverse. The gradient of a trained
tensor (E, ...) is collected from all parts: it begins as `empty(tensor)`, which may be a list of E,
and each part returns it after its own `gradient(field, left, right, total)`, see `linears.factors`.
"""

from keras import ops

from keras_moe.backend import padded


class AllRows:
    """One part with all rows, for products whose sizes stay on the device."""

    def __init__(self, backend, sizes, num_rows, platform):
        self.backend, self.sizes, self.num_rows, self.platform = backend, sizes, num_rows, platform
        self.parts = [self]

    def gather(self, values, token_of_row):
        return [self.backend.gather_rows(values, token_of_row)]

    def split(self, values):
        return [values]

    def join(self, parts, width, dtype):
        return parts[0]

    def product(self, rows, kernels, bias=None, transposed=False):
        products = self.backend.product(rows, kernels, self.sizes, transposed, self.platform)
        if bias is None:
            return products
        # A spare bias for rows past the last group, which may hold anything.
        bias = ops.pad(bias, ((0, 1), (0, 0)))
        return products + ops.cast(self.backend.gather_rows(bias, self._experts()), rows.dtype)

    def row_numbers(self):
        return ops.arange(self.num_rows, dtype="int32")

    def _experts(self):
        """The expert of each row, (R,) int32; E past the last group."""
        return padded.interval(self.row_numbers(), ops.cumsum(self.sizes))

    def empty(self, trained):
        return trained

    def gradient(self, field, left, right, trained):
        if field != "bias":
            total = self.backend.outer(left, right, self.sizes, trained.dtype, self.platform)
        else:
            number = self.sizes.shape[0]
            right = ops.cast(right, "float32")
            total = ops.segment_sum(right, self._experts(), number + 1)[:number]
        return ops.cast(total, trained.dtype)
