"""A Transformer from the pieces of one language to those of another."""

import keras
from keras import ops
from subwords import PADDING

from keras_moe import layers


@keras.saving.register_keras_serializable("keras_moe_examples")
class Translator(keras.Model):
    """Encoder and decoder over one vocabulary, whose embedding also scores the next piece.

    Args:
        vocabulary_size: number of pieces, V.
        features: width, D.
        encoder: list of feed-forward layers, one for each encoder block.
        decoder: list of feed-forward layers, one for each decoder block.
        num_heads: number of attention heads in each block.
        dropout: rate of dropout in each block.

    Call arguments:
        inputs: dict of int32 ids: `source` (B, S), and `target` (B, L), each piece of which the
            model sees when it predicts the next.

    Returns:
        (B, L, V) float32 logits of the next piece.
    """

    def __init__(
        self, vocabulary_size, features, encoder, decoder, num_heads=4, dropout=0.0, **kwargs
    ):
        super().__init__(**kwargs)
        self._config = {
            "vocabulary_size": vocabulary_size,
            "features": features,
            "num_heads": num_heads,
            "dropout": dropout,
        }
        self.embedding = keras.layers.Embedding(
            vocabulary_size,
            features,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=features**-0.5),
            name="pieces",
        )
        self.encoder = [
            layers.TransformerEncoderBlock(num_heads, feedforward, dropout, name=f"encoder_{n}")
            for n, feedforward in enumerate(map(_revive, encoder), start=1)
        ]
        self.decoder = [
            layers.TransformerDecoderBlock(
                num_heads, feedforward, dropout, cross_attention=True, name=f"decoder_{n}"
            )
            for n, feedforward in enumerate(map(_revive, decoder), start=1)
        ]
        self.encoder_norm = keras.layers.LayerNormalization(name="encoder_norm")
        self.decoder_norm = keras.layers.LayerNormalization(name="decoder_norm")

    def build(self, inputs_shape):
        shape = (None, None, self._config["features"])
        self.embedding.build((None, None))
        for layer in (*self.encoder, self.encoder_norm, self.decoder_norm):
            layer.build(shape)
        for block in self.decoder:
            block.build(shape, shape)
        self.built = True

    def call(self, inputs, training=None):
        context, context_mask = self.encode(inputs["source"], training)
        hidden = self._embed(inputs["target"])
        mask = ops.not_equal(inputs["target"], PADDING)
        for block in self.decoder:
            hidden = block(
                hidden, mask=mask, context=context, context_mask=context_mask, training=training
            )
        return self._logits(hidden)

    def encode(self, source, training=None):
        """(B, S, D) contexts of a source (B, S), and (B, S) which of them are no padding."""
        mask = ops.not_equal(source, PADDING)
        hidden = self._embed(source)
        hidden = hidden + sinusoids(source.shape[1] or ops.shape(source)[1], hidden.shape[-1])
        for block in self.encoder:
            hidden = block(hidden, mask=mask, training=training)
        return self.encoder_norm(hidden), mask

    def start(self, source, max_length):
        """What `step` must know before the first piece: nothing of the target, all of the source.

        Returns:
            List of one dict of tensors (B, ...) for each decoder block.
        """
        context, mask = self.encode(source)
        batch_size = ops.shape(source)[0]
        return [block.make_cache(batch_size, max_length, context, mask) for block in self.decoder]

    def step(self, pieces, cache, position):
        """(B, V) logits of what follows the pieces (B,) at this position, and the new cache."""
        hidden = self._embed(ops.expand_dims(pieces, 1))
        caches = []
        for block, remembered in zip(self.decoder, cache):
            hidden, remembered = block(hidden, cache=remembered, position=position)
            caches.append(remembered)
        return ops.squeeze(self._logits(hidden), 1), caches

    def _embed(self, ids):
        return self.embedding(ids) * self._config["features"] ** 0.5

    def _logits(self, hidden):
        kernel = ops.transpose(self.embedding.embeddings)
        return ops.cast(ops.matmul(self.decoder_norm(hidden), kernel), "float32")

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            **self._config,
            "encoder": [serialize(block.feedforward) for block in self.encoder],
            "decoder": [serialize(block.feedforward) for block in self.decoder],
        }


@keras.saving.register_keras_serializable("keras_moe_examples")
class SmoothedCrossentropy(keras.losses.Loss):
    """Mean over the weighted pieces of the cross-entropy with `(1 - s) one-hot + s / V`."""

    def __init__(self, smoothing, name="loss", reduction="mean_with_sample_weight", **kwargs):
        super().__init__(name=name, reduction=reduction, **kwargs)
        self.smoothing = smoothing

    def get_config(self):
        return {**super().get_config(), "smoothing": self.smoothing}

    def call(self, y_true, y_pred):
        log_probs = ops.log_softmax(y_pred)
        pieces = ops.expand_dims(ops.cast(y_true, "int32"), -1)
        right = ops.squeeze(ops.take_along_axis(log_probs, pieces, axis=-1), -1)
        return (self.smoothing - 1) * right - self.smoothing * ops.mean(log_probs, axis=-1)


def sinusoids(length, features):
    """(length, features) of Vaswani et al. 2017, section 3.5, sines in the first half."""
    speeds = 10000.0 ** (-ops.arange(features // 2, dtype="float32") * 2 / features)
    angles = ops.expand_dims(ops.arange(length, dtype="float32"), 1) * speeds
    return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)


def _revive(feedforward):
    if isinstance(feedforward, dict):
        return keras.saving.deserialize_keras_object(feedforward)
    return feedforward
