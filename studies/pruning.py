"""Trains a sparse language model, and takes half of its experts out of it, by several measures.

    python studies/pruning.py
    python studies/pruning.py --seeds 3 --keep 0.25

Each measure starts from the same model. Experts are measured on training data and the loss is that
of validation data, right after the surgery. "top-1" takes no expert out: one instead of two serves
each token; "top-3" and "top-4" let more serve it than in training. Model and data come from the
study `language_model.py`.
"""

import datasets
import keras
import language_model
import numpy as np
import resuming
from command_line import parser_of, positive
from comparisons import print_runs
from files import claim, whole, write_json

from keras_moe import inspection, surgery

# Short, so that many runs take minutes.
FULL = language_model.FULL._replace(steps=80, epochs=3)
EXPERTS_A_TOKEN = {"top-1": 1, "top-3": 3, "top-4": 4}
MEASURES = ("contribution", "saliency", "usage", "chance", "merged", *EXPERTS_A_TOKEN)
BATCH_SIZE = 32
COLUMNS = {
    "validation loss": ("{:.4f}", "loss"),
    "rise": ("{:.4f}", "rise"),
    "FLOPs per token": ("{:,.0f}", "flops"),
}
# So many batches of training data are measured on.
BATCHES = 16


def main(arguments=None):
    options = parse_options(arguments)
    claim(options.output)
    size = language_model.SMOKE if options.smoke else FULL
    num_tokens, data = language_model.load_data(options.dataset, options, size)
    settings = (options.dataset, options.experts, options.seeds)
    progress = options.output / "progress" / resuming.digest(size, *settings)
    results: dict = {name: [] for name in ("all experts", *MEASURES)}
    for seed in range(options.seeds):
        resuming.say(f"seed {seed}")
        keras.utils.set_random_seed(seed)
        model = language_model.make_model(num_tokens, size, options.experts, sparse=True)
        language_model.fit(model, data, seed, size, progress / str(seed), BATCH_SIZE)
        with whole(options.output / "model.keras") as part:
            model.save(part)
        rows = np.random.default_rng(seed).permutation(data[0])[: BATCHES * BATCH_SIZE]
        measured = np.array_split(rows[:, :-1], -(-len(rows) // BATCH_SIZE))
        for measure in results:
            resuming.say(f"by {measure}")
            losses = []
            for draw in range(options.draws if measure == "chance" else 1):
                other = operate(measure, measured, draw, options)
                losses.append(language_model.evaluate(other, data[1], BATCH_SIZE))
            # Of one token in all MoE layers, forward.
            flops = sum(layer.flops for layer in inspection.summarize(other))
            run = {"loss": float(np.mean(losses)), "flops": flops}
            results[measure].append(run)
            run["rise"] = run["loss"] - results["all experts"][seed]["loss"]
        print_runs("", results, COLUMNS)
        write_json(options.output / "results.json", results)
    resuming.forget(progress)
    return results


def parse_options(arguments):
    parser = parser_of(__doc__, "output_pruning", datasets.TEXTS)
    parser.add_argument("--experts", type=positive, default=16)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the experts that stay")
    parser.add_argument("--draws", type=positive, default=3, help="number of prunings by chance")
    return parser.parse_args(arguments)


def operate(measure, data, draw, options):
    """The saved model after the operation that a measure names."""
    model = keras.saving.load_model(options.output / "model.keras")
    if measure == "all experts":
        return model
    if measure == "merged":
        surgery.merge_experts(model, options.keep, data)
    elif measure in EXPERTS_A_TOKEN:
        surgery.set_top_k(model, EXPERTS_A_TOKEN[measure])
    elif measure == "chance":
        rng = np.random.default_rng(draw)
        scores = {name: rng.random(options.experts) for name in inspection.moe_layers(model)}
        surgery.prune_experts(model, scores, options.keep, data)
    else:
        surgery.prune_experts(model, measure, options.keep, data)
    return model


if __name__ == "__main__":
    main()
