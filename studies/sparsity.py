"""What does sparsity buy? Language models, dense and sparse, at equal steps and at equal time.

    KERAS_BACKEND=jax python studies/sparsity.py
    KERAS_BACKEND=jax python studies/sparsity.py --models dense "32 experts" --seeds 0 1 2 3 4
    KERAS_BACKEND=jax python studies/sparsity.py --size gpu --models dense "32 experts"

Trains small language models on manual pages in eight languages (10 million subwords, each seen at
most once): a dense one; mixtures of 8 to 64 experts that cost the same for each token; one of many
narrow experts beside a shared one; and a dense one with as many weights as the mixture of 16. The
learning rate of each is chosen in short runs by the validation split. The losses that are reported
are those of the test split. `--size gpu` trains models of 26 million active weights (143 million of
the wide dense one) in bfloat16, which read the pages four times.

Times are steps times the time of a step, which is measured before training, in turns with the
other models. Finished runs stay in --output and are not trained again, and an interrupted run goes
on after its last epoch. Table, picture and `results.json` are those of the models and seeds of the
last command.
"""

import functools
import pathlib
import typing

import clean_exit  # noqa: F401
import datasets
import keras
import language_model
import numpy as np
import resuming
import training_curves
from command_line import parse_comparison
from comparison_table import print_comparison
from courses import course, step_times
from decoder_model import build_model
from id_batches import Batches, rows
from output_folder import claim
from subwords import Subwords
from twins import count_parameters, dense_feedforward
from whole_files import write_json

from keras_moe import layers, losses, routers

FULL = language_model.Size(
    1024, 64, features=64, hidden_dim=128, blocks=2, documents=None, validation_rows=2048,
    steps=250, epochs=10,
)  # fmt: skip
GPU = language_model.Size(
    1024, 512, features=512, hidden_dim=1024, blocks=8, documents=None, validation_rows=512,
    steps=168, epochs=10,
)  # fmt: skip
SIZES = {"cpu": FULL, "gpu": GPU}
SMOKE = language_model.SMOKE._replace(subwords=300, steps=2)
BATCH_SIZE = 64
TOP_K = 2
# A tenth of a run, and of another seed than any run.
TRIAL_EPOCHS, TRIAL_SEED = 1, 1000
# For 64 features; Adam's best rate is the lower, the wider a model (Yang et al. 2022, table 3).
LEARNING_RATES = (2.5e-3, 5e-3, 1e-2, 2e-2)
BALANCE_WEIGHT = 1e-2


def main(arguments=None):
    options = parse_comparison(arguments, __doc__, MODELS, "output_sparsity", SIZES)
    claim(options.output)
    keras.config.set_dtype_policy("mixed_bfloat16" if options.size == "gpu" else "float32")
    study = Study.prepare(options)
    ms_per_step = study.step_times(options.models)
    results: dict = {name: {} for name in options.models}
    for seed in options.seeds:
        for name in options.models:
            results[name][seed] = study.run(name, seed, ms_per_step[name])
            report(results, options.output)
    print(f"\nPicture and results are in {options.output}.")
    return results


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


DENSE = "dense"
MODELS = {
    DENSE: functools.partial(dense, 1),
    **{f"{number} experts": functools.partial(mixture, number) for number in (8, 16, 32, 64)},
    "64 narrow experts": narrow_mixture,
    "dense, 8 times as wide": functools.partial(dense, 8),
}


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

    @classmethod
    def prepare(cls, options):
        size = SMOKE if options.smoke else SIZES[options.size]
        num_tokens, *parts = load_data(options, size)
        print(f"{parts[0][:, 1:].size:,} subwords to learn from, {size.steps * size.epochs} steps")
        policy = keras.config.dtype_policy().name
        name = resuming.digest(size, options.dataset, BATCH_SIZE, BALANCE_WEIGHT, policy)
        return cls(size, num_tokens, *parts, options.output / "runs" / name)

    def step_times(self, names):
        models = {name: functools.partial(self.make, name) for name in names}
        rows = self.train[:BATCH_SIZE]
        return step_times(models, rows[:, :-1], rows[:, 1:], self.folder)

    def make(self, name, learning_rate=LEARNING_RATES[0], steps=1):
        feedforwards = [MODELS[name](self.size) for _ in range(self.size.blocks)]
        model = build_model(self.num_tokens, self.size.length, self.size.features, feedforwards)
        language_model.compile_for_training(model, steps, learning_rate)
        return model

    def run(self, name, seed, ms_per_step):
        """The course of the losses of a model with the learning rate that suits it best."""
        rate = self.best_rate(name)
        by_epoch, parameters = self.train_once(name, seed, rate, self.size.epochs, self.test)
        return {
            **course(by_epoch, self.size.steps, ms_per_step),
            "learning_rate": rate,
            **parameters,
            "flops_per_step": 6 * parameters["active_weights"] * BATCH_SIZE * self.size.length,
        }

    def best_rate(self, name):
        trial = functools.partial(self.train_once, name, TRIAL_SEED)
        scale = min(1, FULL.features / self.size.features)
        rates = [scale * rate for rate in LEARNING_RATES]
        ends = {rate: trial(rate, TRIAL_EPOCHS, self.validation)[0][-1] for rate in rates}
        return min(ends, key=ends.get)

    def train_once(self, name, seed, learning_rate, epochs, held_out):
        """Losses by epoch and numbers of parameters, of a run that may be finished already."""

        def train(progress):
            print(f"\n{name}, seed {seed}, {epochs} epochs, learning rate {learning_rate}")
            keras.utils.set_random_seed(seed)
            model = self.make(name, learning_rate, self.size.steps * epochs)
            batches = Batches(self.train, BATCH_SIZE, self.size.steps, seed)
            history = resuming.fit(
                model,
                batches.dataset(),
                epochs,
                progress,
                [batches],
                steps_per_epoch=self.size.steps,
                validation_data=(held_out[:, :-1], held_out[:, 1:]),
                validation_batch_size=BATCH_SIZE,
                verbose=2,
            )
            parameters = count_parameters(model)
            # Of the embedding a token takes one row, which costs nothing.
            looked_up = model.get_layer("embedding").count_params()
            parameters["active_weights"] = parameters["active_parameters"] - looked_up
            return history["val_loss"], parameters

        title = f"{name}-{seed}-{epochs}-{learning_rate}"
        return resuming.once(self.folder / title.replace(" ", "_"), train)


def report(results, output):
    """Print and draw what there is so far."""
    results = {name: runs for name, runs in results.items() if runs}
    write_json(output / "results.json", results)
    training_curves.losses_by_cost(results, output / "sparsity.png")
    print_comparison(results, DENSE, rate="learning_rate")


if __name__ == "__main__":
    main()
