"""Does a mixture of experts beat a dense model of the same active size, and at the same cost?

    python studies/moe_vs_dense.py
    python studies/moe_vs_dense.py --seeds 3
    python studies/moe_vs_dense.py --tasks classification --experts 8

Trains dense models and mixtures with more and more experts, two of which serve each token, on the
same data in the same order: shorter runs of the language models of the study `language_model.py`,
of the translators of `translation.py` and of the classifiers of `text_classification.py`. The table
gives the validation loss after equal steps, and the loss that the same run had when the dense model
had ended; the plot draws all losses by steps and by time.

Runs on the backend that KERAS_BACKEND names. Language models and translators that are interrupted
resume when the same command is given again.
"""

import functools

import keras
import language_model
import plots
import resuming
import text_classification
import translation
from command_line import parser_of, positive
from comparisons import course, loss_at, print_runs
from files import claim, write_json

DENSE = "dense"
# A third of the studies' own runs and less: there are many of them here.
EPOCHS = 3
LANGUAGE_MODEL = language_model.FULL._replace(steps=100, epochs=EPOCHS)
# A third epoch of a classifier changes little.
CLASSIFIER_EPOCHS = 2
TRANSLATION = translation.FULL._replace(pairs=3000)


def main(arguments=None):
    options = parse_options(arguments)
    claim(options.output)
    commanded = (options.smoke, options.tasks, options.experts, options.seeds)
    settings = (*commanded, LANGUAGE_MODEL, TRANSLATION, EPOCHS)
    progress = options.output / "progress" / resuming.digest(*settings)
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
                run = train(experts, seed, progress / f"{task}-{experts}-{seed}")
                results[task][name].append(run)
    for task, models in results.items():
        print_losses(task, models)
    write_json(options.output / "results.json", results)
    plots.courses(results, options.output / "moe_vs_dense.png")
    resuming.forget(progress)
    print(f"\nPicture and results are in {options.output}.")
    return results


def parse_options(arguments):
    parser = parser_of(__doc__, "output_moe_vs_dense")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], metavar="TASK")
    parser.add_argument("--experts", nargs="*", type=positive, default=[4, 8, 16, 32])
    return parser.parse_args(arguments)


def language_models(options):
    """A function that trains a language model and returns its course."""
    size = language_model.SMOKE if options.smoke else LANGUAGE_MODEL
    num_tokens, data = language_model.load_data("twenty_newsgroups", options, size)

    def train(experts, seed, folder):
        sparse = experts is not None
        model = language_model.make_model(num_tokens, size, experts or 16, sparse)
        history = language_model.fit(model, data, seed, size, folder)
        return course(history["val_loss"], size.steps, min(history["ms_per_step"]))

    return train


def translators(options):
    """As `language_models`, for translators."""
    size = translation.SMOKE if options.smoke else TRANSLATION
    subwords, (train_pairs, validation, _) = translation.load_data("bible_es_en", options, size)
    # A sixth to validate on: it is done after every epoch of every run.
    validation = translation.cut(validation, size.pairs // 6)
    batches = [translation.batches_of(subwords, part, size) for part in (train_pairs, validation)]

    def train(experts, seed, folder):
        sparse = experts is not None
        setting = translation.Setting(experts=experts or 2)
        model = translation.build_model(setting, batches[0], len(subwords), size, sparse)
        history = translation.fit(model, *batches, EPOCHS, folder)
        return course(history["val_loss"], len(batches[0]), min(history["ms_per_step"]))

    return train


def classifiers(options):
    """As `language_models`, for classifiers, which are trained again."""
    size = text_classification.SMOKE if options.smoke else text_classification.FULL
    data = text_classification.load("twenty_newsgroups", options.data_dir, size)

    def train(experts, seed, folder):
        feedforward = functools.partial(text_classification.feedforward_of, experts, size)
        model = text_classification.build_model(
            feedforward, data.vocabulary, size, len(data.class_names)
        )
        epochs = 1 if options.smoke else CLASSIFIER_EPOCHS
        history, run = text_classification.fit(model, data.arrays, epochs)
        documents = len(data.arrays[0][0])
        steps = documents // min(text_classification.BATCH_SIZE, documents)
        return course(history["val_loss"], steps, run["ms_per_step"])

    return train


TASKS = {
    "language_model": language_models,
    "translation": translators,
    "classification": classifiers,
}


def print_losses(task, models):
    """The time at which losses are compared is that of the dense model with the same seed."""
    compared: dict = {name: [] for name in models}
    for name, runs in models.items():
        for run, dense in zip(runs, models[DENSE]):
            loss, then = run["losses"][-1], loss_at(run, dense["seconds"][-1])
            gain = loss - dense["losses"][-1]
            compared[name].append({**run, "loss": loss, "gain": gain, "then": then})
    columns = {
        "loss, equal steps": ("{:.4f}", "loss"),
        "against dense": (lambda gains: f"{min(gains):+.4f} to {max(gains):+.4f}", "gain"),
        "loss at that time": ("{:.4f}", "then"),
        "ms a step": ("{:.0f}", "ms_per_step"),
    }
    print_runs(task, compared, columns)


if __name__ == "__main__":
    main()
