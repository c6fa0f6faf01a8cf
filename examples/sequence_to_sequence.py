"""Sequence to sequence: dates in words become numbers

A small encoder and decoder with a mixture of experts, `model.fit`, and greedy decoding: forty
lines to copy for other pairs of texts.

    pip install ".[jax]"

Run it in a clone of keras_moe; with `.[tensorflow]` or `.[torch]`, set `KERAS_BACKEND` to that
name.
"""

import calendar
import datetime
import os
import random

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from keras import ops

from keras_moe import layers

NUM_PAIRS = 20_000
FEATURES = 64
HIDDEN = 64
NUM_EXPERTS = 8
EPOCHS = 5
BATCH_SIZE = 64

"""
## Pairs of texts

Each date from 1601 to 2099 has one of three forms. Replace `pairs` with your own.
"""

ones = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
ones = ["", *ones.split(), "sixteen", "seventeen", "eighteen", "nineteen"]
tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
irregular = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth"}
irregular |= {"nine": "ninth", "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"}


def in_words(number):
    return ones[number] if number < 20 else f"{tens[number // 10 - 2]} {ones[number % 10]}".strip()


def in_a_sentence(date):
    *before, last = in_words(date.day).split()
    day = " ".join([*before, irregular.get(last, f"{last}th")])
    month, rest = calendar.month_name[date.month].lower(), date.year % 100
    year = f"{in_words(date.year // 100)} {'oh ' * (0 < rest < 10)}{in_words(rest) or 'hundred'}"
    weekday = calendar.day_name[date.weekday()].lower()
    forms = (
        f"the {day} of {month} {year}",
        f"{month} {day} {year}",
        f"{weekday} {day} {month} {year}",
    )
    return random.choice(forms)


keras.utils.set_random_seed(0)
first, last = datetime.date(1601, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
dates = map(datetime.date.fromordinal, random.sample(range(first, last), NUM_PAIRS))
pairs = [(in_a_sentence(date), date.isoformat()) for date in dates]

"""
## Texts to integers

Sources are split into words, targets into characters. A target begins with `<` and ends with `>`.
The number 0 is padding.
"""

sources, targets = [source.split() for source, _ in pairs], [f"<{text}>" for _, text in pairs]
words, characters = (["", *sorted(set().union(*texts))] for texts in (sources, targets))


def encode(texts, vocabulary, length):
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    rows = np.zeros((len(texts), length), "int32")
    for row, text in zip(rows, texts):
        row[: len(text)] = [numbers[piece] for piece in text]
    return rows


source_length, target_length = (max(map(len, texts)) for texts in (sources, targets))
x, y = encode(sources, words, source_length), encode(targets, characters, target_length)
held_out = NUM_PAIRS // 20
print(pairs[0])

"""
## The model

The decoder reads the target up to a character, attends to the encoder's outputs, and predicts the
next character. Each character goes to two of the experts.
"""

source = keras.Input((None,), dtype="int32")
target = keras.Input((None,), dtype="int32")
mask = ops.not_equal(source, 0)
positions = ops.cumsum(ops.ones_like(source), axis=1) - 1
hidden = keras.layers.Embedding(len(words), FEATURES)(source)
hidden += keras.layers.Embedding(source_length, FEATURES)(positions)
up = keras.layers.Dense(HIDDEN, activation="gelu")
dense = keras.Sequential([up, keras.layers.Dense(FEATURES)])
hidden = layers.TransformerEncoderBlock(4, dense)(hidden, mask=mask)
context = keras.layers.LayerNormalization()(hidden)

hidden = keras.layers.Embedding(len(characters), FEATURES)(target)
experts = layers.FeedForwardExperts(NUM_EXPERTS, HIDDEN)
moe = layers.MixtureOfExperts(experts, top_k=2)
block = layers.TransformerDecoderBlock(4, moe, cross_attention=True)
hidden = block(
    hidden,
    mask=ops.not_equal(target, 0),
    context=context,
    context_mask=mask,
)
hidden = keras.layers.LayerNormalization()(hidden)
logits = keras.layers.Dense(len(characters))(hidden)

model = keras.Model([source, target], logits)
loss = keras.losses.SparseCategoricalCrossentropy(
    from_logits=True,
    ignore_class=0,
)
model.compile(keras.optimizers.Adam(2e-3), loss)
train = slice(held_out, None)
model.fit(
    [x[train], y[train, :-1]],
    y[train, 1:],
    batch_size=BATCH_SIZE,
    epochs=EPOCHS,
    verbose=2,
)

"""
## Greedy decoding

The model writes the likeliest character, one after another. For each, it reads the whole target
again, which is fast for short texts. `examples/translation.py` uses a cache for longer ones.
"""


def translate(source):
    target = np.zeros((len(source), target_length), "int32")
    target[:, 0] = characters.index("<")
    for position in range(1, target_length):
        scores = model.predict_on_batch([source, target[:, :-1]])
        target[:, position] = scores[:, position - 1].argmax(axis=-1)
    texts = ["".join(characters[n] for n in row) for row in target]
    return [text[1:].partition(">")[0] for text in texts]


found = translate(x[:held_out])
right = np.mean([text == expected for text, (_, expected) in zip(found, pairs)])
print(f"\n{right:.1%} of {held_out} dates that were not in training are right")
for text, (phrase, expected) in zip(found[:5], pairs):
    print(f"{phrase}: {text}", "" if text == expected else f"instead of {expected}")
