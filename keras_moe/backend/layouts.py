"""Layouts: how the rows of all groups are computed, in one part or in several.

A layout has `parts`, each with `product(rows, kernels, bias=None, transposed=False)` of its rows.
`gather` and `split` give the rows of each part, `join` is the inverse, and `totals`
collects the gradients of all parts.
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
        if hasattr(kernels, "floats"):  # integers, which kernels of accelerators do not take
            products = padded.product(rows, kernels, self.sizes, transposed)
        else:
            products = self.backend.product(rows, kernels, self.sizes, transposed, self.platform)
        if bias is None:
            return products
        # A spare bias for rows past the last group, which may hold anything.
        bias = ops.pad(bias, ((0, 1), (0, 0)))
        return products + ops.cast(self.backend.gather_rows(bias, self._experts()), rows.dtype)

    def row_numbers(self):
        return ops.arange(self.num_rows, dtype="int32")

    def _experts(self):
        return padded.expert_of_row(self.sizes, self.num_rows)

    def totals(self, trained):
        return _Totals(trained)

    def gradient(self, field, left, right, like):
        if field != "bias":
            total = self.backend.outer(left, right, self.sizes, like.dtype, self.platform)
        else:
            number = self.sizes.shape[0]
            right = ops.cast(right, "float32")
            total = ops.segment_sum(right, self._experts(), number + 1)[:number]
        return ops.cast(total, like.dtype)


class _Totals:
    """The gradients of one part with all rows."""

    def __init__(self, trained):
        self._trained = trained

    def add(self, part, factors):
        self._gradients = {
            name: {
                field: part.gradient(field, *pair, self._trained[name][field])
                for field, pair in of_linear.items()
            }
            for name, of_linear in factors.items()
        }

    def result(self):
        return self._gradients


class AllTokens:
    """Every token once for each expert: equal groups, which are one batched product."""

    def __init__(self, tokens, num_experts):
        self.tokens, self.num_experts = tokens, num_experts
        self.rows = ops.tile(tokens, (num_experts, 1))

    def product(self, rows, kernels, bias=None, transposed=False):
        if rows is self.rows:  # which need not be copied for each expert
            batch = ops.expand_dims(self.tokens, 0)
        else:
            shape = (self.num_experts, ops.shape(self.tokens)[0], rows.shape[1])
            batch = ops.reshape(rows, shape)
        products = ops.matmul(batch, _floats(kernels, rows.dtype))
        if bias is not None:
            products = products + ops.expand_dims(ops.cast(bias, rows.dtype), 1)
        self.last_products = products  # `torch.export` knows less of what is shaped there and back
        return ops.reshape(products, (-1, products.shape[2]))


def _floats(kernels, dtype):
    return kernels.floats(dtype) if hasattr(kernels, "floats") else ops.cast(kernels, dtype)
