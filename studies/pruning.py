"""Trains a sparse language model, and takes half of its experts out of it, by several measures.

    python studies/pruning.py
    python studies/pruning.py --seeds 3 --keep 0.25

Each measure starts from the same model. Experts are measured on training data and the loss is that
of validation data, right after the surgery. "top-1" takes no expert out: one instead of two serves
each token; "top-3" and "top-4" let more serve it than in training. The model and the data are those
of the study `language_model.py`. Runs on the backend that KERAS_BACKEND names.
"""

import pathlib

import clean_exit  # noqa: F401
import datasets
import keras
import language_model
import numpy as np
import resuming
from command_line import check_numbers, parser_of
from output_folder import claim
from twins import spread
from whole_files import whole, write_json

from keras_moe import inspection, surgery

# Short, so that many runs take minutes.
FULL = language_model.FULL._replace(steps=80, epochs=3)
EXPERTS_A_TOKEN = {"top-1": 1, "top-3": 3, "top-4": 4}
MEASURES = ("contribution", "saliency", "usage", "chance", "merged", *EXPERTS_A_TOKEN)
# So many batches of training data are measured on.
BATCHES = 16


def main(arguments=None):
    options = parse_options(arguments)
    check_numbers(options, "experts", "batch_size", "seeds", "draws")
    claim(options.output)
    size = language_model.SMOKE if options.smoke else FULL
    subwords, data = language_model.load_data(options, size)
    progress = options.output / "progress" / digest(options, size)
    settings = language_model.parse_options(["--experts", str(options.experts)])
    results = {name: [] for name in ("all experts", *MEASURES)}
    flops = {}
    for seed in range(options.seeds):
        print(f"\nseed {seed}")
        keras.utils.set_random_seed(seed)
        model = language_model.make_model(language_model.SPARSE, len(subwords), settings, size)
        language_model.fit(model, data, seed, size, options, progress / str(seed))
        with whole(options.output / "model.keras") as (part,):
            model.save(part)
        rows = np.random.default_rng(seed).permutation(data[0])[: BATCHES * options.batch_size]
        measured = np.array_split(rows[:, :-1], -(-len(rows) // options.batch_size))
        flops["all experts"] = flops_of(model)
        results["all experts"].append(validate(model, data[1], options))
        for measure in MEASURES:
            losses = []
            for draw in range(options.draws if measure == "chance" else 1):
                other = operate(measure, measured, draw, options)
                flops[measure] = flops_of(other)
                losses.append(validate(other, data[1], options))
            results[measure].append(float(np.mean(losses)))
        print_table(results, flops)
        write_json(options.output / "results.json", {"losses": results, "flops": flops})
    resuming.forget(progress)
    return results


def parse_options(arguments):
    parser = parser_of(__doc__, "twenty_newsgroups", datasets.HELP, experts=16)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the experts that stay")
    parser.add_argument("--draws", type=int, default=3, help="number of prunings by chance")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("output_pruning"))
    return parser.parse_args(arguments)


def digest(options, size):
    """A name for what decides the course of training."""
    names = ("dataset", "experts", "batch_size", "seeds")
    return resuming.digest(size, *(getattr(options, name) for name in names))


def operate(measure, data, draw, options):
    """The saved model after the operation that a measure names."""
    model = keras.saving.load_model(options.output / "model.keras")
    if measure == "merged":
        surgery.merge_experts(model, options.keep, data)
        return model
    if measure in EXPERTS_A_TOKEN:
        surgery.set_top_k(model, EXPERTS_A_TOKEN[measure])
        return model
    by = measure
    if measure == "chance":
        rng = np.random.default_rng(draw)
        by = {name: rng.random(options.experts) for name in inspection.moe_layers(model)}
    surgery.prune_experts(model, by, options.keep, data)
    return model


def flops_of(model):
    """Of one token in all MoE layers, forward."""
    return sum(layer.flops for layer in inspection.summarize(model))


def validate(model, validation, options):
    ids, following = validation[:, :-1], validation[:, 1:]
    return float(model.evaluate(ids, following, batch_size=options.batch_size, verbose=0))


def print_table(results, flops):
    everything = results["all experts"]
    print(f"\n{'':<12} {'validation loss':>20} {'rise':>20} {'FLOPs a token':>14}")
    for name, losses in results.items():
        rise = spread([loss - whole for loss, whole in zip(losses, everything)], "{:.4f}")
        print(f"{name:<12} {spread(losses, '{:.4f}'):>20} {rise:>20} {flops[name]:>14,}")


if __name__ == "__main__":
    main()
