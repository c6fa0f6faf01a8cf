"""Options of the studies, and checks of them before anything is computed."""

import argparse
import pathlib

import datasets

from keras_moe._internal.checks import check_integer as check_positive_integer


def parser_of(doc, dataset, data, experts, units="documents"):
    """A parser with the options that all studies of texts have.

    Args:
        doc: docstring of the study, whose first line describes it.
        dataset: name of the default data.
        data: what other data there are, for the help.
        experts: default number of experts.
        units: what a tiny model is trained on.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--dataset", default=dataset, help=data)
    parser.add_argument("--data-dir", help="folder that keeps the data; default: that of TFDS")
    parser.add_argument("--experts", type=int, default=experts)
    parser.add_argument("--seeds", type=int, default=1, help="number of runs to average")
    parser.add_argument("--smoke", action="store_true", help=f"a tiny model on a few {units}")
    return parser


def parse_comparison(arguments, doc, models, output, sizes=()):
    """The options of a study that compares models with the first of them on manual pages.

    Args:
        arguments: list of strings; None: those of the command line.
        doc: docstring of the study, whose first line describes it.
        models: names of the models.
        output: name of the default folder.
        sizes: names of the sizes, the default one first.

    Raises:
        SystemExit: If options do not fit.
    """
    first = next(iter(models))
    default_size = next(iter(sizes), None)
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", choices=models, default=[*models], metavar="MODEL",
        help=f"{'; '.join(models)}. The first is always trained.",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--dataset", default="manual_pages", help=datasets.HELP)
    parser.add_argument("--data-dir", help="folder that keeps the data; default: that of TFDS")
    if sizes:
        parser.add_argument("--size", choices=sizes, help=f"of the models; default: {default_size}")
    parser.add_argument("--smoke", action="store_true", help="tiny models on a few documents")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(output))
    options = parser.parse_args(arguments)
    if sizes:
        if options.smoke and options.size:
            parser.error(
                "--smoke has a size of its own. Received: --smoke "
                f"--size {options.size}. Leave out --size."
            )
        options.size = options.size or default_size
    options.models = [first, *(name for name in options.models if name != first)]
    return options


def check_numbers(options, *names):
    """Refuse what is not a positive integer.

    Raises:
        ValueError: If an option is 0 or less.
    """
    for name in names:
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            check_positive_integer(f"--{name.replace('_', '-')}", number)
