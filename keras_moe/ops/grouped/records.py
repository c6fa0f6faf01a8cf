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

    - `values`: (E, ceil(D / 2), H) int8; a byte has the lower four bits of the integer in the first
      half of the rows, and above them the integer in the second half.
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
        num_experts, _, width = self.values.shape
        return num_experts, self.group.shape[0], width

    @property
    def dtype(self):
        return self.values.dtype

    def floats(self, part, dtype, length=None):
        """What `part` takes of them as floats, some experts or one; of one D rows or the first."""
        return ops.concatenate(self._halves(part, dtype, length), axis=-2)[..., :length, :]

    def multiply(self, rows, part, transposed=False):
        """The product of rows and the kernel of the expert that `part` takes."""
        # XLA takes a ninth of the time that it takes to join the halves for one product.
        halves = self._halves(part, rows.dtype)
        if transposed:
            parts = [ops.matmul(rows, ops.transpose(half)) for half in halves]
            return ops.concatenate(parts, axis=1)
        middle = self.values.shape[1]
        return ops.matmul(rows[:, :middle], halves[0]) + ops.matmul(rows[:, middle:], halves[1])

    def _halves(self, part, dtype, length=None):
        """The first and the second half of the rows, of each at most `length`."""
        both, middle = part(self.values), self.values.shape[1]
        groups = self.group[:middle], self.group[middle:]
        low = ops.bitwise_xor(ops.bitwise_and(both, _byte(15)), _byte(8)) - _byte(8)
        high = ops.right_shift(both, _byte(4))[..., : groups[1].shape[0], :]

        def of_rows(of_groups, group):
            of_groups = ops.cast(part(of_groups), dtype)
            one_group = self.scale.shape[1] == 1
            return of_groups if one_group else ops.take(of_groups, group[:length], axis=-2)

        return [
            (ops.cast(half[..., :length, :], dtype) - of_rows(self.zero, group))
            * of_rows(self.scale, group)
            for half, group in zip((low, high), groups)
        ]


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
    - `is_packed`: whether they are stored as `Packed`, which has products of its own.
    - `scale`: (E, 1, H) of the columns, or None. Scaling rows is cheaper than scaling kernels.
    """

    def __init__(self, stored, dtype):
        self.stored, self.dtype, self.shape = stored, dtype, stored.shape
        self.is_packed = isinstance(stored, Packed)
        self.converts = stored.dtype != dtype
        self.scale = stored.scale if isinstance(stored, Quantized) else None

    def of(self, expert, length=None):
        """The kernel (D, H) of an expert, or its first row, as stored; floats if `Packed`.

        `length`: D or 1, which may be a tensor.
        """
        if self.is_packed:
            return self.stored.floats(lambda stacked: stacked[expert], self.dtype, length)
        values = self.stored if self.scale is None else self.stored.values
        kernel = values[expert] if isinstance(expert, int) else backend.entry(values, expert)
        return kernel if length is None else kernel[:length]


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
