"""Trains a dense language model, then goes on with it, and with a mixture of experts made from it.

    python studies/upcycling.py
    python studies/upcycling.py --seeds 3
    python studies/upcycling.py --experts 16 --granularity 2

Both go on from the same weights, on the same data in the same order, with the same learning rates.
The dense model trains for as many seconds as the mixture, in more steps if they are faster. The
model and the data are those of the study `language_model.py`.

Runs on the backend that KERAS_BACKEND names. An interrupted run resumes from the last finished
epoch when the same command is given again.
"""

import pathlib

import clean_exit  # noqa: F401
import datasets
import keras
import language_model
import resuming
from command_line import check_numbers, parser_of
from courses import step_times
from output_folder import claim
from twins import count_parameters, spread
from whole_files import write_json

import keras_moe

# Short, so that many runs take minutes.
FULL = language_model.FULL._replace(steps=80, epochs=3)
DENSE, CONTINUED, UPCYCLED = "dense, first half", "dense, continued", "upcycled"


def main(arguments=None):
    options = parse_options(arguments)
    check_numbers(options, "experts", "top_k", "granularity", "batch_size", "seeds")
    claim(options.output)
    size = language_model.SMOKE if options.smoke else FULL
    subwords, data = language_model.load_data(options, size)
    print(f"{data[0].size:,} subwords to learn from, {size.steps * size.epochs} steps each half")
    progress = options.output / "progress" / digest(options, size)
    cost = cost_of_a_step(data, len(subwords), size, options, progress / "step_times.json")
    print(f"A step of the mixture takes {cost:.2f} times as long as one of the dense model.")
    results = {name: [] for name in (DENSE, UPCYCLED, CONTINUED)}
    for seed in range(options.seeds):
        keras.utils.set_random_seed(seed)
        dense = make_dense(len(subwords), size)
        weights = train(DENSE, dense, data, seed, size, options, progress, results).get_weights()

        model = upcycle(dense, options, seed)
        # Not the order of the first half again.
        train(UPCYCLED, model, data, seed + 1000, size, options, progress, results)

        dense = make_dense(len(subwords), size)
        dense.set_weights(weights)
        longer = size._replace(steps=max(1, round(size.steps * cost)))
        train(CONTINUED, dense, data, seed + 1000, longer, options, progress, results)
    print_table(results)
    write_json(options.output / "results.json", results)
    resuming.forget(progress)
    return results


def parse_options(arguments):
    parser = parser_of(__doc__, "twenty_newsgroups", datasets.HELP, experts=16)
    parser.add_argument("--top-k", type=int, default=2, help="experts a token goes to")
    parser.add_argument(
        "--granularity", type=int, default=2, help="in how many experts a copy is split"
    )
    parser.add_argument(
        "--reinitialized", type=float, default=0.0, help="share of each expert drawn anew"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("output_upcycling"))
    return parser.parse_args(arguments)


def digest(options, size):
    """A name for what decides the course of training."""
    names = ("dataset", "experts", "top_k", "granularity", "reinitialized", "batch_size", "seeds")
    return resuming.digest(size, *(getattr(options, name) for name in names))


def make_dense(num_tokens, size):
    settings = language_model.parse_options([])
    return language_model.make_model(language_model.DENSE, num_tokens, settings, size)


def upcycle(model, options, seed):
    return keras_moe.upcycle(
        model,
        options.experts,
        options.top_k,
        granularity=options.granularity,
        reinitialized=options.reinitialized,
        seed=seed,
    )


def train(name, model, data, seed, size, options, progress, results):
    """Train, or go on training, note how it went, and return the model."""
    print(f"\n{name}, seed {seed % 1000}")
    folder = progress / f"{name.replace(', ', '-').replace(' ', '-')}-{seed % 1000}"
    history = language_model.fit(model, data, seed, size, options, folder)
    run = {**language_model.summary(history), **count_parameters(model)}
    results[name].append({**run, "steps": size.steps * size.epochs})
    return model


def cost_of_a_step(data, num_tokens, size, options, path):
    """Time of a training step of the mixture, in steps of the dense model."""

    def compiled(model):
        language_model.compile_for_training(model, 1)
        return model

    models = {
        DENSE: lambda: compiled(make_dense(num_tokens, size)),
        UPCYCLED: lambda: compiled(upcycle(make_dense(num_tokens, size), options, seed=0)),
    }
    rows = data[0][: options.batch_size]
    times = step_times(models, rows[:, :-1], rows[:, 1:], path)
    return times[UPCYCLED] / times[DENSE]


def print_table(results):
    print(f"\n{'':<20} {'validation perplexity':>22} {'steps':>7}", end=" ")
    print(f"{'parameters':>12} {'active':>12}")
    for name, runs in results.items():
        perplexity = spread([run["validation_perplexity"] for run in runs], "{:.2f}")
        print(f"{name:<20} {perplexity:>22} {runs[0]['steps']:>7}", end=" ")
        print(f"{runs[0]['parameters']:>12,} {runs[0]['active_parameters']:>12,}")


if __name__ == "__main__":
    main()
