"""Linear maps of all experts: kernels in floats or integers, biases, corrections of low rank.

Axes: E experts, D input features, H output features, r rank.
"""

from typing import Any, NamedTuple

from keras import ops


class Linear(NamedTuple):
    """A linear map of each expert: `x W + b`, or `x W + b + scale (x A) B` with a frozen W.

    Hu et al. 2021 (arXiv:2106.09685), section 4.1.
    """

    kernel: Any  # W (E, D, H), a tensor, an `Int8Kernel` or an `Int4Kernel`
    bias: Any = None  # b (E, H)
    down: Any = None  # A (E, D, r)
    up: Any = None  # B (E, r, H)

    @property
    def is_frozen(self):
        """Whether the kernel has no gradient."""
        return self.down is not None or isinstance(self.kernel, (Int8Kernel, Int4Kernel))

    def entry(self, take):
        """Apply `take` to each tensor (E, ...), for instance to get one expert's entry."""
        return Linear(*(None if each is None else part_of(each, take) for each in self))


class Int8Kernel(NamedTuple):
    """Kernels of all experts, or the kernel of one, as integers times a scale of each column."""

    values: Any  # (E, D, H) int8
    scale: Any  # (E, 1, H) float

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype

    def entry(self, take):
        return Int8Kernel(take(self.values), take(self.scale))

    def floats(self, dtype):
        return ops.cast(self.values, dtype) * ops.cast(self.scale, dtype)

    def multiply(self, rows, transposed=False):
        values, scale = ops.cast(self.values, rows.dtype), ops.cast(self.scale, rows.dtype)
        if transposed:
            return ops.matmul(rows * scale, ops.transpose(values))
        return ops.matmul(rows, values) * scale


class Int4Kernel(NamedTuple):
    """Kernels as integers of 4 bits: `(integer - zero) * scale` of their group of rows."""

    values: Any  # (E, D, ceil(H / 2)) int8; column 2 j is the lower half of column j
    scale: Any  # (E, G, H) float, one for each group of rows
    zero: Any  # (E, G, H) int8
    group: Any  # (D,) int32, the group of each row

    @property
    def shape(self):
        return (*self.values.shape[:-1], self.scale.shape[-1])

    @property
    def dtype(self):
        return self.values.dtype

    def entry(self, take):
        return Int4Kernel(take(self.values), take(self.scale), take(self.zero), self.group)

    def floats(self, dtype):
        return self._join(*self._even_and_odd(dtype))

    def multiply(self, rows, transposed=False):
        # Two products, of even and of odd columns: XLA takes several times as long to join the
        # columns first.
        even, odd = self._even_and_odd(rows.dtype)
        if not transposed:
            return self._join(ops.matmul(rows, even), ops.matmul(rows, odd))
        of_even = ops.matmul(rows[:, ::2], ops.transpose(even))
        return of_even + ops.matmul(rows[:, 1::2], ops.transpose(odd))

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
        return ops.reshape(joined, (*ops.shape(even)[:-1], -1))[..., :width]

    def _at_rows(self, of_groups):
        if self.scale.shape[-2] == 1:
            return of_groups
        return ops.take(of_groups, self.group, axis=-2)


def _byte(number):
    return ops.convert_to_tensor(number, "int8")


def is_integer(kernel):
    return isinstance(kernel, (Int8Kernel, Int4Kernel))


def part_of(weight, take):
    """Apply `take` to a tensor (E, ...), or to each tensor of integer kernels."""
    return weight.entry(take) if is_integer(weight) else take(weight)


def as_floats(weight, dtype):
    return weight.floats(dtype) if is_integer(weight) else ops.cast(weight, dtype)


def multiply(rows, kernel, transposed=False):
    """`rows` times the kernel (D, H) of one expert, or times its transpose."""
    if is_integer(kernel):
        return kernel.multiply(rows, transposed)
    kernel = ops.cast(kernel, rows.dtype)
    return ops.matmul(rows, ops.transpose(kernel) if transposed else kernel)


def apply(linear, rows, part, scale):
    """A linear map of the rows of a `part`, which has their products: see `networks`."""
    output = part.product(rows, linear.kernel, linear.bias)
    if linear.down is not None:
        output = output + scale * part.product(part.product(rows, linear.down), linear.up)
    return output


def pull(linear, gradient, part, scale):
    """The gradient of the rows, from the gradient of the output."""
    of_rows = part.product(gradient, linear.kernel, transposed=True)
    if linear.down is None:
        return of_rows
    low = part.product(scale * gradient, linear.up, transposed=True)
    return of_rows + part.product(low, linear.down, transposed=True)


def factors(linear, rows, gradient, part, scale):
    """The left and right factor of the gradient of each trained field, a dict.

    For each expert, the gradient of a kernel is `left^T right`; of a bias, the sum of `right`.
    """
    found = {"kernel": (rows, gradient), "bias": (rows, gradient)}
    if linear.down is not None:
        found["down"] = (rows, part.product(scale * gradient, linear.up, transposed=True))
        found["up"] = (part.product(rows, linear.down), scale * gradient)
    return {name: found[name] for name in split({"": linear})[0][""]}


def split(maps):
    """Linear maps as what has a gradient and what has none, {name: {field: tensor}} twice."""
    trained, frozen = {}, {}
    for name, linear in maps.items():
        fields = {f: tensor for f, tensor in zip(linear._fields, linear) if tensor is not None}
        frozen[name] = {"kernel": fields.pop("kernel")} if linear.is_frozen else {}
        trained[name] = fields
    return trained, frozen


def join(trained, frozen):
    """Inverse of `split`."""
    return {name: Linear(**trained[name], **frozen[name]) for name in trained}
