"""A bank of linear experts."""

from collections.abc import Callable
from typing import Any

from keras_moe._internal.checks import check_integer
from keras_moe._internal.serialization import register
from keras_moe.layers.stacked_experts import StackedExperts


@register
class LinearExperts(StackedExperts):
    """Experts of the form `x W + b`: one kernel each, stacked in `up_kernel` (E, D, D').

    Args:
        num_experts: Integer. Number of experts, E.
        output_dim: Integer. Number of output features, D'.
        use_bias: Boolean. Whether each expert has a bias, `up_bias` (E, D').
        kernel_initializer: Initializer of each expert's kernel.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of the stacked kernels, or None.
        bias_regularizer: Regularizer of the stacked biases, or None.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If `num_experts` or `output_dim` is not a positive integer.

    Call arguments:
        tokens: (T, D) float tensor.
        plan: An `ops.GroupedPlan`.

    Input shape:
        (T, D).

    Output shape:
        (T, D'): the weighted sum of each token's expert outputs.

    Example:

    >>> experts = keras_moe.layers.LinearExperts(num_experts=4, output_dim=8)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts, router="dense")
    >>> layer(keras.random.normal((32, 16))).shape
    (32, 8)

    Reference: Jacobs et al. 1991, "Adaptive mixtures of local experts".
    """

    settings = ()

    def __init__(
        self,
        num_experts: int,
        output_dim: int,
        use_bias: bool = True,
        kernel_initializer: str | Callable = "glorot_uniform",
        bias_initializer: str | Callable = "zeros",
        kernel_regularizer: str | Callable | None = None,
        bias_regularizer: str | Callable | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            num_experts,
            None,
            use_bias,
            kernel_initializer,
            bias_initializer,
            kernel_regularizer,
            bias_regularizer,
            **kwargs,
        )
        self.output_dim = check_integer("output_dim", output_dim)

    def widths(self, features):
        return {"up": (features, self.output_dim)}

    def network(self, rows, linear):
        return linear("up", rows)

    def get_config(self):
        config = {**super().get_config(), "output_dim": self.output_dim}
        del config["activation"]
        return config
