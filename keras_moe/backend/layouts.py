"""Layouts: the rows of all groups in one part or in several.

A layout has `parts`. Each has a `product(rows, kernels, bias=None, transposed=False)` for its rows.
`gather` and `split` return the rows of each part, and `join` is their inverse. The gradient of a
trained tensor (E, ...) starts as `empty(tensor)`, which may be a list of E tensors. Each part adds
its share and returns the total: `gradient(field, left, right, total)`, see `linears.factors`.
"""

from keras import ops

from keras_moe.backend import padded


class AllRows:
    """A layout of one part with all rows, for products whose sizes stay on the device."""

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
            total = self.backend.outer(left, right, self.sizes, trained.dtype, self.platform)
        else:
            number = self.sizes.shape[0]
            right = ops.cast(right, "float32")
            total = ops.segment_sum(right, self._experts(), number + 1)[:number]
        return ops.cast(total, trained.dtype)


class AllTokens:
    """A part in which each expert computes every token, in one batched product."""

    def __init__(self, tokens, num_experts):
        self.tokens, self.num_experts = tokens, num_experts
        self.rows = ops.tile(tokens, (num_experts, 1))

    def product(self, rows, kernels, bias=None, transposed=False):
        if rows is self.rows:  # which need not be copied for each expert
            batch = ops.expand_dims(self.tokens, 0)
        else:
            shape = (self.num_experts, ops.shape(self.tokens)[0], rows.shape[1])
            batch = ops.reshape(rows, shape)
        is_quantized = hasattr(kernels, "floats")
        kernels = kernels.floats(rows.dtype) if is_quantized else ops.cast(kernels, rows.dtype)
        products = ops.matmul(batch, kernels)
        if bias is not None:
            products = products + ops.expand_dims(ops.cast(bias, rows.dtype), 1)
        self.last_products = products  # `torch.export` knows less of what is shaped there and back
        return ops.reshape(products, (-1, products.shape[2]))
