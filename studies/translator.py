"""A Transformer from the pieces of one language to those of another, and its first embedding."""

import keras
import numpy as np
import scipy.sparse
from keras import ops
from sklearn.decomposition import TruncatedSVD
from subwords import PADDING

from keras_moe import layers


class Translator(keras.Model):
    """Encoder and decoder over one vocabulary, whose embedding also scores the next piece.

    `encoder` and `decoder` are lists of feed-forward layers, one for each block. Inputs are int32
    ids: `source` (B, S), and `target` (B, L), each piece of which the model sees when it predicts
    the next. Outputs are (B, L, V) float32 logits.
    """

    def __init__(self, vocabulary_size, features, encoder, decoder, num_heads=4, dropout=0.0):
        super().__init__()
        self.features = features
        self.embedding = keras.layers.Embedding(
            vocabulary_size,
            features,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=features**-0.5),
        )
        self.encoder = [
            layers.TransformerEncoderBlock(num_heads, feedforward, dropout, name=f"encoder_{n}")
            for n, feedforward in enumerate(encoder, start=1)
        ]
        self.decoder = [
            layers.TransformerDecoderBlock(
                num_heads, feedforward, dropout, cross_attention=True, name=f"decoder_{n}"
            )
            for n, feedforward in enumerate(decoder, start=1)
        ]
        self.encoder_norm = keras.layers.LayerNormalization()
        self.decoder_norm = keras.layers.LayerNormalization()
        shape = (None, None, features)
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
        """A cache of all of the source and nothing of the target, for each decoder block."""
        context, mask = self.encode(source)
        batch_size = ops.shape(source)[0]
        return [block.make_cache(batch_size, max_length, context, mask) for block in self.decoder]

    def step(self, pieces, cache, position):
        """(B, V) logits of what follows the pieces (B,) at this position, and the new cache."""
        hidden = self._embed(ops.expand_dims(pieces, 1))
        caches = []
        for block, block_cache in zip(self.decoder, cache):
            hidden, block_cache = block(hidden, cache=block_cache, position=position)
            caches.append(block_cache)
        return ops.squeeze(self._logits(hidden), 1), caches

    def _embed(self, ids):
        return self.embedding(ids) * self.features**0.5

    def _logits(self, hidden):
        kernel = ops.transpose(self.embedding.embeddings)
        return ops.cast(ops.matmul(self.decoder_norm(hidden), kernel), "float32")


class SmoothedCrossentropy(keras.losses.Loss):
    """Mean over the weighted pieces of the cross-entropy with `(1 - s) one-hot + s / V`."""

    def __init__(self, smoothing):
        super().__init__(reduction="mean_with_sample_weight")
        self.smoothing = smoothing

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


def bilingual_embedding(batches, vocabulary_size, features):
    """(V, D) float32 rows of length 1, in which a word is near its translation.

    Latent semantic indexing across languages (Dumais et al. 1997): the leading singular vectors of
    how often each piece is in each pair, weighted by TF-IDF. A piece without a pair is random.
    """
    rows = [np.concatenate(pair) for pair in zip(batches.sources, batches.targets)]
    pair_of_each = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    pieces = np.concatenate(rows)
    counts = scipy.sparse.coo_array(
        (np.ones(len(pieces), "float32"), (pieces, pair_of_each)),
        shape=(vocabulary_size, len(rows)),
    ).tocsr()
    pairs_with_piece = np.diff(counts.indptr)
    counts.data = 1 + np.log(counts.data)
    rarity = np.log((1 + len(rows)) / (1 + pairs_with_piece)) + 0.1
    weighted = scipy.sparse.diags_array(rarity) @ counts
    lengths = np.sqrt((weighted * weighted).sum(axis=0))
    weighted = weighted @ scipy.sparse.diags_array(1 / lengths)
    generator = np.random.default_rng(0)
    embedding = generator.normal(size=(vocabulary_size, features))
    known = pairs_with_piece > 0
    embedding[known] = TruncatedSVD(features, random_state=0).fit_transform(weighted)[known]
    norms = np.linalg.norm(embedding, axis=1, keepdims=True)
    return (embedding / np.maximum(norms, 1e-6)).astype("float32")
