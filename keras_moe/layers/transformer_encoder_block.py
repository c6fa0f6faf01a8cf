"""A Transformer encoder block with any feed-forward layer, dense or sparse."""

import keras
from keras import ops

from keras_moe._internal.serialization import register
from keras_moe._internal.shape_checks import check_inputs_shape
from keras_moe.layers.masks import mask_of
from keras_moe.layers.recomputation import effects_once
from keras_moe.layers.transformer_block import TransformerBlock


@register
class TransformerEncoderBlock(TransformerBlock):
    """Self-attention, then a feed-forward layer, each behind a normalisation and a residual.

    `x = x + dropout(attention(norm(x)))`, then `x = x + dropout(feedforward(norm(x)))`.

    Args:
        num_heads: number of attention heads; must divide the number of features, D.
        feedforward: Keras layer from D to D features, for example a `MixtureOfExperts`, or a
            `keras.Sequential` of dense layers. If its `call` has a `mask` argument it is given the
            mask.
        dropout: rate of dropout on both branches. Attention scores have none: Keras's fused
            attention does without.
        **kwargs: arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If an argument is out of its range, heads do not divide D, or the feed-forward
            layer changes the number of features.

    Call arguments:
        inputs: (batch, length, D) float tensor.
        mask: (batch, length) bool tensor, False for padding. Taken from the inputs, if not given.
        training: whether dropout is applied and router losses are added.
        token_ids: (batch, length) integer tensor for a feed-forward layer that goes by them.

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

    def build(self, inputs_shape):
        check_inputs_shape(inputs_shape)
        self._check_features(inputs_shape)
        self._attention_norm = self._make_norm("attention_norm", inputs_shape)
        self._attention = self._make_attention(
            keras.layers.MultiHeadAttention, "attention", inputs_shape, inputs_shape
        )
        self._build_feed_forward(inputs_shape)

    @effects_once
    def call(self, inputs, mask=None, training=None, token_ids=None):
        mask = mask_of(inputs, mask)
        self._check_call(inputs, mask)
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

    def compute_output_spec(self, inputs, mask=None, training=None, token_ids=None):
        self._check_call(inputs, mask)
        return keras.KerasTensor(inputs.shape, self.compute_dtype)
