"""Linear maps of all experts, and their kernels in floats or integers.

`Kernel` and `Int4Kernel` have the same methods. All of their tensors have an axis of experts first,
until `apply` picks one expert.

Axes: E experts, D input features, H output features, r rank.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe.backend import backend


class LinearMap(NamedTuple):
    """A linear map of each expert, `x W + b`, or with low-rank factors `x W + b + (x A) B`."""

    kernel: Any = None  # W (E, D, H), a `Kernel` or an `Int4Kernel`
    bias: Any = None  # b (E, H), a tensor
    lora_a: Any = None  # A (E, D, r), a tensor, scaled
    lora_b: Any = None  # B (E, r, H), a tensor

    def apply(self, function):
        """Apply a function to each tensor (E, ...), for instance to get one expert's entry."""
        others = [None if tensor is None else function(tensor) for tensor in self[1:]]
        return LinearMap(self.kernel.apply(function), *others)

    def floats(self, dtype):
        """The map with all tensors as floats of a dtype."""
        floats = self.apply(lambda tensor: ops.cast(tensor, dtype))
        return floats._replace(kernel=Kernel(self.kernel.floats(dtype)))

    # On the rows of a part, see `backend.layouts`

    def correction(self, part, rows):
        return part.product(part.product(rows, Kernel(self.lora_a)), Kernel(self.lora_b))

    def row_gradients(self, part, gradients):
        """The gradients of rows from those of their outputs."""
        d_rows = part.product(gradients, self.kernel, transposed=True)
        if self.lora_a is None:
            return d_rows
        d_low = part.product(gradients, Kernel(self.lora_b), transposed=True)
        return d_rows + part.product(d_low, Kernel(self.lora_a), transposed=True)

    def factors(self, part, rows, gradients):
        """{field: (left, right)}: the gradient of a kernel or factor is `left^T right`.

        The gradient of a bias is the sum of `right`.
        """
        factors = dict.fromkeys(("kernel", "bias"), (rows, gradients))
        if self.lora_a is not None:
            d_low = part.product(gradients, Kernel(self.lora_b), transposed=True)
            low = part.product(rows, Kernel(self.lora_a))
            factors |= {"lora_a": (rows, d_low), "lora_b": (low, gradients)}
        return factors


class Kernel(NamedTuple):
    """Kernels as floats, or as integers of 8 bits times a scale of each column."""

    values: Any  # (E, D, H) float or int8
    scale: Any = None  # (E, 1, H) float; None for floats

    @property
    def bits(self):
        """Number of bits of each integer; None for floats."""
        return None if self.scale is None else 8

    @property
    def shape(self):
        return self.values.shape

    def apply(self, function):
        """The kernels, or the one, that a function returns of each tensor (E, ...)."""
        scale = None if self.scale is None else function(self.scale)
        return type(self)(function(self.values), scale)

    def floats(self, dtype):
        """The kernels as a tensor of floats."""
        values = ops.cast(self.values, dtype)
        return values if self.scale is None else values * ops.cast(self.scale, dtype)

    def multiply(self, rows, bias=None, transposed=False):
        """Rows (n, D) times the kernel (D, H) of one expert plus a bias, or times its transpose."""
        values, scale = self
        if scale is not None and transposed:
            rows = rows * ops.cast(scale, rows.dtype)
        product = backend.matmul(rows, values, transposed)
        if scale is not None and not transposed:
            product = product * ops.cast(scale, rows.dtype)
        return product if bias is None else product + bias


class Int4Kernel(NamedTuple):
    """Kernels as integers of 4 bits: `(integer - zero) * scale` of their group of rows."""

    values: Any  # (E, D, ceil(H / 2)) int8; column 2 j is the lower half of column j
    scale: Any  # (E, G, H) float, one for each group of rows
    zero: Any  # (E, G, H) int8
    group: Any  # (E, D) int32, the group of each row; the same for all experts

    @property
    def bits(self):
        return 4

    @property
    def shape(self):
        return (*self.values.shape[:-1], self.scale.shape[-1])

    def apply(self, function):
        return Int4Kernel(*map(function, self))

    def floats(self, dtype):
        return self._join(*self._even_and_odd(dtype))

    def multiply(self, rows, bias=None, transposed=False):
        # Two products, of even and of odd columns: XLA takes several times as long to join the
        # columns first.
        even, odd = self._even_and_odd(rows.dtype)
        if transposed:
            d_even = backend.matmul(rows[:, ::2], even, transposed=True)
            return d_even + backend.matmul(rows[:, 1::2], odd, transposed=True)
        product = self._join(ops.matmul(rows, even), ops.matmul(rows, odd))
        return product if bias is None else product + bias

    def _even_and_odd(self, dtype):
        """The columns of even and of odd number, as floats."""
        both = self.values
        low = ops.bitwise_xor(ops.bitwise_and(both, _byte(15)), _byte(8)) - _byte(8)
        high = ops.right_shift(both, _byte(4))[..., : self.scale.shape[-1] // 2]
        zero, scale = (ops.cast(each, dtype) for each in (self.zero, self.scale))
        return [
            (ops.cast(values, dtype) - self._at_rows(zero[..., first::2]))
            * self._at_rows(scale[..., first::2])
            for first, values in enumerate((low, high))
        ]

    def _join(self, even, odd):
        width = self.scale.shape[-1]
        if width % 2:
            odd = ops.pad(odd, [*[(0, 0)] * (len(odd.shape) - 1), (0, 1)])
        joined = ops.stack([even, odd], axis=-1)
        return ops.reshape(joined, (*ops.shape(even)[:-1], width + width % 2))[..., :width]

    def _at_rows(self, of_groups):
        if self.scale.shape[-2] == 1:
            return of_groups
        group = self.group if len(self.group.shape) == 1 else self.group[0]
        return ops.take(of_groups, group, axis=-2)


def _byte(number):
    return ops.convert_to_tensor(number, "int8")
