"""A router whose choice is not learned: a table of token ids."""

from typing import Any

import numpy as np
from keras import ops

from keras_moe._internal.checks import check_integer
from keras_moe._internal.serialization import register
from keras_moe.ops.routing import Routing
from keras_moe.ops.selection import chosen_experts, mask_invalid
from keras_moe.routers.router import Router


@register
class HashRouter(Router):
    """Each word of the vocabulary has fixed experts, which are drawn at random.

    The K experts of a token have the weight 1 / K. To choose experts by topic or by frequency, call
    `router.table.assign(table)`.

    Args:
        vocabulary_size: Integer. Number of token ids. Any int32 is an id, modulo this.
        top_k: Integer. Experts per token, K, at most E.
        seed: Integer seed of the table (vocabulary_size, K).

    Other arguments, errors, call arguments and returns: as for `Router`, without `indices`;
    `token_ids` are required.

    Example:

    >>> router = keras_moe.routers.HashRouter(num_experts=8, vocabulary_size=1000)
    >>> router(keras.random.normal((32, 64)), token_ids=keras.ops.arange(32)).indices.shape
    (32, 1)

    Reference: Roller et al. 2021, Hash layers (arXiv:2106.04426), section 3.1, random hash.
    """

    default_losses = ()
    serves_tasks = False
    has_fixed_top_k = True

    def __init__(
        self,
        num_experts: int | None = None,
        *,
        vocabulary_size: int,
        top_k: int = 1,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(num_experts, **kwargs)
        self.vocabulary_size = check_integer("vocabulary_size", vocabulary_size)
        self.top_k = check_integer("top_k", top_k)
        self.seed = seed if seed is None else check_integer("seed", seed, minimum=0)
        self.check_num_experts()

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

    def route(self, tokens, mask, training, token_ids=None, **context):
        if token_ids is None:
            raise ValueError("`HashRouter` goes by the ids of tokens. Received: token_ids=None")
        ids = ops.cast(token_ids, "int32") % self.vocabulary_size
        indices = mask_invalid(ops.take(self.table, ids, axis=0), self.num_experts)
        num_tokens, top_k = ops.shape(indices)
        return Routing(
            indices=indices,
            weights=ops.full((num_tokens, top_k), 1 / top_k, "float32"),
            probs=ops.cast(chosen_experts(indices, self.num_experts), "float32") / top_k,
            logits=ops.zeros((num_tokens, self.num_experts), "float32"),
            mask=mask,
        )
