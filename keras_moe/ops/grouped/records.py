"""Records of grouped computation: networks, projections, integers in place of kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from keras_moe.backend import backend


class Setting(NamedTuple):
    """Grounds on which an engine is chosen.

    - `platform`: "cpu", "gpu" or "tpu", the one that is compiled for.
    - `static_shapes`: whether all shapes are fixed at compile time, as under XLA.
    - `dtype`: that of the tokens, a string.
    - `widths`: the width of the tokens, then the width that each kernel maps to.
    - `num_experts`: an integer.
    - `num_rows`: an integer, infinite for any large one, or None where it is a symbol.
    - `is_quantized`: whether some kernels are integers.
    - `converts`: whether some kernels have another dtype than the tokens.
    """

    platform: str
    static_shapes: bool
    dtype: str
    widths: tuple
    num_experts: int = 1
    num_rows: float | None = float("inf")
    is_quantized: bool = False
    converts: bool = False


class Quantized(NamedTuple):
    """Kernels of all experts as integers: expert e has `values[e] * scale[e]`.

    - `values`: (E, D, H) int8.
    - `scale`: (E, 1, H) float.
    """

    values: Any
    scale: Any

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype

    def floats(self, part, dtype):
        """`part` of it as floats."""
        return ops.cast(part(self.values), dtype) * ops.cast(part(self.scale), dtype)


class Packed(NamedTuple):
    """Kernels of all experts as integers of 4 bits: `(integer - zero) * scale` of their group.

    - `values`: (E, D, ceil(H / 2)) int8; column 2 j is the lower half of column j.
    - `scale`: (E, G, H) float, one for each group of rows.
    - `zero`: (E, G, H) int8.
    - `group`: (D,) int32, the group of each row.
    """

    values: Any
    scale: Any
    zero: Any
    group: Any

    @property
    def shape(self):
        return (*self.values.shape[:2], self.scale.shape[2])

    @property
    def dtype(self):
        return self.values.dtype

    def floats(self, part, dtype):
        """As floats what `part` takes: some experts, or the first rows of one."""
        return self._join(*self._even_and_odd(part, dtype))

    def multiply(self, rows, part, transposed=False):
        """`rows` times the kernel of the expert that `part` takes, or times its transpose.

        In two products, of even and of odd columns: XLA takes several times as long to join the
        columns first.
        """
        even, odd = self._even_and_odd(part, rows.dtype)
        if not transposed:
            return self._join(ops.matmul(rows, even), ops.matmul(rows, odd))
        of_even = ops.matmul(rows[:, ::2], ops.transpose(even))
        return of_even + ops.matmul(rows[:, 1::2], ops.transpose(odd))

    def _even_and_odd(self, part, dtype):
        """The columns of even and of odd number, as floats."""
        both = part(self.values)
        low = ops.bitwise_xor(ops.bitwise_and(both, _byte(15)), _byte(8)) - _byte(8)
        high = ops.right_shift(both, _byte(4))[..., : self.scale.shape[2] // 2]
        num_rows = ops.shape(both)[-2]
        zero, scale = (ops.cast(part(each), dtype) for each in (self.zero, self.scale))
        return [
            (ops.cast(values, dtype) - self._of_rows(zero[..., first::2], num_rows))
            * self._of_rows(scale[..., first::2], num_rows)
            for first, values in enumerate((low, high))
        ]

    def _join(self, even, odd):
        width = self.scale.shape[2]
        if width % 2:
            odd = ops.pad(odd, [*[(0, 0)] * (len(odd.shape) - 1), (0, 1)])
        joined = ops.stack([even, odd], axis=-1)
        return ops.reshape(joined, (*ops.shape(even)[:-1], -1))[..., :width]

    def _of_rows(self, of_groups, num_rows):
        if self.scale.shape[1] == 1:
            return of_groups
        return ops.take(of_groups, self.group[:num_rows], axis=-2)


QUANTIZED = (Quantized, Packed)


def _byte(number):
    return ops.convert_to_tensor(number, "int8")


def floats(weights, part, dtype):
    """`part` of stacked weights, such as one expert's, in a float dtype."""
    if isinstance(weights, QUANTIZED):
        return weights.floats(part, dtype)
    return ops.cast(part(weights), dtype)


