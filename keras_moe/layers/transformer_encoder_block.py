"""A Transformer encoder block with any feed-forward layer, dense or sparse."""

import inspect

import keras
from keras import ops

from keras_moe.serialization import register, resolve
from keras_moe.validation import (
    check_float_inputs,
    check_fraction,
    check_mask,
    check_positive_integer,
)


@register
class TransformerEncoderBlock(keras.layers.Layer):
    """Self-attention, then a feed-forward layer, each behind a normalisation and a residual.

    `x = x + dropout(attention(norm(x)))`, then `x = x + dropout(feedforward(norm(x)))`.

    Args:
        num_heads: number of attention heads; must divide the number of features, D.
        feedforward: Keras layer from D to D features, for example a `MixtureOfExperts`, or a
            `keras.Sequential` of dense layers. If its `call` has a `mask` argument it is given the
            mask.
        dropout: rate of dropout on both branches and on the attention scores.
        **kwargs: arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If an argument is out of its range, heads do not divide D, or the feed-forward
            layer changes the number of features.

    Call arguments:
        inputs: (batch, length, D) float tensor.
        mask: (batch, length) bool tensor, False for padding. Taken from the inputs, if not given.
        training: whether dropout is applied and router losses are added.

    Returns:
        (batch, length, D).

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=128)
    >>> block = keras_moe.layers.TransformerEncoderBlock(
    ...     num_heads=4, feedforward=keras_moe.layers.MixtureOfExperts(experts)
    ... )
    >>> block(keras.random.normal((2, 10, 64))).shape
    (2, 10, 64)

    References: Vaswani et al. 2017 (arXiv:1706.03762); Xiong et al. 2020 (arXiv:2002.04745) for
    the place of the normalisation.
    """

    def __init__(self, num_heads, feedforward, dropout=0.0, **kwargs):
        check_positive_integer("num_heads", num_heads)
        check_fraction("dropout", dropout)
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.feedforward = resolve("feedforward", feedforward, keras.Layer)
        accepted = inspect.signature(self.feedforward.call).parameters
        self._feedforward_arguments = [name for name in ("mask", "training") if name in accepted]
        if "mask" in accepted:
            # It is given the mask, and Keras would warn: it takes a `Sequential` for a layer that
            # cannot have one, whatever is in it.
            self.feedforward.supports_masking = True
        self.dropout = dropout
        self.supports_masking = True

    def build(self, inputs_shape):
        features = inputs_shape[-1]
        if len(inputs_shape) != 3 or features is None or features % self.num_heads:
            raise ValueError(
                "`inputs` must have the shape (batch, length, features), features divisible by "
                f"`num_heads`. Received: inputs.shape={tuple(inputs_shape)}, "
                f"num_heads={self.num_heads}."
            )
        dtype = self.dtype_policy
        self._attention_norm = keras.layers.LayerNormalization(dtype=dtype, name="attention_norm")
        self._attention = keras.layers.MultiHeadAttention(
            self.num_heads,
            features // self.num_heads,
            dropout=self.dropout,
            dtype=dtype,
            name="attention",
        )
        self._feedforward_norm = keras.layers.LayerNormalization(
            dtype=dtype, name="feedforward_norm"
        )
        self._drop = keras.layers.Dropout(self.dropout, dtype=dtype, name="drop")
        self._attention_norm.build(inputs_shape)
        self._attention.build(inputs_shape, inputs_shape)
        self._feedforward_norm.build(inputs_shape)
        if not self.feedforward.built:
            self.feedforward.build(inputs_shape)
        outputs_shape = self.feedforward.compute_output_shape(inputs_shape)
        if outputs_shape[-1] != features:
            raise ValueError(
                "`feedforward` must return as many features as it is given, for the residual. "
                f"Received: {features} features in, {outputs_shape[-1]} out. "
                f"End it with a layer of width {features}."
            )

    def call(self, inputs, mask=None, training=None):
        check_float_inputs(inputs)
        attention_mask = None
        if mask is not None:
            check_mask(mask.shape, inputs.shape)
            mask = ops.cast(mask, "bool")
            # Padding may hold anything; a NaN there would pass through an attention weight of 0.
            inputs = ops.where(ops.expand_dims(mask, -1), inputs, ops.zeros((), inputs.dtype))
            attention_mask = ops.expand_dims(mask, 1)
        normed = self._attention_norm(inputs)
        attended = self._attention(normed, normed, attention_mask=attention_mask, training=training)
        hidden = inputs + self._drop(attended, training=training)
        normed = self._feedforward_norm(hidden)
        return hidden + self._drop(self._feed_forward(normed, mask, training), training=training)

    def _feed_forward(self, inputs, mask, training):
        # Keras hands on masks that hang on tensors, and the sums above take them off.
        arguments = {"mask": mask, "training": training}
        return self.feedforward(
            inputs, **{name: arguments[name] for name in self._feedforward_arguments}
        )

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "feedforward": keras.saving.serialize_keras_object(self.feedforward),
            "dropout": self.dropout,
        }
