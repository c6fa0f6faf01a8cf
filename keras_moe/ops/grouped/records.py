"""What passes between a grouped operation and its engines."""

from typing import Any, NamedTuple


class Setting(NamedTuple):
    """What is known before anything is computed.

    - `platform`: "cpu", "gpu" or "tpu", the one that is compiled for.
    - `static_shapes`: whether all shapes are fixed at compile time, as under XLA.
    - `dtype`: that of the tokens, a string.
    - `widths`: the width of the tokens, then the width that each kernel maps to.
    - `knows_num_rows`: whether the number of rows is an integer, and not a symbol.
    """

    platform: str
    static_shapes: bool
    dtype: str
    widths: tuple
    knows_num_rows: bool = True


class Parameters(NamedTuple):
    """The weights of all experts, in the dtype they are stored in.

    - `kernels`: list of tensors (E, D, H).
    - `biases`: as many tensors (E, H), or none.
    """

    kernels: list
    biases: list

    def of(self, number):
        """A kernel and its bias, which may be None."""
        return self.kernels[number], self.biases[number] if self.biases else None


class RowGradients(NamedTuple):
    """What a backward pass gives.

    - `rows`: (R', D), R' >= R, of each row; anything behind the last group.
    - `weights`: (R',) float32, of the weight of each row.
    - `parameters`: like the `Parameters`.
    """

    rows: Any
    weights: Any
    parameters: Parameters
