"""Two tasks of known relatedness: shared layers, MMoE with several gates, and DSelect-k

The data of Ma et al. 2018, section 3.2: a target is a sum of sines along one direction of the
inputs, and the cosine of the directions of the two tasks, the relatedness, can be set. All models
have about as many parameters. Prints the squared error of the test for each relatedness. For
unrelated tasks it also prints how far apart the gates are, 0 if they are the same for each input
and 1 if they share no expert, and how many experts have a weight.

    KERAS_BACKEND=jax python studies/tasks.py
"""

import argparse

import keras
import numpy as np
from command_line import positive
from comparisons import print_runs
from resuming import StepTimer, say

from keras_moe import inspection, layers, routers

FEATURES = 100
NUM_EXPERTS = 8
WIDTH = 4
NUM_ROWS = 100_000
NUM_TEST = 10_000
EPOCHS = 8
RELATEDNESS = [1.0, 0.5, 0.0]


def make_data(relatedness, rng, num_rows):
    """Inputs (num_rows, D), and targets (num_rows, 2) of variance 1, besides noise of 0.01."""
    first, second = np.linalg.qr(rng.normal(size=(FEATURES, 2)))[0].T
    second = relatedness * first + np.sqrt(1 - relatedness**2) * second
    factors, phases = rng.uniform(1, 3, size=4), rng.uniform(0, 2 * np.pi, size=4)
    x = rng.normal(size=(num_rows, FEATURES)).astype("float32")
    along = x @ np.stack([first, second], axis=1)
    y = along + np.sum(np.sin(along[..., None] * factors + phases), axis=-1)
    y = (y - y.mean(axis=0)) / y.std(axis=0) + rng.normal(0, 0.1, size=y.shape)
    return x, y.astype("float32")


def shared_bottom(inputs):
    hidden = keras.layers.Dense(42, "relu")(inputs)
    return [hidden, hidden]


def mmoe(make_router):
    def make(inputs):
        experts = [keras.layers.Dense(WIDTH, "relu") for _ in range(NUM_EXPERTS)]
        bank = layers.LayerExperts(experts)
        return layers.MultiGateMixtureOfExperts(bank, 2, make_router(), name="mmoe")(inputs)

    return make


def gate(stddev, temperature=1.0):
    """A gate by the scale at which it starts; Adam moves its logits by 1 / temperature times."""
    initializer = keras.initializers.RandomNormal(stddev=stddev * temperature)
    return routers.DenseRouter(kernel_initializer=initializer, temperature=temperature)


MODELS = {
    "shared bottom": shared_bottom,
    "MMoE": mmoe(lambda: gate(0.02)),
    "MMoE, gates start 10 x larger": mmoe(lambda: gate(0.2)),
    "MMoE, gates learn 10 x faster": mmoe(lambda: gate(0.02, temperature=0.1)),
    "MMoE, top-2": mmoe(lambda: routers.TopKRouter(top_k=2)),
    "MMoE, DSelect-2": mmoe(lambda: routers.DSelectKRouter(top_k=2)),
    "MMoE, DSelect-2 for all": mmoe(lambda: routers.DSelectKRouter(top_k=2, per_example=False)),
}


def run(name, relatedness, seed, num_rows, epochs):
    """The error of the test and, of a mixture, the gates of its two tasks."""
    keras.utils.set_random_seed(seed)
    x, y = make_data(relatedness, np.random.default_rng(seed), num_rows + NUM_TEST)
    inputs = keras.Input((FEATURES,))
    towers = [
        keras.layers.Dense(1)(keras.layers.Dense(8, "relu")(hidden))
        for hidden in MODELS[name](inputs)
    ]
    model = keras.Model(inputs, keras.layers.Concatenate()(towers))
    model.compile(keras.optimizers.Adam(1e-3), "mse", metrics=["mse"])
    say(f"{name}, relatedness {relatedness:g}, seed {seed}")
    shown = [StepTimer()]
    model.fit(x[NUM_TEST:], y[NUM_TEST:], 256, epochs, callbacks=shown, verbose=0)
    results = {"error": model.evaluate(x[:NUM_TEST], y[:NUM_TEST], 1000, verbose=0)[1]}
    if "mmoe" in [layer.name for layer in model.layers]:
        gates = [calls[0] for calls in inspection.record_routings(model, [x[:1000]]).values()]
        difference = np.abs(gates[0].probs - gates[1].probs)
        results["distance"] = np.mean(np.sum(difference, axis=1)) / 2
        results["experts"] = np.mean([np.sum(gate.weights > 0, axis=1) for gate in gates])
    return results


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], metavar="MODEL")
    parser.add_argument("--seeds", type=positive, default=3, help="runs to average")
    parser.add_argument("--smoke", action="store_true", help="one epoch on little data")
    options = parser.parse_args(arguments)
    size = (512, 1) if options.smoke else (NUM_ROWS, EPOCHS)
    results = {}
    for name in options.models:
        results[name] = [
            {each: run(name, each, seed, *size) for each in RELATEDNESS}
            for seed in range(options.seeds)
        ]
        columns = {
            f"error, {each:g}": ("{:.4f}", lambda runs, each=each: runs[each]["error"])
            for each in RELATEDNESS
        }
        for entry in list(results[name][0][0.0])[1:]:
            columns[entry] = ("{:.2f}", lambda runs, entry=entry: runs[0.0][entry])
        print_runs("model", {name: results[name]}, columns)  # at once: a run takes minutes
    return results


if __name__ == "__main__":
    main()
