"""Embeds a document as a sequence of phrases, each the weighted sum of its words and bigrams."""

import keras
from keras import ops
from vocabulary import UNKNOWN


class PhraseEmbedding(keras.layers.Layer):
    """(batch, length) word ids to (batch, length / phrase_length, features).

    A document of 400 words is 25 phrases of 16, so attention and experts have a sixteenth of the
    positions. Words and pairs of neighbours, the latter hashed, are weighted as in TF-IDF with
    logarithmic counts, so the mean phrase is a linear map of a TF-IDF vector: the encoder adds to
    what a linear classifier sees. Training leaves out a share of the words, `word_dropout`.

    `salience` (num_words + 2,) holds the weight of each word: assign the inverse document
    frequencies before training.
    """

    # Adam moves every weight by about the learning rate, so this is how much faster than the
    # encoder the embeddings learn. Rare words have few steps to learn in.
    GAIN = 200.0

    def __init__(self, num_words, num_bigrams, features, phrase_length, word_dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.num_words = num_words
        self.num_bigrams = num_bigrams
        self.features = features
        self.phrase_length = phrase_length
        self.word_dropout = word_dropout
        self.seed_generator = keras.random.SeedGenerator()

    def build(self, ids_shape):
        small, rows = keras.initializers.RandomNormal(stddev=1 / self.GAIN), self.num_words + 2
        self.words = self.add_weight((rows, self.features), small, name="words")
        self.bigrams = self.add_weight((self.num_bigrams, self.features), small, name="bigrams")
        self.salience = self.add_weight((rows,), "ones", name="salience")

    def call(self, ids, training=False):
        first, second = ids[:, :-1], ids[:, 1:]
        bigrams = (first * 46337 + second) % self.num_bigrams
        salience = ops.take(self.salience, ids, axis=0)
        word_weights = self._weights(
            _counts(ids, self.num_words + 2), salience, ids > UNKNOWN, training
        )
        bigram_weights = self._weights(
            _counts(bigrams, self.num_bigrams),
            (salience[:, :-1] + salience[:, 1:]) / 2,
            ops.logical_and(first > UNKNOWN, second > UNKNOWN),
            training,
        )
        # The last word begins no bigram.
        bigrams, bigram_weights = (
            ops.pad(each, ((0, 0), (0, 1))) for each in (bigrams, bigram_weights)
        )
        squares = ops.sum(word_weights**2, 1) + ops.sum(bigram_weights**2, 1)
        phrases = self._sums(self.words, ids, word_weights)
        phrases = phrases + self._sums(self.bigrams, bigrams, bigram_weights)
        # The constant keeps the gradient finite for a document without a known word.
        return phrases * ops.reshape(self.GAIN / ops.sqrt(squares + 1e-3), (-1, 1, 1))

    def _weights(self, counts, salience, known, training):
        """Salience times (1 + log n) / n for each of the n times that a term is in its document."""
        if training and self.word_dropout:
            noise = keras.random.uniform(ops.shape(known), seed=self.seed_generator)
            known = ops.logical_and(known, noise > self.word_dropout)
        weights = salience * (1 + ops.log(counts)) / counts
        return ops.where(known, weights, ops.zeros_like(weights))

    def _sums(self, table, ids, weights):
        """(B, phrases, features) weighted sums of the rows of a table."""
        rows = ops.take(table, self._split(ids), axis=0)
        return ops.squeeze(ops.matmul(ops.expand_dims(self._split(weights), 2), rows), 2)

    def _split(self, values):
        """(B, length) to (B, phrases, phrase_length)."""
        return ops.reshape(values, (-1, values.shape[1] // self.phrase_length, self.phrase_length))

    def compute_mask(self, ids, mask=None):
        """True for a phrase that has a word."""
        return ops.any(self._split(ids > 0), axis=2)

    def compute_output_shape(self, ids_shape):
        return ids_shape[0], ids_shape[1] // self.phrase_length, self.features


def _counts(ids, number):
    """How often each id of (B, length) is in its row; all are below `number`."""
    batch_size = ops.shape(ids)[0]
    ids = ids + number * ops.expand_dims(ops.arange(batch_size, dtype="int32"), 1)
    flat = ops.reshape(ids, (-1,))
    ones = ops.ones_like(flat, dtype="float32")
    return ops.take(ops.segment_sum(ones, flat, batch_size * number), ids)
