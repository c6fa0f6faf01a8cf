"""A dense gated feed-forward layer, for shared experts."""

import keras

from keras_moe._internal.keras_objects import get_activation
from keras_moe._internal.named_arguments import Saved, check_is_made
from keras_moe._internal.serialization import register
from keras_moe._internal.shape_checks import check_activated, check_inputs_shape
from keras_moe._internal.tensor_checks import check_array, check_float_inputs
from keras_moe._internal.validation import (
    check_computes_in_floats,
    check_flag,
    check_positive_integer,
)


@register
class GatedFeedForward(Saved, keras.layers.Layer):
    """`(activation(x Wg) * (x Wu)) Wd` for all tokens: one expert of `GatedExperts` as a layer.

    It consists of three `Dense` layers, `gate`, `up` and `down`.

    Args:
        hidden_dim: width between the projections, H.
        activation: name or function of one tensor, applied to the gate.
        use_bias: whether the three projections have a bias.
        **kwargs: arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If `hidden_dim` is not a positive integer.

    Call arguments:
        inputs: (..., D) float tensor.

    Returns:
        (..., D).

    Example:

    >>> layer = keras_moe.layers.MixtureOfExperts(
    ...     keras_moe.layers.GatedExperts(num_experts=8, hidden_dim=32),
    ...     shared_expert=keras_moe.layers.GatedFeedForward(hidden_dim=64),
    ... )
    >>> layer(keras.random.normal((2, 10, 16))).shape
    (2, 10, 16)

    Reference: Shazeer 2020 (arXiv:2002.05202), eq. 6.
    """

    _attribute_checks = {
        "hidden_dim": check_positive_integer,
        "activation": get_activation,
        "use_bias": check_flag,
    }
    _fixed_attributes = ("hidden_dim", "activation", "use_bias")

    def __init__(self, hidden_dim, activation="silu", use_bias=False, **kwargs):
        super().__init__(**kwargs)
        check_computes_in_floats(self)
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.use_bias = use_bias
        self.supports_masking = True

    def build(self, inputs_shape):
        check_inputs_shape(inputs_shape)
        features = inputs_shape[-1]
        self.gate = self._dense("gate", self.hidden_dim, features, self.activation)
        self.up = self._dense("up", self.hidden_dim, features)
        self.down = self._dense("down", features, self.hidden_dim)

    def _dense(self, name, units, features, activation=None):
        layer = keras.layers.Dense(
            units, activation, use_bias=self.use_bias, dtype=self.dtype_policy, name=name
        )
        layer.build((None, features))
        return layer

    def __call__(self, inputs, *args, **kwargs):
        check_is_made(self)
        check_array("inputs", inputs)
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs):
        check_float_inputs(inputs)
        gate, up = self.gate(inputs), self.up(inputs)
        check_activated(gate, up)
        return self.down(gate * up)

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def compute_output_shape(self, inputs_shape):
        check_inputs_shape(inputs_shape)
        return tuple(inputs_shape)

    def get_config(self):
        # Keras quantizes the three, and a loaded layer must make them so.
        policy = self.down.dtype_policy if self.built else self.dtype_policy
        return {
            **super().get_config(),
            "dtype": keras.dtype_policies.serialize(policy),
            "hidden_dim": self.hidden_dim,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
        }
