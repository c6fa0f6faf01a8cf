"""What passes between a grouped operation and its engines."""

from typing import Any, NamedTuple

from keras import ops


class Setting(NamedTuple):
    """What is known before anything is computed.

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
        both = part(self.values)
        low = ops.bitwise_xor(ops.bitwise_and(both, _byte(15)), _byte(8)) - _byte(8)
        values = ops.stack([low, ops.right_shift(both, _byte(4))], axis=-1)
        *leading, num_rows, width = ops.shape(both)
        values = ops.reshape(values, (*leading, num_rows, 2 * width))[..., : self.scale.shape[2]]
        zero, scale = (
            self._of_rows(ops.cast(part(each), dtype), num_rows) for each in (self.zero, self.scale)
        )
        return (ops.cast(values, dtype) - zero) * scale

    def _of_rows(self, of_groups, num_rows):
        if self.scale.shape[1] == 1:
            return of_groups
        return ops.take(of_groups, self.group[:num_rows], axis=-2)


QUANTIZED = (Quantized, Packed)


def floats(weights, part, dtype):
    """`part` of stacked weights, such as one expert's, in a float dtype."""
    if isinstance(weights, QUANTIZED):
        return weights.floats(part, dtype)
    return ops.cast(part(weights), dtype)


class Kernels(NamedTuple):
    """The kernels of a map, which `backend.multiply_groups` takes one expert at a time.

    - `stored`: (E, D, H) tensor, `Quantized` or `Packed`.
    - `dtype`: that of the rows.
    """

    stored: Any
    dtype: Any

    @property
    def shape(self):
        return self.stored.shape

    @property
    def scale(self):
        """(E, 1, H) of the columns, or None. Scaling rows is cheaper than scaling kernels."""
        return self.stored.scale if isinstance(self.stored, Quantized) else None

    @property
    def converts(self):
        """Whether they are stored in another dtype than that of the rows."""
        return self.stored.dtype != self.dtype

    def of(self, expert, length=None):
        """The kernel (D, H) of an expert, or the first rows of it, without its `scale`.

        It has the dtype it is stored in; that of the rows, where it is `Packed`.
        """

        def part(stacked):
            return stacked[expert] if length is None else stacked[expert][:length]

        if isinstance(self.stored, Packed):
            return self.stored.floats(part, self.dtype)
        return part(self.stored if self.scale is None else self.stored.values)


def _byte(number):
    return ops.convert_to_tensor(number, "int8")


class Parameters(NamedTuple):
    """The weights of all experts, in the dtype they are stored in.

    - `kernels`: list of tensors (E, D, H).
    - `biases`: tensors (E, H) of the first kernels, of all or of none.
    - `frozen`: list of kernels that have no gradient, tensors, `Quantized` or `Packed`. They are
      numbered first, so the biases are theirs, where there are any.
    """

    kernels: list
    biases: list
    frozen: Any = ()

    @property
    def all_kernels(self):
        return [*self.frozen, *self.kernels]

    def of(self, number):
        """A kernel and its bias, which may be None."""
        bias = self.biases[number] if number < len(self.biases) else None
        return self.all_kernels[number], bias

    def take(self, part, dtype):
        """`part` of every tensor in a float dtype; quantized kernels become floats there."""
        return Parameters(*([floats(weights, part, dtype) for weights in each] for each in self))

    def factors_of_kernels(self, factors):
        """Of what a step gives for all kernels, that for those that have a gradient."""
        return factors[len(self.frozen) :]


class Gradients(NamedTuple):
    """What a backward pass gives.

    - `rows`: (R', D), R' >= R, of each row; anything behind the last group.
    - `weights`: of the combine weights, float32 in their shape.
    - `parameters`: like the `Parameters` without frozen kernels.
    """

    rows: Any
    weights: Any
    parameters: Parameters
