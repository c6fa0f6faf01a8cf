"""Attention in two steps, so that keys and values can be cached, and rotary positions.

Axes: B batch, L length, M cached length, D features, N heads, F features of a head.
"""

import keras
from keras import ops


class CachedAttention(keras.layers.MultiHeadAttention):
    """Keras's attention, whose keys and values may be kept from one call to the next."""

    def keys_and_values(self, states, positions=None):
        """(B, L, N, F) each, of states (B, L, D); keys are rotated if there are positions (L,)."""
        keys, values = self.key_dense(states), self.value_dense(states)
        return (keys if positions is None else rotate(keys, positions)), values

    def attend(self, states, keys, values, mask, positions=None, training=None):
        """States (B, L, D) attend to keys and values (B, M, N, F) where mask (B, L, M) is True."""
        queries = self.query_dense(states)
        if positions is not None:
            queries = rotate(queries, positions)
        attended, _ = self._compute_attention(
            queries, keys, values, attention_mask=mask, training=training
        )
        return self.output_dense(attended)


def rotate(features, positions):
    """Turn pairs of features by angles that grow with the position.

    Feature i and feature i + F/2 are a pair, turned by `position * 10000 ** (-2 i / F)`. The dot
    product of two rotated vectors depends on the difference of their positions alone.

    Args:
        features: (B, L, N, F) float tensor, F even.
        positions: (L,) int tensor.

    Returns:
        (B, L, N, F) of the dtype of `features`; the angles are computed in float32.

    Reference: Su et al. 2021 (arXiv:2104.09864), eq. 34, with the pairs in halves.
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

    Args:
        position: Integer tensor. The position of the first token of this pass.
        mask: (B, L) bool tensor of this pass, False for padding.
        length: Integer. Tokens that new caches have room for.
        caches: List of caches of an earlier pass. None: new ones.
    """

    current: "Decoding | None" = None

    def __init__(self, position, mask, length=None, caches=None):
        self.position, self.mask, self.length = position, mask, length
        self._earlier = None if caches is None else list(caches)
        self.caches: list = []

    def __enter__(self):
        Decoding.current = self
        return self

    def __exit__(self, *error):
        Decoding.current = None

    def cache_of(self, block, inputs):
        """The cache of a block that is called: of the earlier pass, or an empty one."""
        if block.cross_attention:
            raise ValueError(
                "`generate` takes decoder blocks without `cross_attention`: with a context, write "
                "a loop with `make_cache`"
            )
        if self._earlier is None:
            return block.make_cache(ops.shape(inputs)[0], self.length)
        return self._earlier[len(self.caches)]
