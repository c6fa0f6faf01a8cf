"""Experts on many devices

Splits the experts of a layer over all devices of a machine with JAX, trains, and loads the saved
model on one device. It is written for any number of GPUs or TPU cores, and was run on virtual
devices of a CPU.

    pip install ".[jax]"

Run it in a clone of keras_moe. Without such devices, try four virtual ones:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/many_devices.py

This took 20 seconds of CPU time. The test error was 0.0098, on four devices and on one.
"""

import math
import os
import pathlib
import tempfile

os.environ["KERAS_BACKEND"] = "jax"  # on the others: docs/training.md

import keras
import numpy as np

from keras_moe import distribution, layers, losses, routers

NUM_TOKENS = 16_384
FEATURES = 16
HIDDEN = 32
NUM_EXPERTS = 8
EPOCHS = 20
BATCH_SIZE = 256

"""
## The devices

They form a grid. Each row has all experts, split over its columns, and all devices share a batch.
The number of experts must be a multiple of the number of columns. Set the distribution before you
build the model. Nothing else changes.
"""

num_devices = len(keras.distribution.list_devices())
columns = math.gcd(num_devices, NUM_EXPERTS)
keras.distribution.set_distribution(distribution.expert_parallel(experts=columns))
print(f"{num_devices} devices: a grid of {num_devices // columns} x {columns}")

"""
## Data

The data are synthetic and favour experts: tokens lie around eight centres, and around each centre
the target is a different linear function.
"""

rng = np.random.default_rng(0)
centres = rng.normal(size=(8, FEATURES))
maps = rng.normal(size=(8, FEATURES, FEATURES)) / FEATURES**0.5
kinds = rng.integers(8, size=NUM_TOKENS)
x = (centres[kinds] + 0.5 * rng.normal(size=(NUM_TOKENS, FEATURES))).astype("float32")
y = np.einsum("td,tde->te", x, maps[kinds]).astype("float32")
num_train = NUM_TOKENS // 2  # batches of one size, a multiple of the number of devices
train, test = (x[:num_train], y[:num_train]), (x[num_train:], y[num_train:])

"""
## The model

Each device holds its share of the experts' kernels, and whole copies of the few other weights.
"""

keras.utils.set_random_seed(0)
experts = layers.MixtureOfExperts(
    layers.FeedForwardExperts(NUM_EXPERTS, HIDDEN),
    router=routers.TopKRouter(top_k=1),
    router_losses=[losses.LoadBalance(0.1)],
    name="experts",
)
model = keras.Sequential([keras.Input((FEATURES,)), experts, keras.layers.Dense(FEATURES)])
model.compile(keras.optimizers.Adam(3e-3), "mse")
for weight in model.weights:
    shape = tuple(weight.shape)
    if weight.trainable:
        print(f"{weight.path:30} {shape}, on a device {weight.value.sharding.shard_shape(shape)}")

"""
## Training

Tokens are sent to the devices of their experts, and the experts' outputs are sent back. Compare the
error with the variance of the targets, which is the error of predicting their mean.
"""

history = model.fit(*train, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=0).history
print("loss by epoch:", *(f"{loss:.3f}" for loss in history["loss"]))
many = model.evaluate(*test, batch_size=BATCH_SIZE, verbose=0)
print(f"test error on {num_devices} devices: {many:.4f}, variance: {test[1].var():.4f}")

"""
## The same model on one device

A saved model contains whole weights, so it can be loaded on any number of devices.
"""

with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "model.keras")
    model.save(path)
    keras.distribution.set_distribution(None)
    one = keras.saving.load_model(path).evaluate(*test, batch_size=BATCH_SIZE, verbose=0)
print(f"test error on one device: {one:.4f}")
