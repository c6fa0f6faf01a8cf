"""A bank of gated feed-forward experts."""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.serialization import register
from keras_moe.layers.stacked_experts import StackedExperts


@register
class GatedExperts(StackedExperts):
    """Experts of the form `(activation(x Wg) * (x Wu)) Wd`; "silu" makes it SwiGLU.

    The kernels of all experts are stacked: `gate_kernel` and `up_kernel` (E, D, H) and
    `down_kernel` (E, H, D'); with biases `gate_bias` and `up_bias` (E, H) and `down_bias` (E, D').

    Args:
        num_experts: Integer. Number of experts, E.
        hidden_dim: Integer. Hidden width of each expert, H.
        activation: String, function of one tensor, or Keras layer without weights. Applied to the
            gate.
        use_bias: Boolean. Whether the three projections have a bias.
        clip: Positive float or None. The gate's projection is clipped from above, the up projection
            on both sides.
        up_shift: Float of at least 0, added to the up projection; gpt-oss has 1.
        output_dim: Integer. Number of output features, D'. None: as many as the inputs have.
        kernel_initializer: Initializer of each expert's kernels.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of the stacked kernels, or None.
        bias_regularizer: Regularizer of the stacked biases, or None.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If a number is out of its range, or `activation` has weights.

    Call arguments:
        tokens: (T, D) float tensor.
        plan: An `ops.GroupedPlan`.

    Input shape:
        (T, D).

    Output shape:
        (T, D'): the weighted sum of each token's expert outputs.

    Example:

    >>> experts = keras_moe.layers.GatedExperts(num_experts=8, hidden_dim=256)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts)
    >>> layer(keras.random.normal((2, 10, 64))).shape
    (2, 10, 64)

    References: Shazeer 2020 (arXiv:2002.05202), eq. 6; Jiang et al. 2024 (arXiv:2401.04088);
    OpenAI 2025 (arXiv:2508.10925), section 2, for the limit and the shift.
    """

    settings = ("activation", "clip", "up_shift")

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        activation: str | Callable = "silu",
        use_bias: bool = False,
        clip: float | None = None,
        up_shift: float = 0.0,
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
        self.clip = None if clip is None else check_number("clip", clip, above=0)
        self.up_shift = check_number("up_shift", up_shift)
        self.output_dim = None if output_dim is None else check_integer("output_dim", output_dim)

    def widths(self, features):
        up = (features, self.hidden_dim)
        return {"gate": up, "up": up, "down": (self.hidden_dim, self.output_dim or features)}

    def network(self, rows, linear):
        gate, up = linear("gate", rows), linear("up", rows)
        if self.clip is not None:
            gate, up = ops.minimum(gate, self.clip), ops.clip(up, -self.clip, self.clip)
        if self.up_shift:
            up = up + self.up_shift
        return linear("down", self.activation(gate) * up)

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "clip": self.clip,
            "up_shift": self.up_shift,
            "output_dim": self.output_dim,
        }
