"""Dense language models of four languages become one mixture, against one dense model of all.

    KERAS_BACKEND=jax python studies/several.py
    KERAS_BACKEND=jax python studies/several.py --models "four models" --seeds 3 4

From one dense model that was trained for a short time, four train on apart, each on the manual
pages of one language, and become the experts of one mixture, which trains on all four languages.
Against it, the first model trains on all languages, as it is or as a mixture of four copies of it.
All take as much CPU time: steps times the time of a step, measured before training in turns
with the other models. Model and learning rate come from the study `sparsity.py`. Losses are of test
texts in the four languages, as many of each. The report has the models and seeds of the last
command.
"""

import pathlib
import time
import typing

import datasets
import keras
import language_model
import numpy as np
import resuming
import sparsity
import upcycling
from command_line import parse_with_models, parser_of
from comparisons import count_parameters, each_run, print_ends, step_times
from files import claim, whole
from id_batches import rows, shifted
from subwords import Subwords

import keras_moe
from keras_moe import losses

# Epochs: of the first model on all languages, of each of the four, and of the mixture of them.
FULL = sparsity.FULL._replace(steps=50, validation_rows=512)
SMOKE = sparsity.SMOKE._replace(steps=4)
START, APART, TOGETHER = 2, 3, 3
MAX_LANGUAGES = 4
BATCH_SIZE, LEARNING_RATE = upcycling.BATCH_SIZE, upcycling.LEARNING_RATE
DENSE, COPIES, MODELS_APART = MODELS = ("dense", "four copies", "four models")


def main(arguments=None):
    parser = parser_of(__doc__, "output_several", sparsity.DATASETS, seeds=[0, 1, 2])
    options = parse_with_models(parser, dict.fromkeys(MODELS), arguments)
    claim(options.output)
    size = SMOKE if options.smoke else FULL
    num_tokens, languages, test = load_data(options, size)
    settings = (size, options.dataset, BATCH_SIZE, LEARNING_RATE, START, APART, TOGETHER)
    folder = options.output / "runs" / resuming.digest(*settings)
    study = Study(size, num_tokens, languages, test, folder)
    ms_per_step = step_times(
        study.timed, [DENSE, COPIES], shifted(test[:BATCH_SIZE]), study.folder, time.process_time
    )
    for results in each_run(options, options.models, study.run, ms_per_step):
        print_ends(results, before=("{:.4f}", "before"))
    return results


def load_data(options, size):
    """The number of subwords, rows of ids of each language, and rows to test on, shuffled."""
    data = datasets.load(options.dataset, options.data_dir)
    lengths = np.bincount(data.train.labels, list(map(len, data.train.texts)))
    labels = np.argsort(-lengths)[:MAX_LANGUAGES]
    print("Languages:", *(data.class_names[label] for label in labels))

    def texts(split, label):
        chosen = [text for text, own in zip(split.texts, split.labels) if own == label]
        return chosen[: size.documents]

    train, test = ([texts(split, label) for label in labels] for split in (data.train, data.test))
    # sentencepiece passes over texts of more than 4192 bytes.
    beginnings = [text[:1000] for part in train for text in part]
    subwords = Subwords.train(beginnings, size.subwords, options.output / "cache")
    order = np.random.default_rng(0).permutation

    def encoded(parts):
        for part in parts:
            ids = rows(subwords.encode(part), size.length)
            yield ids[order(len(ids))]

    number = size.validation_rows // len(labels)
    held_out = np.concatenate([part[:number] for part in encoded(test)])
    return len(subwords), [*encoded(train)], held_out


class Study(typing.NamedTuple):
    """The data, and the folder that keeps what was computed."""

    size: language_model.Size
    num_tokens: int
    languages: list
    test: np.ndarray
    folder: pathlib.Path

    def rows(self, third):
        """A third of all languages: for the first model, for the four, or for what trains last."""
        return np.concatenate([part[third::3] for part in self.languages])

    def timed(self, name):
        model = upcycling.dense_model(self.num_tokens, self.size)
        model = self.mixture(model, 0) if name == COPIES else model
        language_model.compile_for_training(model, 1)
        return model

    def mixture(self, model, seed):
        """A mixture of a model, or of several."""
        router_losses = [losses.LoadBalance(upcycling.BALANCE_WEIGHT), "router_z"]
        num_experts = len(self.languages)
        return keras_moe.upcycle(model, num_experts, router_losses=router_losses, seed=seed)

    def run(self, name, seed, ms_per_step):
        """The losses at the end, and before the last training."""
        size, ms = self.size, ms_per_step[DENSE if name == DENSE else COPIES]
        # All after the first model, in steps of the dense one, and in steps of this one.
        apart = len(self.languages) * APART * size.steps
        total = apart * ms_per_step[DENSE] + TOGETHER * size.steps * ms_per_step[COPIES]
        steps = size.steps if name == MODELS_APART else round(total / ms / TOGETHER)

        def train(progress):
            if name == MODELS_APART:
                numbers = range(len(self.languages))
                model = self.mixture([self.language_model(each, seed) for each in numbers], seed)
            else:
                model = self.first_model(seed)
                model = self.mixture(model, seed) if name == COPIES else model
            language_model.compile_for_training(model, 1)
            before = language_model.evaluate(model, self.test, BATCH_SIZE)
            by_epoch = self.fit(name, model, seed, self.rows(2), steps, TOGETHER, progress)
            ends = {"losses": by_epoch, "before": before, "loss": by_epoch[-1]}
            return {**ends, **count_parameters(model)}

        run = resuming.once(self.folder / f"{name}-{seed}".replace(" ", "_"), train)
        times = {"ms_per_step": ms, "seconds": total / 1000}
        return {**run, "steps": steps * TOGETHER, **times}

    def first_model(self, seed):
        keras.utils.set_random_seed(seed)
        model = upcycling.dense_model(self.num_tokens, self.size)
        return self.trained("first model", model, seed, self.rows(0), START)

    def language_model(self, number, seed):
        data = self.languages[number][1::3]
        return self.trained(f"language {number}", self.first_model(seed), seed, data, APART)

    def trained(self, title, model, seed, data, epochs):
        """The model with the weights after training, which are kept."""
        folder = self.folder / f"{title}-{seed}".replace(" ", "_")
        weights = folder / "model.weights.h5"

        def train(progress):
            by_epoch = self.fit(title, model, seed, data, self.size.steps, epochs, progress)
            with whole(weights) as part:
                model.save_weights(part)
            return by_epoch

        resuming.once(folder, train)
        model.load_weights(weights)
        return model

    def fit(self, title, model, seed, data, steps, epochs, progress):
        """Losses by epoch."""
        resuming.say(f"{title}, seed {seed}")
        size = self.size._replace(steps=steps, epochs=epochs)
        data = data, self.test
        return language_model.fit(model, data, seed, size, progress, BATCH_SIZE, LEARNING_RATE)[
            "val_loss"
        ]


if __name__ == "__main__":
    main()
