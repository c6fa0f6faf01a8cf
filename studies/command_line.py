"""Options that studies share.

A study runs on the backend that KERAS_BACKEND names; JAX is the fastest on a CPU. TensorFlow
Datasets reads the data, and needs TensorFlow on every backend. The same command resumes an
interrupted run after its last epoch. Where results stay in --output, nothing is trained twice.
"""

import argparse
import pathlib


def positive(text):
    """An integer of at least 1, as the type of an option."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parser_of(doc, output, datasets=(), seeds=1):
    """A parser with the options of all studies; `seeds` is a number of runs or a list of seeds."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=output)
    parser.add_argument("--data-dir", help="folder that keeps the data; default: that of TFDS")
    parser.add_argument("--smoke", action="store_true", help="tiny models on little data")
    if isinstance(seeds, list):
        parser.add_argument("--seeds", nargs="+", type=int, default=seeds, metavar="SEED")
    else:
        parser.add_argument("--seeds", type=positive, default=seeds, help="runs to average")
    if datasets:
        parser.add_argument("--dataset", choices=datasets, default=next(iter(datasets)))
    return parser


def parse_with_models(parser, models, arguments):
    """Options with `--models`, of which the first is always trained."""
    first = next(iter(models))
    parser.add_argument(
        "--models", nargs="+", choices=models, default=[*models], metavar="MODEL",
        help=f"{'; '.join(models)}. The first is always trained.",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    options.models = [first, *(name for name in options.models if name != first)]
    return options
