"""Banks of feed-forward, gated and linear experts, and one gated expert as a dense layer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.base_layer import BaseLayer
from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.serialization import register
from keras_moe.backend import backend
from keras_moe.layers.stacked_experts import StackedExperts

# The networks of the banks are values: banks with equal networks share compiled programs.


@dataclasses.dataclass(frozen=True)
class FeedForwardNetwork:
    activation: Callable
    dropout: float

    def __call__(self, rows, linear):
        hidden = self.activation(linear("up", rows))
        return linear("down", linear.dropout(hidden, self.dropout))


@dataclasses.dataclass(frozen=True)
class GatedNetwork:
    activation: Callable
    clip: float | None
    up_shift: float
    dropout: float

    def __call__(self, rows, linear):
        gate, up = linear("gate", rows), linear("up", rows)
        if self.clip is not None:
            gate, up = ops.minimum(gate, self.clip), ops.clip(up, -self.clip, self.clip)
        if self.up_shift:
            up = up + self.up_shift
        return linear("down", linear.dropout(self.activation(gate) * up, self.dropout))


def linear_network(rows, linear):
    return linear("up", rows)


@register
class FeedForwardExperts(StackedExperts):
    """Experts of the form `activation(x W1 + b1) W2 + b2`.

    Stacked weights: `up_kernel` (E, D, H), `down_kernel` (E, H, D'), `up_bias` and `down_bias`.

    Args:
        num_experts: Integer. Number of experts, E.
        hidden_dim: Integer. Hidden width of each expert, H.
        activation: String, function of one tensor, or Keras layer without weights.
        use_bias: Boolean. Whether both projections have a bias.
        output_dim: Integer. Number of output features, D'. None: as many as the inputs have.
        dropout: Float from 0 to below 1. Rate of dropout before the last projection, in training.

    Other arguments, errors, call arguments and shapes: as for `StackedExperts`.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=256)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts)
    >>> layer(keras.random.normal((2, 10, 64))).shape
    (2, 10, 64)

    Reference: Shazeer et al. 2017 (arXiv:1701.06538), section 2.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        activation: str | Callable = "gelu",
        use_bias: bool = True,
        output_dim: int | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(num_experts, activation, use_bias, **kwargs)
        self.hidden_dim = check_integer("hidden_dim", hidden_dim)
        self.output_dim = None if output_dim is None else check_integer("output_dim", output_dim)
        self.dropout = check_number("dropout", dropout, below=1)

    def widths(self, features):
        width = self.hidden_dim
        return {"up": (features, width), "down": (width, self.output_dim or features)}

    @property
    def network(self):
        activation = backend.activations.get(self.activation, self.activation)
        return FeedForwardNetwork(activation, self.dropout)


@register
class GatedExperts(FeedForwardExperts):
    """Experts of the form `(activation(x Wg) * (x Wu)) Wd`; "silu" makes it SwiGLU.

    Stacked weights: `gate_kernel` and `up_kernel` (E, D, H), `down_kernel` (E, H, D'), and biases.

    Args:
        activation: As in `FeedForwardExperts`, of the gate.
        use_bias: Boolean. Whether the three projections have a bias.
        clip: Positive float or None. Limit of the gate's projection from above, and of the up
            projection from both sides.
        up_shift: Float of at least 0, added to the up projection; gpt-oss has 1.

    Other arguments, errors, call arguments, shapes and an example: as for `FeedForwardExperts`.

    References: Shazeer 2020 (arXiv:2002.05202), eq. 6; Jiang et al. 2024 (arXiv:2401.04088);
    OpenAI 2025 (arXiv:2508.10925), section 2, for the limit and the shift.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        activation: str | Callable = "silu",
        use_bias: bool = False,
        clip: float | None = None,
        up_shift: float = 0.0,
        output_dim: int | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(
            num_experts, hidden_dim, activation, use_bias, output_dim, dropout, **kwargs
        )
        self.clip = None if clip is None else check_number("clip", clip, above=0)
        self.up_shift = check_number("up_shift", up_shift)

    def widths(self, features):
        widths = super().widths(features)
        return {"gate": widths["up"], **widths}

    @property
    def network(self):
        activation = backend.activations.get(self.activation, self.activation)
        return GatedNetwork(activation, self.clip, self.up_shift, self.dropout)


@register
class LinearExperts(StackedExperts):
    """Experts of the form `x W + b`: one kernel each, stacked in `up_kernel` (E, D, D').

    Args:
        num_experts: Integer. Number of experts, E.
        output_dim: Integer. Number of output features, D'.
        use_bias: Boolean. Whether there is a bias.

    Other arguments, errors, shapes and an example: as for `StackedExperts`, without `activation`.

    Reference: Jacobs et al. 1991, "Adaptive mixtures of local experts".
    """

    fixed_arguments = ("activation",)

    def __init__(self, num_experts: int, output_dim: int, use_bias: bool = True, **kwargs: Any):
        super().__init__(num_experts, activation=None, use_bias=use_bias, **kwargs)
        self.output_dim = check_integer("output_dim", output_dim)

    def widths(self, features):
        return {"up": (features, self.output_dim)}

    @property
    def network(self):
        return linear_network


@register
class GatedFeedForward(BaseLayer):
    """`(activation(x Wg) * (x Wu)) Wd` for all tokens: one expert of `GatedExperts` as a layer.

    It consists of three `Dense` layers, `gate`, `up` and `down`. It can be a shared expert.

    Args:
        hidden_dim: Integer. Hidden width.
        activation: String, function or Keras layer; of the gate.
        use_bias: Boolean. Whether the three layers have a bias.
        **kwargs: Arguments of a Keras layer.

    Raises:
        ValueError: If `hidden_dim` is not positive.

    Call arguments:
        inputs: (batch, ..., D) float tensor.

    Output shape:
        (batch, ..., D), as the inputs.

    Example:

    >>> layer = keras_moe.layers.MixtureOfExperts(
    ...     keras_moe.layers.GatedExperts(num_experts=8, hidden_dim=32),
    ...     shared_expert=keras_moe.layers.GatedFeedForward(hidden_dim=64),
    ... )
    >>> layer(keras.random.normal((2, 10, 16))).shape
    (2, 10, 16)

    Reference: Shazeer 2020 (arXiv:2002.05202), eq. 6.
    """

    def __init__(
        self,
        hidden_dim: int,
        activation: str | Callable = "silu",
        use_bias: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.hidden_dim = check_integer("hidden_dim", hidden_dim)
        self.activation = keras.activations.get(activation)
        self.use_bias = bool(use_bias)
        self.supports_masking = True

    def build(self, inputs_shape):
        features = int(inputs_shape[-1])
        self.gate = self._dense("gate", self.hidden_dim, features, self.activation)
        self.up = self._dense("up", self.hidden_dim, features)
        self.down = self._dense("down", features, self.hidden_dim)

    def _dense(self, name, units, features, activation=None):
        layer = keras.layers.Dense(
            units, activation, use_bias=self.use_bias, dtype=self.dtype_policy, name=name
        )
        layer.build((None, features))
        return layer

    def call(self, inputs: Tensor) -> Tensor:
        return self.down(self.gate(inputs) * self.up(inputs))

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def get_config(self):
        # Keras quantizes the three layers, and a loaded layer must be built with their policy.
        policy = self.down.dtype_policy if self.built else self.dtype_policy
        return {**super().get_config(), "dtype": keras.dtype_policies.serialize(policy)}
