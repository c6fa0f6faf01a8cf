"""A Transformer decoder block with any feed-forward layer, and a cache to decode with."""

import warnings
from collections.abc import Mapping

import keras
from keras import ops

from keras_moe._internal.serialization import register
from keras_moe._internal.shape_checks import check_inputs_shape
from keras_moe._internal.tensor_checks import check_host_numbers, check_rank, check_size
from keras_moe._internal.validation import check_flag, is_whole
from keras_moe.layers.decoder_checks import (
    as_position,
    check_cache,
    check_context,
    check_has_context,
)
from keras_moe.layers.masks import mask_of
from keras_moe.layers.mixture_of_experts import MixtureOfExperts
from keras_moe.layers.recomputation import effects_once
from keras_moe.layers.remembering_attention import RememberingAttention
from keras_moe.layers.transformer_block import TransformerBlock


@register
class TransformerDecoderBlock(TransformerBlock):
    """Causal self-attention, attention to a context if wanted, then a feed-forward layer.

    Each branch has a normalisation before it and a residual connection around it:
    `x = x + dropout(branch(norm(x)))`. No token sees a later one, except through the feed-forward
    layer: a warning names a router or a capacity that allows it.

    To decode token by token, `make_cache` once and pass `cache` and `position`: what the block
    computed of earlier tokens is then read instead of computed again, with the same outputs if no
    token sees a later one. The cache is a dict of tensors (batch, ...) of fixed shapes, fit for
    `ops.while_loop`.

    Args:
        num_heads: number of attention heads; must divide the number of features, D.
        feedforward: Keras layer from D to D features, for example a `MixtureOfExperts`, or a
            `keras.Sequential` of dense layers. If its `call` has a `mask` argument it is given the
            mask.
        dropout: rate of dropout on all branches. Attention scores have none: Keras's fused
            attention does without.
        cross_attention: whether the block attends to a `context` as well, such as the outputs of
            an encoder.
        rotary: whether self-attention has rotary positions. Otherwise the inputs must hold the
            positions.
        **kwargs: arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If an argument is out of its range, heads do not divide D, D / heads is odd
            with rotary positions, the feed-forward layer changes the number of features, or
            `context`, `cache` and `position` do not fit each other.

    Call arguments:
        inputs: (batch, length, D) float tensor.
        mask: (batch, length) bool tensor, False for padding. Taken from the inputs, if not given.
        context: (batch, context length, C) float tensor, with cross-attention and without cache.
        context_mask: (batch, context length) bool tensor, False for padding. Taken from the
            context, if not given.
        training: whether dropout is applied and router losses are added.
        cache: what `make_cache` or an earlier call returned.
        position: int or int tensor, with cache: the position of the first input. One in a tensor is
            not checked, but moved to the nearest place where the inputs fit.
        token_ids: (batch, L) integer tensor for a feed-forward layer that goes by them.

    Returns:
        (batch, length, D); with a cache also the cache with these tokens in it.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=128)
    >>> block = keras_moe.layers.TransformerDecoderBlock(
    ...     num_heads=4, feedforward=keras_moe.layers.MixtureOfExperts(experts)
    ... )
    >>> tokens = keras.random.normal((2, 10, 64))
    >>> block(tokens).shape
    (2, 10, 64)
    >>> cache = block.make_cache(batch_size=2, max_length=10)
    >>> first, cache = block(tokens[:, :9], cache=cache, position=0)
    >>> last, cache = block(tokens[:, 9:], cache=cache, position=9)
    >>> last.shape
    (2, 1, 64)

    References: Vaswani et al. 2017 (arXiv:1706.03762); Xiong et al. 2020 (arXiv:2002.04745) for
    the place of the normalisation; Su et al. 2021 (arXiv:2104.09864) for rotary positions.
    """

    _attribute_checks = {"cross_attention": check_flag, "rotary": check_flag}
    _fixed_attributes = ("cross_attention", "rotary")

    def __init__(
        self, num_heads, feedforward, dropout=0.0, cross_attention=False, rotary=True, **kwargs
    ):
        super().__init__(num_heads, feedforward, dropout, **kwargs)
        self.cross_attention = cross_attention
        self.rotary = rotary
        self.context_features: int | None = None
        for layer in self.feedforward._flatten_layers():
            if isinstance(layer, MixtureOfExperts):
                for reason in _reasons_not_to_be_causal(layer):
                    warnings.warn(reason, stacklevel=2)

    def __call__(self, *args, **kwargs):
        # Here, because Keras builds the block by the shapes of tensors.
        if kwargs.get("context") is not None:
            check_rank("context", kwargs["context"], ("B", "S", "C"))
        if kwargs.get("position") is not None:
            kwargs["position"] = as_position(kwargs["position"])
        if isinstance(kwargs.get("cache"), Mapping):
            check_host_numbers(**kwargs["cache"])
        return super().__call__(*args, **kwargs)

    def build(self, inputs_shape, context_shape=None):
        check_inputs_shape(inputs_shape)
        self._check_features(inputs_shape)
        check_has_context(self.cross_attention, context_shape is not None)
        if self.rotary and inputs_shape[-1] // self.num_heads % 2:
            raise ValueError(
                "Rotary positions turn pairs of features, so each head must have an even number of "
                f"them. Received: {inputs_shape[-1]} features, num_heads={self.num_heads}. "
                "Change one of them, or pass rotary=False."
            )
        self._attention_norm = self._make_norm("attention_norm", inputs_shape)
        self._attention = self._make_attention(
            RememberingAttention, "attention", inputs_shape, inputs_shape
        )
        if self.cross_attention:
            self.context_features = context_shape[-1]
            self._context_norm = self._make_norm("context_norm", inputs_shape)
            self._context_attention = self._make_attention(
                RememberingAttention, "context_attention", inputs_shape, context_shape
            )
        self._build_feed_forward(inputs_shape)

    @effects_once
    def call(
        self,
        inputs,
        mask=None,
        context=None,
        context_mask=None,
        training=None,
        cache=None,
        position=None,
        token_ids=None,
    ):
        check_cache(self, inputs, context, context_mask, cache, position)
        mask = mask_of(inputs, mask)
        self._check_call(inputs, mask)
        inputs, mask = self._without_padding(inputs, mask)
        positions = ops.arange(ops.shape(inputs)[1], dtype="int32")
        if cache is not None:
            position = _where_there_is_room(cache["keys"], inputs, position)
            positions = positions + ops.cast(position, "int32")
        states = self._attention_norm(inputs)
        memory = self._remember(states, mask, positions)
        if cache is None:
            memory.update(self._remember_context(context, context_mask))
        else:
            memory = {**cache, **{k: _write(cache[k], v, position) for k, v in memory.items()}}

        attended = self._attend(states, memory, positions, training)
        hidden = self._add(inputs, attended, training)
        if self.cross_attention:
            attended = self._attend_to_context(self._context_norm(hidden), memory, training)
            hidden = self._add(hidden, attended, training)
        outputs = self._add_feed_forward(hidden, mask, training, token_ids)
        return outputs if cache is None else (outputs, memory)

    def make_cache(self, batch_size, max_length, context=None, context_mask=None):
        """An empty cache for sequences of up to `max_length` tokens.

        Args:
            batch_size: number of sequences, B.
            max_length: number of tokens that the cache has room for, M.
            context: (B, S, C) float tensor, with cross-attention; it is projected here, once.
            context_mask: (B, S) bool tensor, False for padding, or None.

        Returns:
            Dict of tensors: `keys` and `values` (B, M, heads, D / heads), and `mask` (B, M) of the
            tokens seen so far; with cross-attention `context_keys`, `context_values` and
            `context_mask` as well. For beams, gather each along its first axis.
        """
        if not self.built:
            raise ValueError(
                "A block must know its number of features before it makes a cache. Received: "
                f"block {self.name!r}, which is not built. Call it on inputs, or build it, first."
            )
        check_size("batch_size", batch_size)
        check_context(self, context, context_mask, batch_size)
        check_size("max_length", max_length)
        shape = (batch_size, max_length, self.num_heads, self._attention.key_dim)
        cache = {name: ops.zeros(shape, self.compute_dtype) for name in ("keys", "values")}
        cache["mask"] = ops.zeros(shape[:2], "bool")
        return {**cache, **self._remember_context(context, context_mask)}

    def _remember(self, states, mask, positions):
        keys, values = self._attention.remember(states, positions if self.rotary else None)
        return {"keys": keys, "values": values, "mask": _all_true(mask, states)}

    def _remember_context(self, context, context_mask):
        if not self.cross_attention:
            return {}
        context, mask = self._without_padding(context, mask_of(context, context_mask))
        keys, values = self._context_attention.remember(context)
        return {
            "context_keys": keys,
            "context_values": values,
            "context_mask": _all_true(mask, context),
        }

    def _attend(self, states, memory, positions, training):
        remembered = ops.arange(ops.shape(memory["mask"])[1], dtype="int32")
        causal = remembered <= ops.expand_dims(positions, 1)
        mask = ops.logical_and(causal, ops.expand_dims(memory["mask"], 1))
        positions = positions if self.rotary else None
        return self._attention.attend(
            states, memory["keys"], memory["values"], mask, positions, training
        )

    def _attend_to_context(self, states, memory, training):
        mask = ops.expand_dims(memory["context_mask"], 1)
        return self._context_attention.attend(
            states, memory["context_keys"], memory["context_values"], mask, training=training
        )

    def compute_output_spec(
        self,
        inputs,
        mask=None,
        context=None,
        context_mask=None,
        training=None,
        cache=None,
        position=None,
        token_ids=None,
    ):
        self._check_call(inputs, mask)
        check_cache(self, inputs, context, context_mask, cache, position)
        outputs = keras.KerasTensor(inputs.shape, self.compute_dtype)
        if cache is None:
            return outputs
        return outputs, {k: keras.KerasTensor(v.shape, v.dtype) for k, v in cache.items()}

    def get_config(self):
        return {
            **super().get_config(),
            "cross_attention": self.cross_attention,
            "rotary": self.rotary,
        }


