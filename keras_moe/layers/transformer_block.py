"""Transformer blocks with any feed-forward layer: the base class and the encoder block."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.base_layer import Recomputable
from keras_moe._internal.checks import check_integer, check_number, check_tensors
from keras_moe._internal.keras_internals import get_keras_mask
from keras_moe._internal.serialization import register, resolve
from keras_moe.layers.sublayers import (
    build_and_measure,
    call_part,
    freeze_parts,
    warn_of_lost_mask,
)
from keras_moe.ops import draws


class TransformerBlock(Recomputable):
    """Abstract: branches `x = x + dropout(branch(norm(x)))`; the last is any feed-forward layer."""

    def __init__(
        self,
        num_heads: int,
        feedforward: keras.Layer | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_heads = check_integer("num_heads", num_heads)
        # It has a default so that this message shows where it is missing.
        example = "`MixtureOfExperts(num_experts=8, hidden_dim=256)`"
        self.feedforward = resolve("feedforward", feedforward, keras.Layer, example=example)
        self.dropout = check_number("dropout", dropout, below=1)
        self._seed_generator = draws.seeded_generator() if self.dropout else None
        freeze_parts(self)
        self.supports_masking = True

    def _build_norm(self, name, inputs_shape):
        norm = keras.layers.LayerNormalization(dtype=self.dtype_policy, name=name)
        norm.build(inputs_shape)
        return norm

    def _build_attention(self, cls, name, inputs_shape, source_shape):
        features = inputs_shape[-1]
        if features is None or features % self.num_heads:
            rule = "`inputs` must have a number of features divisible by `num_heads`"
            received = f"inputs.shape={tuple(inputs_shape)}, num_heads={self.num_heads}"
            raise ValueError(f"{rule}. Received: {received}")
        attention = cls(
            self.num_heads, int(features) // self.num_heads, dtype=self.dtype_policy, name=name
        )
        attention.build(inputs_shape, source_shape)
        return attention

    def _build_feed_forward(self, inputs_shape):
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={-1: inputs_shape[-1]})
        self._feedforward_norm = self._build_norm("feedforward_norm", inputs_shape)
        outputs_shape = build_and_measure("feedforward", self.feedforward, inputs_shape)
        if outputs_shape[-1] != inputs_shape[-1]:
            rule = "`feedforward` must return as many features as it receives, for the residual"
            received = f"{inputs_shape[-1]} features in, {outputs_shape[-1]} out"
            raise ValueError(f"{rule}. Received: {received}")

    def _without_padding(self, inputs, mask, name="mask"):
        """Return inputs (B, L, D), zero at padding, and their mask, bool, by default of Keras."""
        mask = get_keras_mask(inputs) if mask is None else mask
        given = {"inputs": (inputs, "BLD", "float")}
        if mask is not None:
            mask = ops.convert_to_tensor(mask)
            given[name] = (mask, "BL", "mask")
        check_tensors(None, **given)
        if mask is None:
            return inputs, None
        mask = ops.cast(mask, "bool")
        # Padding may hold anything; a NaN there would pass through an attention weight of 0.
        return ops.where(ops.expand_dims(mask, -1), inputs, ops.zeros((), inputs.dtype)), mask

    def _add(self, hidden, branch, training):
        if training and self.dropout:
            branch = draws.dropout(branch, self.dropout, self._seed_generator)
        # The feed-forward layer may compute in another dtype.
        return hidden + ops.cast(branch, hidden.dtype)

    def _add_feed_forward(self, hidden, mask, training, token_ids):
        # Keras passes on the masks of tensors, but a sum has none.
        arguments = {"mask": mask, "training": training, "token_ids": token_ids}
        inputs = self._feedforward_norm(hidden)
        branch = call_part("feedforward", self.feedforward, inputs, hidden.shape, **arguments)
        return self._add(hidden, branch, training)

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def compute_output_spec(self, inputs, mask=None, *args, **kwargs):
        if mask is None:
            warn_of_lost_mask(self, inputs)
        return super().compute_output_spec(inputs, mask, *args, **kwargs)


@register
class TransformerEncoderBlock(TransformerBlock):
    """`x = x + dropout(attention(norm(x)))`, then `x = x + dropout(feedforward(norm(x)))`.

    Args:
        num_heads: Integer. Number of attention heads; divides the number of features, D.
        feedforward: Keras layer from D to D features, such as a `MixtureOfExperts`. It receives the
            mask if its `call` has a `mask` argument.
        dropout: Float from 0 to below 1. Rate of dropout on each branch.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If an argument is out of its range, the heads do not divide D, or the
            feed-forward layer changes the number of features.

    Call arguments:
        inputs: (batch, length, D) float tensor, with positions, as the block adds none.
        mask: (batch, length) bool tensor, False for padding. Default: the Keras mask of the inputs.
        training: Boolean. Whether dropout is applied and router losses are added.
        token_ids: (batch, length) integer tensor, for a feed-forward layer that uses them.

    Output shape:
        (batch, length, D), as the inputs.

    Example:

    >>> feedforward = keras_moe.layers.MixtureOfExperts(num_experts=4, hidden_dim=128)
    >>> block = keras_moe.layers.TransformerEncoderBlock(num_heads=4, feedforward=feedforward)
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
