"""What does sparsity buy? Language models, dense and sparse, at equal steps and at equal time.

    KERAS_BACKEND=jax python studies/sparsity.py
    KERAS_BACKEND=jax python studies/sparsity.py --models dense "32 experts" --seeds 0 1 2 3 4
    KERAS_BACKEND=jax python studies/sparsity.py --size gpu --models dense "32 experts"

Trains small language models on manual pages in eight languages (10 million subwords, each seen at
most once): a dense one; mixtures of 8 to 64 experts that cost the same for each token; one of many
narrow experts beside a shared one; and a dense one with as many weights as the mixture of 16. The
learning rate of each, and the weight of its balance loss, are chosen in short runs by the
validation split. The losses that are reported are those of the test split. Models of `--size gpu`
have 25 million active weights, and read the pages four times.

Times are steps times the time of a step, which is measured before training, in turns with the
other models. Finished runs stay in --output, so that further models and seeds add to them, and an
interrupted run goes on after its last epoch.
"""

import functools
import json
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
# With 64 features; Adam's best rate is the lower, the wider a model (Yang et al. 2022, table 3).
LEARNING_RATES = (5e-3, 2.5e-3, 1e-2, 2e-2)
BALANCE_WEIGHTS = (1e-2, 1e-3, 1e-1)


def main(arguments=None):
    options = parse_comparison(arguments, __doc__, MODELS, "output_sparsity", SIZES)
    claim(options.output)
    if options.size == "gpu":
        keras.config.set_dtype_policy("mixed_bfloat16")
    study = Study.prepare(options)
    ms_per_step = study.step_times()
    results: dict = {name: {} for name in options.models}
    for seed in options.seeds:
        for name in options.models:
            results[name][seed] = study.run(name, seed, ms_per_step[name])
            report(results, options.output)
    print(f"\nPicture and results are in {options.output}.")
    return results


def dense(wider, size, balance):
    return dense_feedforward(TOP_K * wider, size.hidden_dim, size.features)


def mixture(num_experts, size, balance):
    bank = layers.FeedForwardExperts(num_experts, size.hidden_dim)
    return layers.MixtureOfExperts(
        bank, routers.TopKRouter(top_k=TOP_K), [losses.LoadBalance(balance), "router_z"]
    )


def narrow_mixture(size, balance):
    """Of the width that serves a token, a quarter is shared and six experts have the others."""
    width = TOP_K * size.hidden_dim
    bank = layers.FeedForwardExperts(64, width // 8)
    return layers.MixtureOfExperts(
        bank,
        routers.TopKRouter(top_k=6),
        [losses.LoadBalance(balance), "router_z"],
        shared_expert=dense_feedforward(1, width // 4, size.features),
    )


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


class Settings(typing.NamedTuple):
    """What is chosen for each model by trials."""

    learning_rate: float = LEARNING_RATES[0]
    balance_weight: float = BALANCE_WEIGHTS[0]


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
        folder = options.output / "runs" / resuming.digest(size, options.dataset, BATCH_SIZE)
        return cls(size, num_tokens, *parts, folder)

    def step_times(self):
        models = {name: functools.partial(self.make, name, Settings()) for name in MODELS}
        rows = self.train[:BATCH_SIZE]
        return step_times(models, rows[:, :-1], rows[:, 1:], self.folder / "step_times.json")

    def make(self, name, settings, steps=1):
        make_feedforward = MODELS[name]
        feedforwards = [
            make_feedforward(self.size, settings.balance_weight) for _ in range(self.size.blocks)
        ]
        model = build_model(self.num_tokens, self.size.length, self.size.features, feedforwards)
        language_model.compile_for_training(model, steps, settings.learning_rate)
        return model

    def run(self, name, seed, ms_per_step):
        """The course of the losses of a model with the settings that suit it best."""
        settings = self.tuned(name)
        losses, parameters = self.losses(name, seed, settings, self.size.epochs, self.test)
        return {
            **course(losses, self.size.steps, ms_per_step),
            **settings._asdict(),
            **parameters,
            "flops_per_step": 6 * parameters["active_weights"] * BATCH_SIZE * self.size.length,
        }

    def tuned(self, name):
        """The best learning rate and then, for mixtures, the best weight of the balance loss."""
        rates = (rate * FULL.features / self.size.features for rate in LEARNING_RATES)
        best = self.best(name, [Settings(rate) for rate in rates])
        if "experts" not in name:
            return best
        return self.best(name, [best._replace(balance_weight=each) for each in BALANCE_WEIGHTS])

    def best(self, name, trials):
        trial = functools.partial(self.losses, name, TRIAL_SEED)
        ends = {each: trial(each, TRIAL_EPOCHS, self.validation)[0][-1] for each in trials}
        return min(ends, key=ends.get)

    def losses(self, name, seed, settings, epochs, held_out):
        """Losses by epoch and numbers of parameters, of a run that may be finished already."""
        title = f"{name}-{seed}-{epochs}-{settings.learning_rate}-{settings.balance_weight}"
        folder = self.folder / title.replace(" ", "_")
        result = folder / "result.json"
        if not result.exists():
            print(f"\n{name}, seed {seed}, {epochs} epochs, {settings}")
            keras.utils.set_random_seed(seed)
            model = self.make(name, settings, self.size.steps * epochs)
            batches = Batches(self.train, BATCH_SIZE, self.size.steps, seed)
            history = resuming.fit(
                model,
                batches.dataset(),
                epochs,
                folder / "progress",
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
            write_json(result, [history["val_loss"], parameters])
            resuming.forget(folder / "progress")
        return json.loads(result.read_text(encoding="utf-8"))


def report(results, output):
    """Print and draw what there is so far."""
    results = {name: runs for name, runs in results.items() if runs}
    write_json(output / "results.json", results)
    training_curves.losses_by_cost(results, output / "sparsity.png")
    print_comparison(results, DENSE, rate="learning_rate", balance="balance_weight")


if __name__ == "__main__":
    main()
