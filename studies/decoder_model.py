"""A decoder-only language model, and text that it writes."""

import keras
import numpy as np
from keras import ops

from keras_moe import layers

NUM_HEADS = 4


def build_model(num_tokens, length, features, feedforwards, dropout=0.0):
    """A model from ids (batch, length) to the logits of the next ids, one block a feed-forward."""
    ids = keras.Input((length,), dtype="int32")
    hidden = keras.layers.Embedding(num_tokens, features, name="embedding")(ids)
    for number, feedforward in enumerate(feedforwards):
        hidden = layers.TransformerDecoderBlock(
            NUM_HEADS, feedforward, dropout, name=f"block_{number}"
        )(hidden)
    hidden = keras.layers.LayerNormalization(name="norm")(hidden)
    logits = keras.layers.Dense(num_tokens, dtype="float32", name="logits")(hidden)
    return keras.Model(ids, logits)


class Writer(keras.Model):
    """Goes on with rows of ids, one token after the other, in a compiled loop of fixed shapes.

    Args:
        model: a model of `build_model`.
        temperature: what logits are divided by: below 1 for likelier text.

    Call arguments:
        inputs: three tensors: ids (batch, length) int32 that begin with the text; how many ids of
            each row are text, (batch,) int32; and (batch, length) float32 draws from 0 to 1, one
            for each token that is written.

    Returns:
        (batch, length) int32, with the text in front.
    """

    def __init__(self, model, temperature):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.blocks = [
            layer for layer in model.layers if isinstance(layer, layers.TransformerDecoderBlock)
        ]

    def call(self, inputs):
        ids, given, draws = inputs
        batch_size, length = ids.shape
        caches = [block.make_cache(batch_size, length) for block in self.blocks]

        def write_one(position, ids, caches):
            column = [0, position], [batch_size, 1]
            logits, caches = self._step(ops.slice(ids, *column), caches, position)
            drawn = self._draw(logits[:, 0], _column(draws, position))
            is_given = position + 1 < given
            following = ops.where(is_given, _column(ids, position + 1), drawn)
            ids = ops.slice_update(ids, [0, position + 1], ops.expand_dims(following, 1))
            return position + 1, ids, caches

        state = ops.zeros((), "int32"), ids, caches
        return ops.while_loop(lambda position, *_: position + 1 < length, write_one, state)[1]

    def _step(self, ids, caches, position):
        hidden = self.model.get_layer("embedding")(ids)
        written = []
        for block, cache in zip(self.blocks, caches):
            hidden, cache = block(hidden, cache=cache, position=position)
            written.append(cache)
        return self.model.get_layer("logits")(self.model.get_layer("norm")(hidden)), written

    def _draw(self, logits, draws):
        """The ids at which the cumulated probabilities of (batch, tokens) logits pass the draws."""
        cumulated = ops.cumsum(ops.softmax(logits / self.temperature), axis=-1)
        passed = ops.sum(ops.cast(cumulated < ops.expand_dims(draws, 1), "int32"), axis=-1)
        return ops.minimum(passed, logits.shape[-1] - 1)


def _column(rows, position):
    return ops.squeeze(ops.slice(rows, [0, position], [rows.shape[0], 1]), axis=1)


def write(model, ids, temperature=0.8, seed=0):
    """The ids, with what the model writes behind them until its window is full."""
    length = model.input_shape[1]
    row = np.zeros((1, length), "int32")
    row[0, : len(ids)] = ids
    draws = np.random.default_rng(seed).random((1, length), "float32")
    writer = Writer(model, temperature)
    # PyTorch has no XLA.
    writer.compile(jit_compile=keras.backend.backend() != "torch")
    written = writer.predict_on_batch([row, np.array([len(ids)], "int32"), draws])
    return ops.convert_to_numpy(written)[0]
