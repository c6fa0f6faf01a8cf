"""Short runs: which settings keep all experts in use in the first 75 or 300 steps.

    KERAS_BACKEND=torch python studies/short_runs.py --steps 75 300

Small tasks, several settings of one mixture each. A row has, for held-out data, the loss, the
share of the busiest expert, and how many experts serve less than 1% of the tokens.
"""

import functools
import itertools
import pathlib

import datasets
import keras
import numpy as np
from command_line import parser_of, positive
from comparisons import spread
from files import claim, write_json
from resuming import say
from sklearn.datasets import load_digits
from vocabulary import Vocabulary

from keras_moe import inspection, layers, losses, routers

WORDS, LENGTH, BATCH_SIZE = 4000, 64, 64
SETTINGS = {
    "default": {},
    "balance 0.03": {"router_losses": [losses.LoadBalance(0.03), "router_z"]},
    "balance 0.1": {"router_losses": [losses.LoadBalance(0.1), "router_z"]},
    "loss-free 0.001": {"balancer": routers.LossFreeBias(1e-3)},
    "loss-free 0.01": {"balancer": routers.LossFreeBias(1e-2)},
    "quantile": {"balancer": "quantile"},
}


def mixture(experts, top_k, router_losses=None, balancer=None, **arguments):
    router = routers.TopKRouter(top_k=top_k, balancer=balancer)
    return layers.MixtureOfExperts(experts, router, router_losses, **arguments)


def digits():
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    return (data.images[order] / 16).astype("float32"), data.target[order]


def classifier(inputs, hidden, classes):
    return keras.Model(inputs, keras.layers.Dense(classes)(hidden))


def whole_images(setting):
    """A convolutional network for each of three experts, which see whole images."""
    x, y = digits()

    def expert():
        convolution = keras.layers.Conv2D(8, 3, activation="relu", padding="same")
        return keras.Sequential([convolution, keras.layers.Flatten(), keras.layers.Dense(16)])

    inputs = keras.Input((8, 8, 1))
    bank = layers.LayerExperts([expert() for _ in range(3)])
    return (
        x[..., None],
        y,
        classifier(inputs, mixture(bank, 1, token_axes=1, **setting)(inputs), 10),
    )


def centred_images(setting):
    x, y, model = whole_images(setting)
    return x - x.mean(axis=0), y, model


def patches(setting):
    """A Vision Transformer of one block on 16 patches of an image."""
    x, y = digits()
    x = x.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
    inputs = keras.Input((16, 4))
    moe = mixture(layers.FeedForwardExperts(8, 64), 2, **setting)
    hidden = layers.TransformerEncoderBlock(4, moe)(keras.layers.Dense(32)(inputs))
    return x, y, classifier(inputs, keras.layers.Flatten()(hidden), 10)


@functools.cache
def words():
    train = datasets.load("twenty_newsgroups").train
    vocabulary = Vocabulary.learn(train.texts, WORDS, LENGTH)
    order = np.random.default_rng(0).permutation(len(train.texts))[:6000]
    return vocabulary.encode([train.texts[number] for number in order]), train.labels[order]


def text(setting):
    """Classification of texts of 64 words by one encoder block."""
    x, y = words()
    inputs = keras.Input((LENGTH,), dtype="int32")
    hidden = keras.layers.Embedding(WORDS + 2, 64, mask_zero=True)(inputs)
    moe = mixture(layers.FeedForwardExperts(8, 128), 2, **setting)
    hidden = layers.TransformerEncoderBlock(4, moe)(hidden)
    return x, y, classifier(inputs, keras.layers.GlobalAveragePooling1D()(hidden), 20)


def language(setting):
    """The next word, by one decoder block."""
    x, _ = words()
    inputs = keras.Input((LENGTH - 1,), dtype="int32")
    moe = mixture(layers.FeedForwardExperts(8, 128), 2, **setting)
    hidden = layers.TransformerDecoderBlock(4, moe)(keras.layers.Embedding(WORDS + 2, 64)(inputs))
    return x[:, :-1], x[:, 1:], classifier(inputs, hidden, WORDS + 2)


def table(setting):
    """Digits as a table of 64 numbers."""
    x, y = digits()
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(32, activation="gelu")(inputs)
    moe = mixture(layers.FeedForwardExperts(8, 32), 2, **setting)
    return x.reshape(-1, 64), y, classifier(inputs, moe(hidden), 10)


TASKS = {
    each.__name__: each for each in (whole_images, centred_images, patches, text, language, table)
}


def run(task, setting, steps, seed):
    say(f"{task}, {setting}, {steps} steps, seed {seed}")
    keras.utils.set_random_seed(seed)
    x, y, model = TASKS[task](SETTINGS[setting])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    (moe,) = inspection.moe_layers(model).values()
    held_out, rng = len(x) // 5 // BATCH_SIZE * BATCH_SIZE, np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(held_out, len(x), BATCH_SIZE)
        model.train_on_batch(x[rows], y[rows])
    with inspection.count_in_evaluation(model):
        value = model.evaluate(x[:held_out], y[:held_out], batch_size=BATCH_SIZE, verbose=0)
    counts = moe.read_counts(evaluation=True).assignments
    share = counts / counts.sum()
    return {"loss": value, "busiest": float(share.max()), "dead": int((share < 0.01).sum())}


def main(arguments=None):
    parser = parser_of(__doc__, pathlib.Path("output/short_runs"), seeds=3)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--steps", nargs="+", type=positive, default=[75, 300])
    options = parser.parse_args(arguments)
    claim(options.output)
    results = []
    for task, steps, setting in itertools.product(options.tasks, options.steps, options.settings):
        runs = [run(task, setting, steps, seed) for seed in range(options.seeds)]
        results.append({"task": task, "steps": steps, "setting": setting, "runs": runs})
        columns = (f"{name} {spread([run[name] for run in runs], '{:.3f}')}" for name in runs[0])
        print(f"{task}, {steps} steps, {setting}:", *columns, sep="  ", flush=True)
        write_json(options.output / "results.json", results)
    return results


if __name__ == "__main__":
    main()
