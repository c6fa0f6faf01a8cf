"""A Transformer decoder block with any feed-forward layer, and a cache to decode with.

Axes: B batch, L length, M cached length, D features, N heads, F features of a head.
"""

import operator
import threading
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_tensors
from keras_moe._internal.serialization import register
from keras_moe.layers.mixture_of_experts import MixtureOfExperts
from keras_moe.layers.transformer_block import TransformerBlock

_of_thread = threading.local()  # Its `decoding` is the context that a thread is in.


@register
class TransformerDecoderBlock(TransformerBlock):
    """Causal self-attention, cross-attention if wanted, then a feed-forward layer.

    Each is a branch `x = x + dropout(branch(norm(x)))`. A token can see later ones only through the
    feed-forward layer. A warning names a router or a capacity that allows this.

    To decode token by token, call `make_cache` once and pass `cache` and `position`. The cache is a
    dict of tensors (batch, ...) of fixed shapes, fit for `ops.while_loop`.

    Args:
        cross_attention: Boolean. Whether the block attends to a `context` as well, such as the
            outputs of an encoder.
        rotary: Boolean. Whether self-attention has rotary positions, else the inputs contain them.

    Raises:
        ValueError: If D / heads is odd with rotary positions, or `context`, `cache` and `position`
            do not fit each other.

    Call arguments:
        inputs: (batch, length, D) float tensor.
        context: (batch, context length, C) float tensor, with cross-attention and without cache.
        context_mask: (batch, context length) bool tensor. Default: the Keras mask of the context.
        cache: Dict that `make_cache` or an earlier call returned.
        position: Integer or integer tensor, with a cache: the position of the first input. A tensor
            is not checked: it is moved to the nearest position where the inputs fit.

    Other arguments, errors and call arguments: as for `TransformerEncoderBlock`.

    Output shape:
        (batch, length, D); with a cache also the cache with these tokens in it.

    Example:

    >>> feedforward = keras_moe.layers.MixtureOfExperts(num_experts=4, hidden_dim=128)
    >>> block = keras_moe.layers.TransformerDecoderBlock(num_heads=4, feedforward=feedforward)
    >>> tokens = keras.random.normal((2, 10, 64))
    >>> block(tokens).shape
    (2, 10, 64)
    >>> cache = block.make_cache(batch_size=2, max_length=10)
    >>> outputs, cache = block(tokens[:, :9], cache=cache, position=0)
    >>> outputs, cache = block(tokens[:, 9:], cache=cache, position=9)

    Reference: Su et al. 2021 (arXiv:2104.09864) for rotary positions.
    """

    def __init__(
        self,
        num_heads: int,
        feedforward: keras.Layer | None = None,
        dropout: float = 0.0,
        cross_attention: bool = False,
        rotary: bool = True,
        **kwargs: Any,
    ):
        super().__init__(num_heads, feedforward, dropout, **kwargs)
        self.cross_attention = bool(cross_attention)
        self.rotary = bool(rotary)
        for layer in self.feedforward._flatten_layers():
            if isinstance(layer, MixtureOfExperts):
                for reason in _reasons_not_to_be_causal(layer):
                    warnings.warn(reason, stacklevel=2)

    def build(self, inputs_shape, context_shape=None):
        self._check_context(context_shape)
        self._attention_norm = self._build_norm("attention_norm", inputs_shape)
        shapes = (inputs_shape, inputs_shape)
        self._attention = self._build_attention(CachedAttention, "attention", *shapes)
        if self.rotary and self._attention.key_dim % 2:
            rule = "`rotary=True` turns pairs of features, so each head must have an even number"
            received = f"{inputs_shape[-1]} features, num_heads={self.num_heads}"
            raise ValueError(f"{rule}. Received: {received}")
        if self.cross_attention:
            self._context_norm = self._build_norm("context_norm", inputs_shape)
            self._context_attention = self._build_attention(
                CachedAttention, "context_attention", inputs_shape, context_shape
            )
            self._context_attention.prefix = "context_"
        self._build_feed_forward(inputs_shape)

    def __call__(self, *args, **kwargs):
        # Keras makes a tensor of an array, whose value is not looked at.
        if isinstance(kwargs.get("position"), (np.ndarray, np.generic)):
            kwargs["position"] = operator.index(kwargs["position"])
        return super().__call__(*args, **kwargs)

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        training: bool | None = None,
        cache: dict | None = None,
        position: int | Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> Tensor | tuple:
        decoding = getattr(_of_thread, "decoding", None) if cache is None else None
        if decoding is not None:
            cache, position = decoding.cache_of(self, inputs), decoding.position
            mask = decoding.mask
        self._check_call(inputs, context, context_mask, cache, position)
        inputs, mask = self._without_padding(inputs, mask)
        positions = ops.arange(ops.shape(inputs)[1], dtype="int32")
        if cache is not None:
            if not isinstance(position, int):  # The value is known to the device only.
                last = ops.shape(cache["mask"])[1] - ops.shape(inputs)[1]
                position = ops.clip(ops.cast(position, "int32"), 0, last)
            positions = positions + ops.cast(position, "int32")
        rotated = positions if self.rotary else None
        states = self._attention_norm(inputs)
        seen = self._attention.keys_and_values(states, mask, rotated)
        if cache is None:
            seen.update(self._cache_context(context, context_mask))
        else:
            for name, new in seen.items():
                start = [0, position] + [0] * (len(new.shape) - 2)
                cache = {**cache, name: ops.slice_update(cache[name], start, new)}
            seen = cache
        places = ops.arange(ops.shape(seen["mask"])[1], dtype="int32")
        causal = places <= ops.expand_dims(positions, 1)
        attended = self._attention.attend(states, seen, causal, rotated, training)
        hidden = self._add(inputs, attended, training)
        if self.cross_attention:
            states = self._context_norm(hidden)
            attended = self._context_attention.attend(states, seen, training=training)
            hidden = self._add(hidden, attended, training)
        outputs = self._add_feed_forward(hidden, mask, training, token_ids)
        if decoding is not None:
            decoding.caches.append(seen)
            return outputs
        return outputs if cache is None else (outputs, seen)

    def _check_call(self, inputs, context, context_mask, cache, position):
        """Refuse arguments that would be ignored, and positions that would be moved."""
        if (cache is None) != (position is None):
            rule = "`cache` and `position` must be passed together"
            raise ValueError(f"{rule}. Received: {position=}, cache: {cache is not None}")
        self._check_context(context, context_mask, cache)
        if cache is None:
            return
        if "int" not in str(getattr(position, "dtype", type(position))):
            raise TypeError(f"`position` must be an integer. Received: position={position}")
        (batch_size, room), length = cache["mask"].shape, inputs.shape[1]
        check_tensors({"B": batch_size}, inputs=(inputs, "BLD"))
        known = all(isinstance(size, int) for size in (position, length, room))
        if known and not 0 <= position <= room - length:
            received = f"position={position}, {length} tokens and a cache for {room}"
            raise ValueError(f"The inputs must fit into the cache. Received: {received}")

    def _check_context(self, context, mask=None, cache=None):
        wanted, given = self.cross_attention and cache is None, context is not None
        if given == wanted and (given or mask is None):
            return
        rule = "`context` needs `cross_attention` and no `cache`; `context_mask` a `context`"
        if wanted:
            rule = "A block with `cross_attention` needs its context by name: `context=context`"
        received = f"context: {given}, context_mask: {mask is not None}, cache: {cache is not None}"
        raise ValueError(f"{rule}. Received: {received}")

    def make_cache(
        self,
        batch_size: int,
        max_length: int,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> dict:
        """Return an empty cache for sequences of up to `max_length` tokens.

        Args:
            batch_size: Integer. Number of sequences, B.
            max_length: Integer. Largest number of tokens in the cache, M.
            context: (B, S, C) float tensor, with cross-attention; it is projected here, once.
            context_mask: (B, S) bool tensor, False for padding, or None.

        Returns:
            Dict of tensors: `keys` and `values` (B, M, heads, D / heads), and `mask` (B, M) of the
            tokens seen so far; with cross-attention `context_keys`, `context_values` and
            `context_mask` as well. For beams, gather each along its first axis.
        """
        if not self.built:
            rule = "A block must be built before it makes a cache"
            raise ValueError(f"{rule}. Received: `{self.name}`, not built")
        self._check_context(context, context_mask)
        if context is not None:
            context = ops.convert_to_tensor(context)
            check_tensors({"B": batch_size}, context=(context, "BSC", "float"))
        shape = (batch_size, max_length, self.num_heads, self._attention.key_dim)
        cache = {name: ops.zeros(shape, self.compute_dtype) for name in ("keys", "values")}
        cache["mask"] = ops.zeros(shape[:2], "bool")
        return {**cache, **self._cache_context(context, context_mask)}

    def _cache_context(self, context, mask):
        if not self.cross_attention:
            return {}
        context, mask = self._without_padding(context, mask, "context_mask")
        return self._context_attention.keys_and_values(context, mask)

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
        self._check_call(inputs, context, context_mask, cache, position)
        outputs = super().compute_output_spec(inputs, mask)
        if cache is None:
            return outputs
        return outputs, {k: keras.KerasTensor(v.shape, v.dtype) for k, v in cache.items()}


def _reasons_not_to_be_causal(layer):
    """Ways in which later tokens leak to earlier ones in a mixture, as sentences."""
    leak = "later tokens too, which a decoder must not know: it would train on what it predicts"
    router, capacity = layer.router, layer.capacity
    if not router.causal:
        yield (
            f"{type(router).__name__} chooses the experts of a token by {leak}. "
            "Use a causal router, such as TopKRouter."
        )
    if capacity is not None and capacity.evaluation_factor is not None:
        yield (
            "An `evaluation_factor` of a capacity depends on how many tokens are in a call: a text "
            "that is decoded token by token has other outputs. Leave it out."
        )
    # The first choices of later tokens come before the second ones of earlier tokens.
    if capacity is not None and (capacity.priority != "position" or router.max_top_k > 1):
        yield (
            f"A capacity with priority={capacity.priority!r} and {router.max_top_k} experts per "
            f"token drops tokens for {leak}. Leave `capacity_factor` out, or use the priority "
            "'position' and one expert per token."
        )


class CachedAttention(keras.layers.MultiHeadAttention):
    """Keras's attention, whose keys and values may be cached between calls.

    They are entries of a dict, whose names begin with `prefix`.
    """

    prefix = ""

    def keys_and_values(self, states, mask=None, positions=None):
        """Keys and values (B, M, N, F) of states (B, M, D), and their mask (B, M).

        Keys are rotated if there are positions (M,).
        """
        keys, values = self.key_dense(states), self.value_dense(states)
        if positions is not None:
            keys = rotate(keys, positions)
        if mask is None:
            mask = ops.ones(ops.shape(states)[:2], "bool")
        entries = {"keys": keys, "values": values, "mask": mask}
        return {f"{self.prefix}{name}": entry for name, entry in entries.items()}

    def attend(self, states, entries, visible=None, positions=None, training=None):
        """States (B, L, D) attend to `entries` where `visible` (L, M) is True, or everywhere."""
        keys, values, mask = (entries[f"{self.prefix}{n}"] for n in ("keys", "values", "mask"))
        mask = ops.expand_dims(mask, 1)
        if visible is not None:
            mask = ops.logical_and(mask, visible)
        queries = self.query_dense(states)
        if positions is not None:
            queries = rotate(queries, positions)
        # Keras's `call` would compute the keys and values of all tokens again.
        attended, _ = self._compute_attention(
            queries, keys, values, attention_mask=mask, training=training
        )
        return self.output_dense(attended)


def rotate(features, positions):
    """Turn pairs of features (B, L, N, F) by angles that grow with the positions (L,).

    Feature i and feature i + F/2 are a pair, turned by `position * 10000 ** (-2 i / F)`, in
    float32. The dot product of two rotated vectors depends on the difference of their positions
    alone: Su et al. 2021 (arXiv:2104.09864), eq. 34, with the pairs in halves.
    """
    half = features.shape[-1] // 2
    speeds = 10000.0 ** (-ops.arange(half, dtype="float32") / half)
    angles = ops.expand_dims(ops.cast(positions, "float32"), -1) * speeds
    cosine, sine = (ops.expand_dims(f(angles), 1) for f in (ops.cos, ops.sin))
    first, second = ops.split(ops.cast(features, "float32"), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return ops.cast(ops.concatenate(turned, axis=-1), features.dtype)


class Decoding:
    """A context in which decoder blocks keep their caches, in the order in which they are called.

    A pass has the position of its first token and a mask (B, L). `caches` come from an earlier
    pass; without them, new ones have room for `length` tokens.
    """

    def __init__(self, position, mask, length=None, caches=None):
        self.position, self.mask, self.length = position, mask, length
        self._earlier = None if caches is None else list(caches)
        self.caches: list = []

    def __enter__(self):
        _of_thread.decoding = self
        return self

    def __exit__(self, *error):
        _of_thread.decoding = None

    def cache_of(self, block, inputs):
        """The cache of a block that is called: of the earlier pass, or an empty one."""
        if self._earlier is None:
            return block.make_cache(ops.shape(inputs)[0], self.length)
        return self._earlier[len(self.caches)]
