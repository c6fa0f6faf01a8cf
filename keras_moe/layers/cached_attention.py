"""Attention in two steps, so that keys and values can be cached, and rotary positions.

Axes: B batch, L length, M cached length, D features, N heads, F features of a head.
"""

import threading

import keras
from keras import ops

_of_thread = threading.local()


class CachedAttention(keras.layers.MultiHeadAttention):
    """Keras's attention, whose keys and values may be kept from one call to the next.

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

    @staticmethod
    def current() -> "Decoding | None":
        """The context that this thread is in, or None."""
        return getattr(_of_thread, "decoding", None)

    def cache_of(self, block, inputs):
        """The cache of a block that is called: of the earlier pass, or an empty one."""
        if block.cross_attention:
            rule = "`generate` needs blocks without `cross_attention`: with it, use `make_cache`"
            raise ValueError(f"{rule}. Received: `{block.name}` with it")
        if self._earlier is None:
            return block.make_cache(ops.shape(inputs)[0], self.length)
        return self._earlier[len(self.caches)]
