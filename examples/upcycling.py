"""Trains a dense language model, then goes on with it, and with a mixture of experts made from it.

    python examples/upcycling.py
    python examples/upcycling.py --seeds 3
    python examples/upcycling.py --experts 16 --granularity 2

Both go on from the same weights, on the same data in the same order, with the same learning rates.
The dense model trains for as many seconds as the mixture, in more steps if they are faster. The
model and the data are those of the example `language_model.py`.

Runs on the backend that KERAS_BACKEND names. An interrupted run goes on where it was when the same
command is given again.
"""

import argparse
import json
import pathlib

import keras
import language_model
import numpy as np
import resuming
from command_line import check_numbers
from twins import count_parameters, spread

import keras_moe

# Short, so that many runs take minutes.
FULL = language_model.FULL._replace(steps=80, epochs=3)
DENSE, CONTINUED, UPCYCLED = "dense, first half", "dense, continued", "upcycled"


def main(arguments=None):
    options = parse_options(arguments)
    check_numbers(options, "experts", "top_k", "granularity", "batch_size", "seeds")
    size = language_model.SMOKE if options.smoke else FULL
    subwords, data = language_model.load_data(options, size)
    print(f"{data[0].size:,} subwords to learn from, {size.steps * size.epochs} steps each half")
    progress = options.output / "progress" / digest(options, size)
    results = {name: [] for name in (DENSE, UPCYCLED, CONTINUED)}
    for seed in range(options.seeds):
        keras.utils.set_random_seed(seed)
        dense = make_dense(len(subwords), size)
        weights = train(DENSE, dense, data, seed, size, options, progress, results).get_weights()

        model = keras_moe.upcycle(
            dense,
            options.experts,
            options.top_k,
            granularity=options.granularity,
            reinitialized=options.reinitialized,
            seed=seed,
        )
        # Not the order of the first half again.
        train(UPCYCLED, model, data, seed + 1000, size, options, progress, results)

        dense = make_dense(len(subwords), size)
        dense.set_weights(weights)
        longer = size._replace(epochs=equal_time(size, results))
        train(CONTINUED, dense, data, seed + 1000, longer, options, progress, results)
    print_table(results)
    (options.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    resuming.forget(progress)
    return results


def parse_options(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="twenty_newsgroups")
    parser.add_argument("--data-dir", help="folder that keeps the data; default: that of TFDS")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2, help="experts a token goes to")
    parser.add_argument(
        "--granularity", type=int, default=2, help="in how many experts a copy is split"
    )
    parser.add_argument(
        "--reinitialized", type=float, default=0.0, help="share of each expert drawn anew"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1, help="number of runs to average")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a few documents")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("output_upcycling"))
    return parser.parse_args(arguments)


def digest(options, size):
    """A name for what decides the course of training."""
    names = ("dataset", "experts", "top_k", "granularity", "reinitialized", "batch_size", "seeds")
    return resuming.digest(size, *(getattr(options, name) for name in names))


def make_dense(num_tokens, size):
    settings = language_model.parse_options([])
    return language_model.make_model(language_model.DENSE, num_tokens, settings, size)


def train(name, model, data, seed, size, options, progress, results):
    """Train, or go on training, note how it went, and return the model."""
    print(f"\n{name}, seed {seed % 1000}")
    folder = progress / f"{name.replace(', ', '-').replace(' ', '-')}-{seed % 1000}"
    history = language_model.fit(model, data, seed, size, options, folder)
    parameters = count_parameters(model)
    results[name].append({**language_model.summary(history), **parameters})
    return model


def equal_time(size, results):
    """So many epochs of the dense model as take the time of the mixture.

    By the fastest epoch of each so far: whatever else a machine does only makes epochs slower.
    """
    sparse, dense = (
        min(run["fastest_ms_per_step"] for run in results[name]) for name in (UPCYCLED, DENSE)
    )
    return max(1, round(size.epochs * sparse / dense))


def print_table(results):
    print(f"\n{'':<20} {'validation perplexity':>22} {'epochs':>7} {'ms a step':>10}", end=" ")
    print(f"{'parameters':>12} {'active':>12}")
    for name, runs in results.items():
        perplexity = spread([run["validation_perplexity"] for run in runs], "{:.2f}")
        epochs = np.mean([run["epochs"] for run in runs])
        ms = np.mean([run["fastest_ms_per_step"] for run in runs])
        print(f"{name:<20} {perplexity:>22} {epochs:>7.1f} {ms:>10.0f}", end=" ")
        print(f"{runs[0]['parameters']:>12,} {runs[0]['active_parameters']:>12,}")


if __name__ == "__main__":
    main()
