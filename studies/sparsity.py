"""What does sparsity buy? Language models, dense and sparse, at equal steps and at equal time.

    KERAS_BACKEND=jax python studies/sparsity.py
    KERAS_BACKEND=jax python studies/sparsity.py --models dense "32 experts" --seeds 0 1 2 3 4

Trains small language models on manual pages in eight languages (10 million subwords, each seen at
most once): a dense one; mixtures of 8 to 64 experts that cost the same for each token; one of many
narrow experts beside a shared one; and a dense one with as many weights as the mixture of 16. The
learning rate of each is chosen in short runs by the validation split. Losses are of the test split.
Times are steps times the time of a step, measured before training in turns with the other models.
The report has the models and seeds of the last command.
"""

import functools
import pathlib
import typing

import datasets
import keras
import language_model
import numpy as np
import plots
import resuming
from command_line import parse_with_models, parser_of
from comparisons import (
    count_parameters,
    course,
    dense_feedforward,
    each_run,
    print_comparison,
    step_times,
)
from files import claim
from id_batches import rows, shifted
from subwords import Subwords

from keras_moe import layers, losses, routers

FULL = language_model.Size(
    1024, 64, features=64, hidden_dim=128, blocks=2, documents=None, validation_rows=2048,
    steps=250, epochs=10,
)  # fmt: skip
SMOKE = language_model.SMOKE._replace(subwords=300, steps=2)
DATASETS = ("manual_pages", "twenty_newsgroups", "reuters_r8")
BATCH_SIZE = 64
TOP_K = 2
# A tenth of a run, and of another seed than any run.
TRIAL_EPOCHS, TRIAL_SEED = 1, 1000
LEARNING_RATES = (2.5e-3, 5e-3, 1e-2, 2e-2)
BALANCE_WEIGHT = 1e-2


def dense(wider, size):
    return dense_feedforward(TOP_K * wider, size.hidden_dim, size.features)


def mixture(num_experts, size):
    bank = layers.FeedForwardExperts(num_experts, size.hidden_dim)
    return layers.MixtureOfExperts(bank, routers.TopKRouter(top_k=TOP_K), router_losses())


def narrow_mixture(size):
    """Of the width that serves a token, a quarter is shared and six experts have the others."""
    width = TOP_K * size.hidden_dim
    bank = layers.FeedForwardExperts(64, width // 8)
    return layers.MixtureOfExperts(
        bank,
        routers.TopKRouter(top_k=6),
        router_losses(),
        shared_expert=dense_feedforward(1, width // 4, size.features),
    )


def router_losses():
    return [losses.LoadBalance(BALANCE_WEIGHT), "router_z"]


MODELS = {
    "dense": functools.partial(dense, 1),
    **{f"{number} experts": functools.partial(mixture, number) for number in (8, 16, 32, 64)},
    "64 narrow experts": narrow_mixture,
    "dense, 8 times as wide": functools.partial(dense, 8),
}


def main(arguments=None):
    parser = parser_of(__doc__, "output_sparsity", DATASETS, seeds=[0, 1, 2])
    options = parse_with_models(parser, MODELS, arguments)
    claim(options.output)
    size = SMOKE if options.smoke else FULL
    num_tokens, *parts = load_data(options, size)
    print(f"{parts[0][:, 1:].size:,} subwords to learn from, {size.steps * size.epochs} steps")
    name = resuming.digest(size, options.dataset, BATCH_SIZE, BALANCE_WEIGHT)
    study = Study(size, num_tokens, *parts, options.output / "runs" / name)
    ms_per_step = step_times(
        study.make, options.models, shifted(study.train[:BATCH_SIZE]), study.folder
    )
    for results in each_run(options, options.models, study.run, ms_per_step):
        drawn = {name: [*runs.values()] for name, runs in results.items()}
        plots.at_equal_cost(drawn, options.output / "sparsity.png")
        print_comparison(results, rate=("{:g}", "learning_rate"))
    print(f"\nPicture and results are in {options.output}.")
    return results


def load_data(options, size):
    """The number of subwords, and rows of ids to learn from, to validate and to test on."""
    texts = datasets.load(options.dataset, options.data_dir)
    parts = [split.texts[: size.documents] for split in texts[:3]]
    # sentencepiece passes over texts of more than 4192 bytes.
    beginnings = [text[:1000] for text in parts[0]]
    subwords = Subwords.train(beginnings, size.subwords, options.output / "cache")
    train, *others = (rows(subwords.encode(part), size.length) for part in parts)
    # TFDS shuffles the documents, but not what stands in one.
    order = np.random.default_rng(0).permutation
    others = [part[order(len(part))[: size.validation_rows]] for part in others]
    return len(subwords), train, *others


class Study(typing.NamedTuple):
    """Data, and the folder that keeps what was computed."""

    size: language_model.Size
    num_tokens: int
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    folder: pathlib.Path

    def make(self, name):
        feedforwards = [MODELS[name](self.size) for _ in range(self.size.blocks)]
        model = language_model.build_model(self.num_tokens, self.size, feedforwards)
        language_model.compile_for_training(model, steps=1)
        return model

    def run(self, name, seed, ms_per_step):
        """The course of the losses of a model with the learning rate that suits it best."""
        rate = self.best_rate(name)
        by_epoch, parameters = self.train_once(name, seed, rate, self.size.epochs, self.test)
        steps = [self.size.steps * (1 + epoch) for epoch in range(self.size.epochs)]
        run = course(by_epoch, steps, ms_per_step[name])
        flops_per_step = 6 * parameters["active_weights"] * BATCH_SIZE * self.size.length
        run["FLOPs"] = [step * flops_per_step for step in run["steps"]]
        return {**run, "learning_rate": rate, "flops_per_step": flops_per_step, **parameters}

    def best_rate(self, name):
        trial = functools.partial(self.train_once, name, TRIAL_SEED)
        ends = {rate: trial(rate, TRIAL_EPOCHS, self.validation)[0][-1] for rate in LEARNING_RATES}
        return min(ends, key=ends.get)

    def train_once(self, name, seed, learning_rate, epochs, held_out):
        """Losses by epoch and numbers of parameters, of a run that may be finished already."""

        def train(progress):
            resuming.say(f"{name}, seed {seed}, {epochs} epochs, learning rate {learning_rate}")
            keras.utils.set_random_seed(seed)
            model = self.make(name)
            history = language_model.fit(
                model, (self.train, held_out), seed, self.size._replace(epochs=epochs), progress,
                BATCH_SIZE, learning_rate,
            )  # fmt: skip
            parameters = count_parameters(model)
            # Of the embedding a token takes one row, which costs nothing.
            looked_up = model.get_layer("embedding").count_params()
            parameters["active_weights"] = parameters["active_parameters"] - looked_up
            return history["val_loss"], parameters

        title = f"{name}-{seed}-{epochs}-{learning_rate}"
        return resuming.once(self.folder / title.replace(" ", "_"), train)


if __name__ == "__main__":
    main()
