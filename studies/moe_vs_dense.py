"""Does a mixture of experts beat a dense model of the same active size, and at the same cost?

    python studies/moe_vs_dense.py
    python studies/moe_vs_dense.py --seeds 3
    python studies/moe_vs_dense.py --tasks classification --experts 8

Trains dense models and mixtures with more and more experts, two of which serve each token, on the
same data in the same order: shorter runs of the language models of the example
`language_model.py`, of the translators of `translation.py` and of the classifiers of
`text_classification.py`. The table gives the validation loss after equal steps, and the loss that
the same run had when the dense model had ended; the plot draws all losses by steps and by time.

Runs on the backend that KERAS_BACKEND names. Language models and translators that are interrupted
go on where they were when the same command is given again.
"""

import argparse
import pathlib

import clean_exit  # noqa: F401
import datasets
import keras
import language_model
import numpy as np
import resuming
import text_classification
import training
import training_curves
import translation
from bilingual_embedding import bilingual_embedding
from command_line import check_numbers
from courses import course, loss_at
from datasets import pairs
from id_batches import rows
from output_folder import claim
from subwords import Subwords
from twins import dense_feedforward, spread
from vocabulary import Vocabulary
from whole_files import write_json

DENSE = "dense"
# A third of the examples' own runs and less: there are many of them here.
EPOCHS = 3
LANGUAGE_MODEL = language_model.FULL._replace(steps=100, epochs=EPOCHS)
# A third epoch of a classifier changes little.
CLASSIFIER_EPOCHS = 2
TRANSLATION = translation.FULL._replace(pairs=3000)


def main(arguments=None):
    options = parse_options(arguments)
    check_numbers(options, "seeds", "experts")
    claim(options.output)
    results: dict = {}
    for task in options.tasks:
        train = TASKS[task](options)
        results[task] = {}
        for experts in (None, *options.experts):
            name = DENSE if experts is None else f"{experts} experts"
            results[task][name] = []
            for seed in range(options.seeds):
                print(f"\n{task}, {name}, seed {seed}")
                keras.utils.set_random_seed(seed)
                results[task][name].append(train(experts, seed))
    for task, models in results.items():
        print_table(task, models)
    write_json(options.output / "results.json", results)
    training_curves.losses_by_steps_and_time(results, options.output / "moe_vs_dense.png")
    resuming.forget(progress(options))
    print(f"\nPicture and results are in {options.output}.")
    return results


def parse_options(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], metavar="TASK")
    parser.add_argument("--experts", nargs="*", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--seeds", type=int, default=1, help="number of runs to average")
    parser.add_argument("--data-dir", help="folder that keeps the data; default: that of TFDS")
    parser.add_argument("--smoke", action="store_true", help="tiny models on a few documents")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("output_moe_vs_dense"))
    return parser.parse_args(arguments)


def progress(options):
    """The folder of what this command has not finished: another one does not touch it."""
    commanded = (options.smoke, options.tasks, options.experts, options.seeds)
    sizes = (LANGUAGE_MODEL, TRANSLATION, EPOCHS)
    return options.output / "progress" / resuming.digest(*commanded, *sizes)


def language_models(options):
    """A function that trains a language model and returns its course."""
    size = language_model.SMOKE if options.smoke else LANGUAGE_MODEL
    texts = datasets.load("twenty_newsgroups", options.data_dir)
    parts = [split.texts[: size.documents] for split in texts[:2]]
    subwords = Subwords.train(parts[0], size.subwords, options.output / "cache")
    data = [rows(subwords.encode(part), size.length) for part in parts]
    data[1] = data[1][: size.validation_rows]

    def train(experts, seed):
        name = language_model.DENSE if experts is None else language_model.SPARSE
        settings = language_model.parse_options(
            [] if experts is None else ["--experts", str(experts)]
        )
        model = language_model.make_model(name, len(subwords), settings, size)
        folder = progress(options) / f"language_model-{experts}-{seed}"
        history = language_model.fit(model, data, seed, size, settings, folder)
        return course(history["val_loss"], size.steps, min(history["ms_per_step"]))

    return train


def translators(options):
    """A function that trains a translator and returns its course."""
    size = translation.SMOKE if options.smoke else TRANSLATION
    data = pairs.load("bible_es_en", options.data_dir)
    # A sixth to validate on: it is done after every epoch of every run.
    parts = [translation.cut(*part) for part in zip(data[:2], (size.pairs, size.pairs // 6))]
    subwords = Subwords.train(
        [*parts[0].sources, *parts[0].targets], size.vocabulary, options.output / "cache"
    )
    batches = [translation.batches_of(subwords, part, size) for part in parts]
    embedding = bilingual_embedding(batches[0], len(subwords), size.features)

    def train(experts, seed):
        settings = translation.parse_options(["--experts", str(experts or 2)])
        feedforward = (
            translation.twin_feedforward if experts is None else translation.expert_feedforward
        )
        model = translation.build_model(feedforward, len(subwords), settings, size)
        model.embedding.embeddings.assign(embedding)
        folder = progress(options) / f"translation-{experts}-{seed}"
        history = training.fit(model, *batches, EPOCHS, folder)
        return course(history["val_loss"], len(batches[0]), min(history["ms_per_step"]))

    return train


def classifiers(options):
    """A function that trains a classifier and returns its course."""
    size = text_classification.SMOKE if options.smoke else text_classification.FULL
    data = datasets.load("twenty_newsgroups", options.data_dir)
    splits = [text_classification.cut(split, size.documents) for split in data[:3]]
    vocabulary = Vocabulary.learn(splits[0].texts, size.words, size.length)
    num_classes = len(data.class_names)
    arrays = [
        (vocabulary.encode(split.texts), keras.utils.to_categorical(split.labels, num_classes))
        for split in splits
    ]

    def train(experts, seed):
        epochs = 1 if options.smoke else CLASSIFIER_EPOCHS
        settings = text_classification.parse_options(
            ["--experts", str(experts or 2), "--epochs", str(epochs)]
        )

        def feedforward():
            if experts is None:
                return dense_feedforward(settings.top_k, size.hidden_dim, size.features)
            return text_classification.expert_feedforward(settings, size)

        model = text_classification.build_model(feedforward, vocabulary, size, num_classes)
        history, run = text_classification.fit(model, arrays, settings)
        steps = len(arrays[0][0]) // min(settings.batch_size, len(arrays[0][0]))
        return course(history["val_loss"], steps, run["ms_per_step"])

    return train


TASKS = {
    "language_model": language_models,
    "translation": translators,
    "classification": classifiers,
}


def print_table(task, models):
    """The time at which losses are compared is that of the dense model with the same seed."""
    print(f"\n{task:<20} {'loss, equal steps':>18} {'against dense':>22}", end=" ")
    print(f"{'loss at that time':>18} {'ms a step':>10}")
    for name, runs in models.items():
        last = [run["losses"][-1] for run in runs]
        gains = [loss - dense["losses"][-1] for loss, dense in zip(last, models[DENSE])]
        timed = [loss_at(run, dense["seconds"][-1]) for run, dense in zip(runs, models[DENSE])]
        ms = np.mean([run["ms_per_step"] for run in runs])
        span = f"{min(gains):+.4f} to {max(gains):+.4f}"
        losses, timed = (spread(values, "{:.4f}") for values in (last, timed))
        print(f"{name:<20} {losses:>18} {span:>22} {timed:>18} {ms:>10.0f}")


if __name__ == "__main__":
    main()
