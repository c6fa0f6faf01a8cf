"""Compares routers, and what balances them, on the topics of Reuters news.

    python studies/compare_routers.py
    python studies/compare_routers.py --seeds 1 --routers top_k expert_choice

The same small Transformer is trained with each router. Then a router that sends every token to the
same two of sixteen experts is trained with each method of balancing: which one gets out, how fast?

Runs on the backend that KERAS_BACKEND names.
"""

import argparse
import pathlib
import time
import typing

import clean_exit  # noqa: F401
import datasets
import keras
import numpy as np
import tensorflow as tf
import training_curves
from command_line import check_numbers
from output_folder import claim
from twins import spread
from vocabulary import Vocabulary
from whole_files import write_json

from keras_moe import callbacks, layers, losses, routers


class Size(typing.NamedTuple):
    words: int
    length: int
    features: int
    hidden_dim: int
    documents: int | None
    steps: int


FULL = Size(8_000, 64, features=64, hidden_dim=64, documents=None, steps=240)
SMOKE = Size(200, 16, features=8, hidden_dim=8, documents=64, steps=20)
NUM_EXPERTS, BATCH_SIZE, LEARNING_RATE = 16, 64, 2e-3
# The history has an entry for so many steps.
STEPS_AN_ENTRY = 10

# How a collapsed top-2 router is balanced: its selection bias, or losses.
BALANCING = {
    "nothing": {},
    "load_balance 0.01": {"losses": [("load_balance", 0.01)]},
    "load_balance 0.1": {"losses": [("load_balance", 0.1)]},
    "global_load_balance 0.1": {"losses": [("global_load_balance", 0.1)]},
    "sequence_load_balance 0.1": {"losses": [("sequence_load_balance", 0.1)]},
    "importance_variation 0.1": {"losses": [("importance_variation", 0.1)]},
    "router_z 0.001": {"losses": [("router_z", 0.001)]},
    "loss_free bias": {"balancer": routers.LossFreeBias(rate=0.002)},
    "quantile bias": {"balancer": routers.QuantileBias(momentum=0.9)},
}
BALANCED = 0.5


def main(arguments=None):
    options = parse_options(arguments)
    check_numbers(options, "seeds")
    claim(options.output)
    size = SMOKE if options.smoke else FULL
    arrays, num_classes = load(size, options.data_dir)
    results: dict = {"routers": {}, "balancing": {}}
    for name in options.routers:
        runs = [run_router(name, seed, arrays, num_classes, size) for seed in range(options.seeds)]
        results["routers"][name] = runs
        print_router(name, runs, is_first=name == options.routers[0])
    for name in options.balancing:
        runs = [
            run_collapsed(BALANCING[name], seed, arrays, num_classes, size)
            for seed in range(options.seeds)
        ]
        results["balancing"][name] = runs
        print_balancing(name, runs, is_first=name == options.balancing[0])
    write_json(options.output / "results.json", results)
    training_curves.imbalances(results, STEPS_AN_ENTRY, BALANCED, options.output / "imbalance.png")
    print(f"\nPicture and results are in {options.output}.")
    return results


