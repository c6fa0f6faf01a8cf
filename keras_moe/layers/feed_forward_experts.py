"""A bank of feed-forward experts."""

from collections.abc import Callable
from typing import Any

from keras_moe._internal.checks import check_integer
from keras_moe._internal.serialization import register
from keras_moe.layers.stacked_experts import StackedExperts


@register
class FeedForwardExperts(StackedExperts):
    """Experts of the form `activation(x W1 + b1) W2 + b2`.

    The kernels of all experts are stacked: `up_kernel` (E, D, H) and `down_kernel` (E, H, D'),
    `up_bias` (E, H) and `down_bias` (E, D'). Each expert's kernel is initialized by itself.

    Args:
        num_experts: Integer. Number of experts, E.
        hidden_dim: Integer. Hidden width of each expert, H.
        activation: String, function of one tensor, or Keras layer without weights.
        use_bias: Boolean. Whether both projections have a bias.
        output_dim: Integer. Number of output features, D'. None: as many as the inputs have.
        kernel_initializer: Initializer of each expert's kernels.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of the stacked kernels, or None.
        bias_regularizer: Regularizer of the stacked biases, or None.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If `num_experts`, `hidden_dim` or `output_dim` is not a positive integer, or
            `activation` has weights.

    Call arguments:
        tokens: (T, D) float tensor.
        plan: An `ops.GroupedPlan`.

    Input shape:
        (T, D).

    Output shape:
        (T, D'): the weighted sum of each token's expert outputs.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=256)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts)
    >>> layer(keras.random.normal((2, 10, 64))).shape
    (2, 10, 64)

    Reference: Shazeer et al. 2017 (arXiv:1701.06538), section 2.
    """

    settings = ("activation",)

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        activation: str | Callable = "gelu",
        use_bias: bool = True,
        output_dim: int | None = None,
        kernel_initializer: str | Callable = "glorot_uniform",
        bias_initializer: str | Callable = "zeros",
        kernel_regularizer: str | Callable | None = None,
        bias_regularizer: str | Callable | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            num_experts,
            activation,
            use_bias,
            kernel_initializer,
            bias_initializer,
            kernel_regularizer,
            bias_regularizer,
            **kwargs,
        )
        self.hidden_dim = check_integer("hidden_dim", hidden_dim)
        self.output_dim = None if output_dim is None else check_integer("output_dim", output_dim)

    def widths(self, features):
        return {
            "up": (features, self.hidden_dim),
            "down": (self.hidden_dim, self.output_dim or features),
        }

    def network(self, rows, linear):
        return linear("down", self.activation(linear("up", rows)))

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "output_dim": self.output_dim,
        }
