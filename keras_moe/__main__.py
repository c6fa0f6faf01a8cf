"""Command line: summaries and reports of saved models.

    python -m keras_moe inspect model.keras
    python -m keras_moe report model.keras --data inputs.npy

The model is loaded on the backend that KERAS_BACKEND names, wherever it was saved.
"""

import argparse
import importlib
import pathlib
import sys
import warnings
from typing import NoReturn

import keras
import numpy as np

from keras_moe import report, summary
from keras_moe._internal.plain_text import as_text, describe, stating


def main(arguments=None):
    options = _parse(arguments)
    try:
        for name in options.modules:
            with stating("`--import` must name a module that Python can import.", repr(name)):
                importlib.import_module(name)
        options.command(options)
    except Exception as error:
        if options.debug:
            raise
        _fail(f"{describe(error).rstrip('.')}. Pass --debug to see the traceback.")


def _fail(message) -> NoReturn:
    """End the process with one line on standard error and exit code 2."""
    print(f"error: {as_text(message)}", file=sys.stderr)
    raise SystemExit(2)


class _OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it."""

    def error(self, message) -> NoReturn:
        _fail(f"{message}. `{self.prog} --help` lists the arguments.")


def _parse(arguments):
    parser = _OneLineParser(
        prog="python -m keras_moe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(modules=(), debug=True, command=lambda options: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND")
    inspecting = commands.add_parser("inspect", help="print layers, sizes and counters")
    inspecting.set_defaults(command=lambda options: summary(_load_model(options.model)))
    reporting = commands.add_parser("report", help="write an HTML page about the experts")
    reporting.set_defaults(command=_report)
    modules: dict = {"dest": "modules", "action": "append", "default": [], "metavar": "MODULE"}
    for command in (inspecting, reporting):
        command.add_argument("model", type=pathlib.Path, help="a saved model, .keras")
        command.add_argument("--import", **modules, help="Python module with its custom layers")
        command.add_argument("--debug", action="store_true", help="end errors in a traceback")
    add, path = reporting.add_argument, pathlib.Path
    add("--data", type=path, required=True, help="inputs: .npy of an array, or .npz by their names")
    add("--labels", type=path, help="one for each document: .npy, or lines of text")
    add("--tokens", type=path, help="text to show, one document a line")
    add("--output", type=path, default=path("report.html"), help="HTML file; default: report.html")
    return parser.parse_args(arguments)


def _report(options):
    read = (options.model, options.data, options.labels, options.tokens)
    if options.output.resolve() in [path.resolve() for path in read if path is not None]:
        rule = "`--output` must not be a file that is read: the page would replace it"
        raise ValueError(f"{rule}. Received: {str(options.output)!r}")
    data, labels, tokens = map(_read, read[1:])
    model = _load_model(options.model)
    print(f"The report is in {report(model, data, labels, tokens, options.output)}.")


def _load_model(path):
    rule = "A model must be a whole file of `model.save` that this version of Keras can load."
    fix = "Save it again with this version, or name the module of its custom classes by `--import`."
    with stating(rule, repr(str(path)), fix), warnings.catch_warnings():
        # Weights that Keras does not find it leaves as they were initialized.
        warnings.filterwarnings("error", "Skipping nested container|A total of")
        return keras.saving.load_model(path, compile=False)


def _read(path):
    """An array, a dict of arrays or a list of lines, by the file's suffix."""
    if path is None:
        return None
    rule = "A file must be a whole .npy or .npz without pickled objects, or lines of UTF-8 text."
    with stating(rule, repr(str(path))):
        if path.suffix not in (".npy", ".npz"):
            return path.read_text(encoding="utf-8").splitlines()
        with path.open("rb") as file:  # NumPy leaves a file open that it cannot read.
            loaded = np.load(file)
            return loaded if isinstance(loaded, np.ndarray) else dict(loaded)


if __name__ == "__main__":
    main()