def parse_options(arguments):
    names = [*sorted(routers.BY_NAME), "hash"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--routers", nargs="*", choices=names, default=names, metavar="ROUTER")
    parser.add_argument(
        "--balancing", nargs="*", choices=BALANCING, default=[*BALANCING], metavar="METHOD"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of runs to average")
    parser.add_argument("--data-dir", help="folder that keeps the data; default: that of TFDS")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a few documents")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("output_routers"))
    return parser.parse_args(arguments)


def load(size, data_dir):
    data = datasets.load("reuters_r8", data_dir)
    vocabulary = Vocabulary.learn(data.train.texts, size.words, size.length)

    def encoded(split):
        return vocabulary.encode(split.texts[: size.documents]), split.labels[: size.documents]

    return [encoded(data.train), encoded(data.test)], len(data.class_names)


def run_router(name, seed, arrays, num_classes, size):
    keras.utils.set_random_seed(seed)
    if name == "hash":
        router = routers.HashRouter(NUM_EXPERTS, size.words + 2, top_k=2)
    else:
        router = routers.get(name, num_experts=NUM_EXPERTS)
    moe = moe_layer(router, None, size)
    return train(build_model(moe, num_classes, size), arrays, size)


def run_collapsed(method, seed, arrays, num_classes, size):
    keras.utils.set_random_seed(seed)
    router = routers.TopKRouter(NUM_EXPERTS, balancer=method.get("balancer"))
    router_losses = [losses.BY_NAME[name](weight) for name, weight in method.get("losses", [])]
    model = build_model(moe_layer(router, router_losses, size), num_classes, size)
    collapse(model, router)
    return train(model, arrays, size)


def moe_layer(router, router_losses, size):
    """With the losses that the router has by default, if they are None."""
    bank = layers.FeedForwardExperts(NUM_EXPERTS, size.hidden_dim)
    return layers.MixtureOfExperts(bank, router, router_losses, name="experts")


def build_model(moe, num_classes, size):
    ids = keras.Input((size.length,), dtype="int32")
    words = keras.layers.Embedding(size.words + 2, size.features, mask_zero=True)(ids)
    block = layers.TransformerEncoderBlock(num_heads=4, feedforward=moe, dropout=0.1)
    hidden = keras.layers.LayerNormalization()(block(words, token_ids=ids))
    document = keras.layers.GlobalAveragePooling1D()(hidden)
    return keras.Model(ids, keras.layers.Dense(num_classes)(document))


def collapse(model, router):
    """Make the router send every token to the first two experts.

    Behind a normalisation with an offset of 1 the features of a token sum to D. Two columns of the
    kernel with 1 / D everywhere make a logit of exactly 1 from that, whatever the token; all other
    logits are near 0.
    """
    (norm,) = (layer for layer in model._flatten_layers() if layer.name == "feedforward_norm")
    norm.beta.assign(np.ones(norm.beta.shape))
    kernel = 1e-3 * keras.ops.convert_to_numpy(router.kernel)
    kernel[:, :2] = 1 / len(kernel)
    router.kernel.assign(kernel)


def train(model, arrays, size):
    """Train, then read the test accuracy once."""
    (ids, labels), test = arrays
    batches = tf.data.Dataset.from_tensor_slices((ids, labels)).shuffle(len(ids), seed=0)
    batches = batches.batch(min(BATCH_SIZE, len(ids)), drop_remainder=True).repeat()
    # Routers settle as the rate falls.
    schedule = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, size.steps)
    model.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # PyTorch has no XLA.
        jit_compile=keras.backend.backend() != "torch",
    )
    clock = Clock()
    history = model.fit(
        batches,
        epochs=size.steps // STEPS_AN_ENTRY,
        steps_per_epoch=STEPS_AN_ENTRY,
        shuffle=False,  # they are shuffled already
        callbacks=[callbacks.ExpertMonitor(), clock],
        verbose=0,
    ).history
    _, accuracy = model.evaluate(*test, verbose=0)
    return {
        "test_accuracy": float(accuracy),
        "imbalance": history["experts_load_imbalance"],
        "dead_experts": history["experts_dead_experts"][-1],
        "dropped_fraction": history["experts_dropped_fraction"][-1],
        "ms_per_step": 1000 * float(np.median(clock.seconds[1:])) / STEPS_AN_ENTRY,
    }


class Clock(keras.callbacks.Callback):
    """Seconds of each epoch."""

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self._begin)


def print_router(name, runs, is_first):
    if is_first:
        print(
            f"\n{'router':<20} {'test accuracy':>17} {'imbalance: first':>17} {'middle':>7}", end=""
        )
        print(f" {'last':>7} {'dead':>5} {'dropped':>8} {'ms a step':>10}")
    accuracy = spread([run["test_accuracy"] for run in runs], "{:.2%}")
    trace = np.mean([run["imbalance"] for run in runs], axis=0)
    dead, dropped, ms = (
        np.mean([run[key] for run in runs])
        for key in ("dead_experts", "dropped_fraction", "ms_per_step")
    )
    print(f"{name:<20} {accuracy:>17} {trace[0]:>17.2f} {trace[len(trace) // 2]:>7.2f}", end="")
    print(f" {trace[-1]:>7.2f} {dead:>5.1f} {dropped:>8.1%} {ms:>10.1f}", flush=True)


def print_balancing(name, runs, is_first):
    if is_first:
        print(f"\n{'collapsed, then':<26} {'test accuracy':>17} {'imbalance: first':>17}", end="")
        print(f" {'last':>15} {'dead':>5} {f'steps to {BALANCED}':>14}")
    accuracy = spread([run["test_accuracy"] for run in runs], "{:.2%}")
    first = np.mean([run["imbalance"][0] for run in runs])
    last = spread([run["imbalance"][-1] for run in runs], "{:.2f}")
    dead = np.mean([run["dead_experts"] for run in runs])
    steps = [steps_to_balance(run["imbalance"]) for run in runs]
    steps = "never" if None in steps else f"{np.mean(steps):.0f}"
    print(
        f"{name:<26} {accuracy:>17} {first:>17.2f} {last:>15} {dead:>5.1f} {steps:>14}", flush=True
    )


def steps_to_balance(imbalance):
    """Steps after which the imbalance stayed below `BALANCED`, or None."""
    above = np.flatnonzero(np.array(imbalance) >= BALANCED)
    first = above[-1] + 1 if len(above) else 0
    return None if first == len(imbalance) else int(first) * STEPS_AN_ENTRY


if __name__ == "__main__":
    main()
