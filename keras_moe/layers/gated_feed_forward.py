"""A dense gated feed-forward layer."""

from collections.abc import Callable
from typing import Any

import keras

from keras_moe._internal.checks import check_integer
from keras_moe._internal.serialization import register
from keras_moe._internal.types import Tensor


@register
class GatedFeedForward(keras.layers.Layer):
    """`(activation(x Wg) * (x Wu)) Wd` for all tokens: one expert of `GatedExperts` as a layer.

    It consists of three `Dense` layers, `gate`, `up` and `down`, and serves as a shared expert.

    Args:
        hidden_dim: Integer. Width between the projections, H.
        activation: String, function of one tensor, or Keras layer. Applied to the gate.
        use_bias: Boolean. Whether the three projections have a bias.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If `hidden_dim` is not a positive integer.

    Call arguments:
        inputs: (batch, ..., D) float tensor.

    Input shape:
        (batch, ..., D).

    Output shape:
        (batch, ..., D).

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

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def get_config(self):
        # Keras quantizes the three layers, and a loaded layer must be built with their policy.
        policy = self.down.dtype_policy if self.built else self.dtype_policy
        return {
            **super().get_config(),
            "dtype": keras.dtype_policies.serialize(policy),
            "hidden_dim": self.hidden_dim,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
        }
