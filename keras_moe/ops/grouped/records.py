"""What passes between a grouped operation and its engines."""

from typing import Any, NamedTuple


class Setting(NamedTuple):
    """What is known before anything is computed.

    - `platform`: "cpu", "gpu" or "tpu", the one that is compiled for.
    - `static_shapes`: whether all shapes are fixed at compile time, as under XLA.
    - `dtype`: that of the tokens, a string.
    - `widths`: the width of the tokens, then the width that each kernel maps to.
    - `knows_num_rows`: whether the number of rows is an integer, and not a symbol.
    - `is_quantized`: whether some kernels are integers.
    """

    platform: str
    static_shapes: bool
    dtype: str
    widths: tuple
    knows_num_rows: bool = True
    is_quantized: bool = False


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


class Parameters(NamedTuple):
    """The weights of all experts, in the dtype they are stored in.

    - `kernels`: list of tensors (E, D, H).
    - `biases`: tensors (E, H) of the first kernels, of all or of none.
    - `frozen`: list of kernels that have no gradient, tensors or `Quantized`. They are numbered
      first, so the biases are theirs, where there are any.
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

    def take(self, part):
        """`part` of every tensor, such as one expert's; quantized kernels become floats there."""

        def of_kernel(kernel):
            if isinstance(kernel, Quantized):
                return part(kernel.values) * part(kernel.scale)
            return part(kernel)

        frozen = list(map(of_kernel, self.frozen))
        return Parameters(list(map(of_kernel, self.kernels)), list(map(part, self.biases)), frozen)

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
