"""A Transformer encoder block with any feed-forward layer, dense or sparse."""

import keras
from keras import ops

from keras_moe._internal.serialization import register
from keras_moe._internal.types import Tensor
from keras_moe.layers.recomputation import effects_once
from keras_moe.layers.transformer_block import TransformerBlock


@register
class TransformerEncoderBlock(TransformerBlock):
    """Self-attention, then a feed-forward layer, each with a normalization and a residual.

    `x = x + dropout(attention(norm(x)))`, then `x = x + dropout(feedforward(norm(x)))`.

    Args:
        num_heads: Integer. Number of attention heads; divides the number of features, D.
        feedforward: Keras layer from D to D features, for example a `MixtureOfExperts`, or a
            `keras.Sequential` of dense layers. If its `call` has a `mask` argument it receives the
            mask.
        dropout: Float from 0 to below 1. Rate of dropout on both branches. Attention scores have
            none: Keras's fused attention does without.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If an argument is out of its range, heads do not divide D, or the feed-forward
            layer changes the number of features.

    Call arguments:
        inputs: (batch, length, D) float tensor.
        mask: (batch, length) bool tensor, False for padding. Default: the Keras mask of the inputs.
        training: Boolean. Whether dropout is applied and router losses are added.
        token_ids: (batch, length) integer tensor, for a feed-forward layer that uses them.

    Input shape:
        (batch, length, D).

    Output shape:
        (batch, length, D).

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=128)
    >>> block = keras_moe.layers.TransformerEncoderBlock(
    ...     num_heads=4, feedforward=keras_moe.layers.MixtureOfExperts(experts)
    ... )
    >>> block(keras.random.normal((2, 10, 64))).shape
    (2, 10, 64)

    References: Vaswani et al. 2017 (arXiv:1706.03762); Xiong et al. 2020 (arXiv:2002.04745) for
    the place of the normalization.
    """

    def build(self, inputs_shape):
        self._attention_norm = self._build_norm("attention_norm", inputs_shape)
        self._attention = self._build_attention(
            keras.layers.MultiHeadAttention, "attention", inputs_shape, inputs_shape
        )
        self._build_feed_forward(inputs_shape)

    @effects_once
    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        inputs, mask = self._without_padding(inputs, mask)
        normed = self._attention_norm(inputs)
        attended = self._attention(
            normed,
            normed,
            attention_mask=None if mask is None else ops.expand_dims(mask, 1),
            training=training,
        )
        hidden = self._add(inputs, attended, training)
        return self._add_feed_forward(hidden, mask, training, token_ids)