def _reasons_not_to_be_causal(layer):
    """How later tokens leak to earlier ones in a MoE layer, each with a way out."""
    leak = (
        "later tokens too, which a decoder must not know: it would train on what it is to predict"
    )
    router, capacity = layer.router, layer.capacity
    if not router.causal:
        yield (
            f"{type(router).__name__} chooses the experts of a token by {leak}. "
            "Use a causal router, such as TopKRouter."
        )
    if capacity is not None and not _is_causal(capacity, router.max_top_k):
        yield (
            f"A capacity with priority={capacity.priority!r} and {router.max_top_k} experts per "
            f"token drops tokens for {leak}. Leave `capacity_factor` out, or use the priority "
            "'position' and one expert per token."
        )


def _is_causal(capacity, top_k):
    """What a capacity says, which may be one of the user's own."""
    name = f"{type(capacity).__name__}.is_causal(...)"
    return check_flag(name, capacity.is_causal(top_k))


def _all_true(mask, like):
    return ops.ones(ops.shape(like)[:2], "bool") if mask is None else mask


def _write(remembered, new, position):
    """Put `new` (B, L, ...) at `position` of `remembered` (B, M, ...)."""
    return ops.slice_update(remembered, [0, position] + [0] * (len(new.shape) - 2), new)


def _where_there_is_room(remembered, new, position):
    """The place for `new` (B, L, ...) in `remembered` (B, M, ...) that is nearest to a position.

    An integer was checked before; what a tensor holds is known to the device only.
    """
    if is_whole(position):
        return position
    last = ops.shape(remembered)[1] - ops.shape(new)[1]
    return ops.clip(ops.cast(position, "int32"), 0, last)