class Kernels:
    """Stored kernels, of which `backend.multiply_groups` takes one at a time.

    - `shape`: (E, D, H).
    - `dtype`: that of the rows.
    - `converts`: whether they are stored in another dtype.
    - `is_packed`: whether they are `Packed`: `multiply` is then faster than a product with `of`.
    - `scale`: (E, 1, H) of the columns, or None. Scaling rows is cheaper than scaling kernels.
    """

    def __init__(self, stored, dtype):
        self.stored, self.dtype, self.shape = stored, dtype, stored.shape
        self.is_packed = isinstance(stored, Packed)
        self.converts = stored.dtype != dtype
        self.scale = stored.scale if isinstance(stored, Quantized) else None

    def of(self, expert, length=None):
        """The kernel (D, H) of an expert, or its first rows, as stored; floats if `Packed`."""
        if self.is_packed:
            return self.stored.floats(lambda stack: _entry(stack, expert)[:length], self.dtype)
        values = self.stored if self.scale is None else self.stored.values
        kernel = _entry(values, expert)
        return kernel if length is None else kernel[:length]

    def multiply(self, rows, expert):
        """The product of rows and the kernel of an expert, if `Packed`."""
        return self.stored.multiply(rows, lambda stack: _entry(stack, expert))


def _entry(stack, expert):
    return stack[expert] if isinstance(expert, int) else backend.entry(stack, expert)


class Network(NamedTuple):
    """The network of every expert, but for its weights. Hashable: equal networks compile once.

    One projection is `x W + b`; two are `act(x W + b) V + c`; three, of which the first is a gate,
    are `(act(min(x G, clip)) * (clipped(x U) + up_shift)) V`.

    - `activation`: function of one tensor, None for one projection.
    - `clip`, `up_shift`: floats, with a gate; None and 0 change nothing.
    - `low_rank_scale`: factor of all corrections of low rank, or None where there are none.
    """

    activation: Callable | None = None
    clip: float | None = None
    up_shift: float = 0.0
    low_rank_scale: float | None = None


class Affine(NamedTuple):
    """A projection of all experts: `x W + b`, or `x W + b + scale (x A) B`.

    - `kernel`: W, a tensor (E, D, H), `Quantized` or `Packed`.
    - `bias`: a tensor (E, H), or None.
    - `low_rank`: the tensors A (E, D, r) and B (E, r, H), beside which the kernel has no gradient,
      or None.
    """

    kernel: Any
    bias: Any = None
    low_rank: Any = None


class Parameters(NamedTuple):
    """All projections by number, and what has a gradient apart from what has none.

    Two lists with a dict for each number: it holds a "bias" where there is one, and the "kernel" in
    one of them. After the projections come all A of low rank, then all B.
    """

    trained: list
    frozen: list

    @classmethod
    def of(cls, projections):
        """The `Parameters` of a list of `Affine`."""
        pairs = [each.low_rank for each in projections if each.low_rank is not None]
        projections = [*projections, *(Affine(factor) for kind in zip(*pairs) for factor in kind)]
        trained: list = []
        frozen: list = []
        for kernel, bias, low_rank in projections:
            is_frozen = low_rank is not None or isinstance(kernel, QUANTIZED)
            trained.append({} if bias is None else {"bias": bias})
            frozen.append({})
            (frozen if is_frozen else trained)[-1]["kernel"] = kernel
        return cls(trained, frozen)

    @property
    def projections(self):
        """A list of `Affine`, by number."""
        return [Affine(**one, **other) for one, other in zip(self.trained, self.frozen)]

    @property
    def num_experts(self):
        return self.projections[0].kernel.shape[0]

    def take(self, part, dtype):
        """`part` of all projections in a float dtype; integers become floats there."""
        return [
            Affine(floats(kernel, part, dtype), None if bias is None else floats(bias, part, dtype))
            for kernel, bias, _ in self.projections
        ]
