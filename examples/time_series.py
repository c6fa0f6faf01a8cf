"""Time series: who is speaking?

Each utterance is a series of 7 to 29 frames of 12 numbers. An encoder block contains a mixture,
whose router sends each time step to its experts. Padding goes to none. The program then shows which
expert gets which speaker.

    pip install ".[jax]" && pip install --no-deps aeon==1.6.0

Run it in a clone of keras_moe; with `.[tensorflow]` or `.[torch]`, set `KERAS_BACKEND` to that
name. Only aeon's data file is read: Japanese vowels of nine speakers (Kudo, Toyama and Shimbo
1999). A run on JAX, 25 seconds of CPU time, reached a test accuracy of 98.1%; most experts get
mainly two or three speakers.
"""

import importlib.metadata
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np

from keras_moe import callbacks, inspection, layers

LENGTH = 29
NUM_SPEAKERS = 9
FEATURES = 48
HIDDEN = 96
NUM_EXPERTS = 8
EPOCHS = 60
BATCH_SIZE = 30

"""
## The data

A line has 12 series, with a colon between them, and the number of the speaker. Series are padded
to one length with zeros. Frames are centred and scaled: a router needs inputs whose mean is near
zero.
"""


def read(split):
    path = f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{split}.ts"
    file = importlib.metadata.distribution("aeon").locate_file(path)
    lines = file.read_text(encoding="utf-8").splitlines()
    series, speakers = [], []
    for line in (line for line in lines if line and line[0] not in "#@"):
        *numbers, speaker = line.split(":")
        series.append(np.array([each.split(",") for each in numbers], "float32").T)
        speakers.append(int(speaker) - 1)
    return series, np.array(speakers)


(train, y_train), (test, y_test) = read("TRAIN"), read("TEST")
frames = np.concatenate(train)
mean, deviation = frames.mean(axis=0), frames.std(axis=0)


def padded(series):
    values = np.zeros((len(series), LENGTH, frames.shape[1]), "float32")
    is_frame = np.zeros((len(series), LENGTH), bool)
    for number, each in enumerate(series):
        each = each[:LENGTH]
        values[number, : len(each)] = (each - mean) / deviation
        is_frame[number, : len(each)] = True
    return values, is_frame


x_train, x_test = padded(train), padded(test)

"""
## The model

The mask of the frames is an input. Attention, the mixture and the mean over time all ignore
padding.
"""

values = keras.Input((LENGTH, frames.shape[1]))
is_frame = keras.Input((LENGTH,), dtype="bool")
experts = layers.FeedForwardExperts(NUM_EXPERTS, HIDDEN)
mixture = layers.MixtureOfExperts(experts, name="experts")
block = layers.TransformerEncoderBlock(4, mixture, dropout=0.2)
smooth = keras.layers.Conv1D(FEATURES, 3, padding="same")(values)  # a frame and its neighbours
hidden = block(smooth, mask=is_frame)
hidden = keras.layers.LayerNormalization()(hidden)
hidden = keras.layers.GlobalAveragePooling1D()(hidden, mask=is_frame)
outputs = keras.layers.Dense(NUM_SPEAKERS, activation="softmax")(hidden)
model = keras.Model([values, is_frame], outputs)
model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])

"""
## Training

`ExpertMonitor` adds the load of the experts to the logs, and `ExpertHealth` warns if one is not
used.
"""

history = model.fit(
    x_train,
    y_train,
    batch_size=BATCH_SIZE,
    epochs=EPOCHS,
    callbacks=[callbacks.ExpertMonitor(), callbacks.ExpertHealth()],
    verbose=0,
).history
for name, course in history.items():
    print(f"{name:20} {course[0]:8.4f} -> {course[-1]:8.4f}")
_, accuracy = model.evaluate(x_test, y_test, batch_size=BATCH_SIZE, verbose=0)
print(f"test accuracy: {accuracy:.1%}")

"""
## Which speaker goes to which expert

The table shows the percentage of each speaker's frames that goes to each expert, as first or second
choice.
"""

(routing,) = inspection.record_routings(model, [x_test])["experts"]
_, is_test_frame = x_test
chosen = np.reshape(routing.indices, (*is_test_frame.shape, -1))
for speaker in range(NUM_SPEAKERS):
    own = chosen[is_test_frame & (y_test == speaker)[:, None]]
    counts = np.bincount(own.reshape(-1), minlength=NUM_EXPERTS)
    print(f"speaker {speaker + 1}", *(f"{100 * n / max(counts.sum(), 1):4.0f}" for n in counts))
