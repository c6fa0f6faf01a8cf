"""Routing by token, decided before training."""

import numpy as np
from keras import ops

from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_positive_integer, check_seed
from keras_moe.ops import make_routing
from keras_moe.ops.selection import chosen_experts, existing
from keras_moe.routers.router import Router

_MOST_IDS = 2**31 - 1


def _check_vocabulary_size(name, value):
    value = check_positive_integer(name, value)
    if value > _MOST_IDS:
        raise ValueError(
            f"`{name}` must fit into int32, as token ids do. Received: {name}={value}. Pass at "
            f"most {_MOST_IDS}."
        )
    return value


@register
class HashRouter(Router):
    """Each word of the vocabulary has its experts, drawn at random and never changed.

    Nothing is learned, so nothing collapses. The K experts of a token have the weight 1 / K. To
    choose experts in another way, by topic or by frequency, call `router.table.assign(table)`.

    Args:
        num_experts: number of experts, E.
        vocabulary_size: number of token ids. Any integer is an id, modulo this: larger ones start
            again from 0, -1 is the last. Beyond int32 the last 32 bits count.
        top_k: experts per token, K, from 1 to E.
        seed: integer seed of the table (vocabulary_size, K).
        **kwargs: `name` and the other arguments of a Keras layer.

    Raises:
        ValueError: If an argument is out of its range, or `token_ids` are missing in a call.

    Call arguments:
        tokens: (T, D) float tensor.
        mask: (T,) bool tensor, False for padding, or None.
        token_ids: (T,) integer tensor.

    Returns:
        An `ops.Routing`.

    Example:

    >>> router = keras_moe.routers.HashRouter(num_experts=8, vocabulary_size=1000)
    >>> ids = keras.ops.arange(32)
    >>> router(keras.random.normal((32, 64)), token_ids=ids).indices.shape
    (32, 1)

    Reference: Roller et al. 2021, Hash layers (arXiv:2106.04426), section 3.1, random hash.
    """

    default_losses = ()

    _attribute_checks = {
        "top_k": check_positive_integer,
        "vocabulary_size": _check_vocabulary_size,
        "seed": check_seed,
    }
    _fixed_attributes = ("top_k", "vocabulary_size", "seed")

    def __init__(self, num_experts=None, vocabulary_size=None, top_k=1, seed=0, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.vocabulary_size = vocabulary_size
        self.top_k = top_k
        self.seed = seed

    def build(self, tokens_shape):
        self.table = self.add_weight(
            name="table",
            shape=(self.vocabulary_size, self.top_k),
            initializer=self._draw_table,
            dtype="int32",
            trainable=False,
        )

    def _draw_table(self, shape, dtype=None):
        draws = np.random.default_rng(self.seed).random((shape[0], self.num_experts))
        return ops.convert_to_tensor(np.argsort(draws, axis=1)[:, : shape[1]], dtype)

    def compute_output_spec(self, tokens, mask=None, training=None, token_ids=None, **known):
        _check_has_ids(token_ids)
        return super().compute_output_spec(tokens, mask, training, token_ids=token_ids, **known)

    def route(self, tokens, mask, training, token_ids=None):
        _check_has_ids(token_ids)
        ids = ops.cast(ops.reshape(token_ids, (-1,)), "int32") % self.vocabulary_size
        indices = existing(ops.take(self.table, ids, axis=0), self.num_experts)
        return fixed_routing(indices, mask, self.num_experts)

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "top_k": self.top_k,
            "seed": self.seed,
        }


def _check_has_ids(token_ids):
    if token_ids is None:
        raise ValueError(
            "`HashRouter` goes by the ids of the tokens. Received: token_ids=None. Pass "
            "`token_ids` where the layer or block around it is called."
        )


def fixed_routing(indices, mask, num_experts):
    """A routing to given experts (T, K) with equal weights; nothing is learned."""
    num_tokens, top_k = ops.shape(indices)
    mask = ops.ones((num_tokens,), "bool") if mask is None else mask
    chosen = chosen_experts(indices, num_experts)
    return make_routing(
        indices=indices,
        weights=ops.zeros((num_tokens, top_k), "float32") + 1.0 / top_k,
        probs=ops.cast(chosen, "float32") / top_k,
        logits=ops.zeros((num_tokens, num_experts), "float32"),
        mask=mask,
    )
