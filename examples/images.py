"""Images: a small vision mixture of experts

Classifies handwritten digits with a Vision Transformer in which one block has a mixture of experts,
as V-MoE does (Riquelme et al. 2021, arXiv:2106.05974), then shows which expert gets which digit.

    pip install ".[jax]" scikit-learn

Run it in a clone of keras_moe; with `.[tensorflow]` or `.[torch]`, set `KERAS_BACKEND` to that
name. The images, 1,797 of 8 by 8 pixels, come with scikit-learn. A run on PyTorch, 30 seconds of
CPU time, reached a test accuracy of 98.3%.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_moe import callbacks, inspection, layers, losses, routers

NUM_IMAGES = 1_797
PATCH = 2
FEATURES = 48
HIDDEN = 96
NUM_EXPERTS = 8
EPOCHS = 40
BATCH_SIZE = 64

"""
## Images to patches

An image is cut into 4 by 4 patches of 2 by 2 pixels. Patches are the tokens of a Vision
Transformer, as words are of a language model.
"""

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.images))[:NUM_IMAGES]
images = (digits.images[order] / 16).astype("float32")
side = images.shape[1] // PATCH
patches = images.reshape(-1, side, PATCH, side, PATCH).swapaxes(2, 3)
patches = patches.reshape(len(images), side * side, PATCH * PATCH)
num_test = len(images) // 5
num_train = (len(images) - num_test) // BATCH_SIZE * BATCH_SIZE  # batches of one size
x_train, y_train = patches[:num_train], digits.target[order][:num_train]
x_test, y_test = patches[-num_test:], digits.target[order][-num_test:]

"""
## The model

Two encoder blocks. The first has a dense feed-forward layer, the second a mixture of experts. Its
router follows V-MoE: noise in training makes experts with similar scores take turns, and two losses
balance the importance and the load of the experts. As in the paper, an expert has a capacity. It
processes at most 1.25 times its equal share of the patches of a batch. Other patches bypass it.
"""


class Positions(keras.layers.Layer):
    """Adds a learned vector to each patch that says where it is."""

    def build(self, inputs_shape):
        self.vectors = self.add_weight(name="vectors", shape=inputs_shape[1:])

    def call(self, inputs):
        return inputs + self.vectors


experts = layers.MixtureOfExperts(
    layers.FeedForwardExperts(NUM_EXPERTS, HIDDEN),
    router=routers.VMoERouter(top_k=2),
    router_losses=[losses.ImportanceVariation(0.005), losses.LoadVariation(0.005)],
    capacity_factor=1.25,
    name="experts",
)
dense = keras.Sequential(
    [keras.layers.Dense(2 * HIDDEN, activation="gelu"), keras.layers.Dense(FEATURES)]
)
inputs = keras.Input(x_train.shape[1:])
hidden = Positions()(keras.layers.Dense(FEATURES)(inputs))
for feedforward in (dense, experts):
    hidden = layers.TransformerEncoderBlock(4, feedforward, dropout=0.1)(hidden)
hidden = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(hidden))
model = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(hidden))
rate = keras.optimizers.schedules.CosineDecay(3e-3, EPOCHS * num_train // BATCH_SIZE)
model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])

"""
## Training

The logs of the last epoch show the load of the experts and how many patches were over capacity.
"""

history = model.fit(
    x_train,
    y_train,
    batch_size=BATCH_SIZE,
    epochs=EPOCHS,
    callbacks=[callbacks.ExpertMonitor()],
    verbose=0,
).history
for name, values in history.items():
    print(f"{name:40} {values[0]:8.4f} -> {values[-1]:8.4f}")
_, accuracy = model.evaluate(x_test, y_test, batch_size=num_test, verbose=0)
print(f"test accuracy: {accuracy:.1%}")

"""
## Which digits go to which expert

`record_routings` returns the routers' decisions. Each row of the table is a digit, each column an
expert. The number is the percentage of the digit's patches that go to the expert as first or second
choice. The router sees a patch after attention, so it may know the digit as well as the pixels.
"""

(routing,) = inspection.record_routings(model, [x_test])["experts"]
chosen = routing.indices.reshape(num_test, -1)
for digit in range(10):
    counts = np.bincount(chosen[y_test == digit].reshape(-1), minlength=NUM_EXPERTS)
    print(digit, *(f"{100 * share:4.0f}" for share in counts / max(counts.sum(), 1)))
