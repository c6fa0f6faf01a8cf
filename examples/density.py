"""Densities: a problem with two answers

Learns at which angle to throw a ball so that it lands at a given distance. There are two such
angles, a flat one and a steep one. A model trained with squared error learns the mean of both,
which is always wrong. A mixture of experts that is trained on its likelihood, as the mixtures of
1991 were (Jacobs et al. 1991, doi 10.1162/neco.1991.3.1.79), learns both.

    pip install ".[jax,visualization]"

Run it in a clone of keras_moe; with `tensorflow` or `torch` in place of `jax`, set `KERAS_BACKEND`
to that name. Nothing is downloaded. A run on JAX took 20 seconds of CPU time; balls missed their
targets by 0.003 of the largest distance, with squared error by 0.43.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import matplotlib.pyplot as plt
import numpy as np

from keras_moe import layers, losses, routers

NUM_ROWS = 4_096
NUM_EXPERTS = 4
HIDDEN = 32
EPOCHS = 60
BATCH_SIZE = 64

"""
## The inverse problem

A ball that is thrown at an angle of `a` degrees lands at a distance of `sin(2 a)` times the largest
possible one. From angle to distance there is one answer. From distance to angle there are two, `a`
and `90 - a`. Distances are measured with a little noise.
"""


def distance_of(angles):
    return np.sin(2 * np.radians(angles))


draws = np.random.default_rng(0)
angles = draws.uniform(2, 88, (NUM_ROWS, 1)).astype("float32")
distances = distance_of(angles) + draws.normal(0, 0.01, angles.shape).astype("float32")
x, y = 2 * distances - 1, angles / 45 - 1  # both from -1 to 1

"""
## The models

The experts have two outputs each: the mean of a Gaussian and the logarithm of its standard
deviation. The gate, with one hidden layer, gives the probability of each expert for a distance.
`return_expert_outputs=True` also returns each expert's output before the weighted sum, and
`losses.pack_mixture` packs these and the gate's weights into the single tensor that a Keras loss
takes.

For comparison, a mixture of the same kind with one output is trained with squared error.
"""


def build(output_dim):
    inputs = keras.Input((1,))
    experts = layers.FeedForwardExperts(NUM_EXPERTS, HIDDEN, "tanh", output_dim=output_dim)
    mixture = layers.MixtureOfExperts(experts, routers.DenseRouter(hidden_dim=HIDDEN))
    if output_dim == 1:
        return keras.Model(inputs, mixture(inputs))
    _, routing, outputs = mixture(inputs, return_routing=True, return_expert_outputs=True)
    return keras.Model(inputs, losses.pack_mixture(routing, outputs))


likelihood = losses.MixtureNegativeLogLikelihood(scale=None)
squared_error, mixture = build(output_dim=1), build(output_dim=2)

"""
## Training

The squared error cannot fall below the variance of the two answers.
"""

for model, loss in ((squared_error, "mse"), (mixture, likelihood)):
    rate = keras.optimizers.schedules.CosineDecay(1e-2, EPOCHS * NUM_ROWS // BATCH_SIZE)
    model.compile(keras.optimizers.Adam(rate), loss)
    history = model.fit(x, y, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=0).history["loss"]
    print(f"loss {history[0]:7.3f} -> {history[-1]:7.3f}")

"""
## Throwing the ball

`mode` is the answer of the expert with the highest peak. `mean` is the weighted mean of all
answers, and no better than the prediction of the squared-error model. How far from its target does
a ball land?
"""

targets = np.linspace(0.2, 0.95, BATCH_SIZE, dtype="float32")[:, None]
packed = mixture.predict(2 * targets - 1, verbose=0)
answers = {
    "squared error": squared_error.predict(2 * targets - 1, verbose=0),
    "likelihood, mean": keras.ops.convert_to_numpy(likelihood.mean(packed)),
    "likelihood, mode": keras.ops.convert_to_numpy(likelihood.mode(packed)),
}
for name, answer in answers.items():
    misses = np.abs(distance_of(45 * answer + 45) - targets)
    print(f"{name:18} mean distance of ball and target {misses.mean():.3f}")

"""
## A picture of both answers

The left plot shows the answer of each expert: the larger a dot, the larger its weight. The right
plot shows the density of the angle for two distances.
"""

parts = {name: keras.ops.convert_to_numpy(p) for name, p in likelihood.unpack(packed).items()}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.scatter(distances, angles, s=2, color="lightgrey", label="data")
for expert in range(NUM_EXPERTS):
    size = 25 * parts["weights"][:, expert]
    left.scatter(targets, 45 * parts["means"][:, expert] + 45, size)
left.plot(targets, 45 * answers["squared error"] + 45, "k", label="squared error")
left.set(xlabel="distance", ylabel="angle in degrees", ylim=(0, 90), title="experts")
left.legend(loc=(0.03, 0.6))
grid = np.linspace(-1, 1, 361, dtype="float32")[:, None]
for row in (0, len(targets) // 2):
    logs = likelihood.log_prob(grid, np.repeat(packed[row : row + 1], len(grid), axis=0))
    density = np.exp(keras.ops.convert_to_numpy(logs)) / 45
    right.plot(45 * grid + 45, density, label=f"distance {targets[row, 0]:.2f}")
right.set(xlabel="angle in degrees", title="density of the angle")
right.legend()
figure.savefig("density.png", dpi=100)
print("written: density.png")
