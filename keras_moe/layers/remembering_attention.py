"""Cached attention in two steps: keys and values of the tokens, then attention to them."""

import keras

from keras_moe.ops.rotary import rotate


class RememberingAttention(keras.layers.MultiHeadAttention):
    """Keras's attention, whose keys and values may be kept from one call to the next.

    Axes: B batch, L length, M cached length, D features, N heads, F features of a head.
    """

    def remember(self, states, positions=None):
        """Keys and values (B, L, N, F) of states (B, L, D), rotated if they have positions (L,)."""
        keys, values = self.key_dense(states), self.value_dense(states)
        return (keys if positions is None else rotate(keys, positions)), values

    def attend(self, states, keys, values, mask, positions=None, training=None):
        """States (B, L, D) look at keys and values (B, M, N, F) where mask (B, L, M) is True."""
        queries = self.query_dense(states)
        if positions is not None:
            queries = rotate(queries, positions)
        seen, _ = self._compute_attention(
            queries, keys, values, attention_mask=mask, training=training
        )
        return self.output_dense(seen)
