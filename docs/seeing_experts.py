"""Draws the plots of this folder's `seeing_experts.md`, in a few minutes.

    python docs/seeing_experts.py

A small encoder with eight experts in each of two blocks learns to tell newsgroups apart, word by
word. Needs what `pip install ".[examples]"` installs.
"""

import pathlib
import sys

import keras
import numpy as np

FOLDER = pathlib.Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "studies"))

import datasets  # noqa: E402
from vocabulary import Vocabulary, split_words  # noqa: E402

import keras_moe  # noqa: E402
from keras_moe import callbacks, inspection, layers, metrics, visualization  # noqa: E402

LENGTH, FEATURES, EXPERTS, DOCUMENTS, SHOWN, EPOCHS = 48, 64, 8, 4096, 400, 8


def main():
    keras.utils.set_random_seed(0)
    data = datasets.load("twenty_newsgroups")
    vocabulary = Vocabulary.learn(data.train.texts, size=8000, length=LENGTH)
    ids, labels = vocabulary.encode(data.train.texts[:DOCUMENTS]), data.train.labels[:DOCUMENTS]
    shown = vocabulary.encode(data.test.texts[:SHOWN])
    groups = np.array(data.class_names)[data.test.labels[:SHOWN]]
    words = [split_words(text)[:LENGTH] for text in data.test.texts[:SHOWN]]

    model = build_model(len(vocabulary.words) + 2, len(data.class_names))
    monitor = callbacks.ExpertMonitor()
    model.fit(ids, labels, 64, EPOCHS, callbacks=[monitor, callbacks.ExpertHealth()])

    routings = inspection.record_routings(model, [shown])
    figures = {
        "shares_over_time": visualization.shares_over_time(titled(monitor.shares)),
        "experts_by_label": visualization.specialization(titled(routings), groups),
    }
    for name, figure in figures.items():
        figure.savefig(FOLDER / f"{name}.png", dpi=80)
    texts = [word for row in words for word in row + [""] * (LENGTH - len(row))]
    for name, (routing,) in titled(routings).items():
        print(f"The most typical words of each expert, {name}:")
        for expert, typical in enumerate(metrics.typical_words(routing, texts)):
            print(f"{expert}:", *typical)
    path = keras_moe.report(model, shown, groups, words, "report.html")
    print(f"The plots are in {FOLDER}, and a report of the same model is {path}.")


def build_model(num_ids, num_classes):
    ids = keras.Input((LENGTH,), dtype="int32")
    tokens = keras.layers.Embedding(num_ids, FEATURES, mask_zero=True)(ids)
    for name in ("block_1", "block_2"):
        experts = layers.FeedForwardExperts(EXPERTS, 2 * FEATURES)
        tokens = layers.TransformerEncoderBlock(
            4, layers.MixtureOfExperts(experts, name=name), dropout=0.2
        )(tokens)
    pooled = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(tokens))
    model = keras.Model(ids, keras.layers.Dense(num_classes, "softmax")(pooled))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def titled(by_layer):
    return {name.replace("_", " "): found for name, found in by_layer.items()}


if __name__ == "__main__":
    main()
