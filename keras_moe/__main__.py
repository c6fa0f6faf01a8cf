"""Looks into saved models.

    python -m keras_moe inspect model.keras
    python -m keras_moe report model.keras --data inputs.npy

The model is loaded on the backend that KERAS_BACKEND names, wherever it was saved.
"""

import argparse
import importlib
import pathlib
import zipfile

import numpy as np

from keras_moe import inspection, report, summary
from keras_moe._internal import saved_models
from keras_moe._internal.batches import check_inputs
from keras_moe._internal.command_line import OneLineParser, one_line_errors, stating
from keras_moe._internal.tensor_checks import fits


def main(arguments=None):
    options = _parse(arguments)
    with one_line_errors(options.debug):
        for name in options.modules:
            with stating(
                "`--import` must name a module that Python can import.",
                repr(name),
                "Put its folder on PYTHONPATH, or mend the module.",
            ):
                importlib.import_module(name)
        options.command(options)


def _parse(arguments):
    parser = OneLineParser(
        prog="python -m keras_moe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    inspecting = commands.add_parser("inspect", help="print layers, sizes and counters")
    inspecting.set_defaults(command=_inspect)
    reporting = commands.add_parser("report", help="write an HTML page about the experts")
    reporting.set_defaults(command=_report)
    for command in (inspecting, reporting):
        command.add_argument("model", type=_model_file, help="a saved model, .keras")
        command.add_argument(
            "--import",
            dest="modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="Python module that registers layers of the model's own",
        )
        command.add_argument("--debug", action="store_true", help="end errors in a traceback")
    reporting.add_argument(
        "--data",
        type=_file,
        required=True,
        help="what the model takes: .npy of one array, or .npz of arrays by the names of inputs",
    )
    reporting.add_argument("--labels", type=_file, help="one a document: .npy, or lines of text")
    reporting.add_argument("--tokens", type=_file, help="text with one document a line, to show")
    reporting.add_argument(
        "--output",
        type=_new_file,
        default=pathlib.Path("report.html"),
        help="HTML file to write; default: report.html",
    )
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        # By the command itself, whose help lists its arguments.
        commands.choices[options.name].error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def _file(name):
    path = pathlib.Path(name)
    if not path.is_file():
        # It may be a folder, a device or a pipe.
        received = f"{name!r}, which is none" if path.exists() else f"there is no file {name!r}"
        raise argparse.ArgumentTypeError(
            f"a file must exist to be read. Received: {received}. Check the name"
        )
    return path


def _model_file(name):
    path = _file(name)
    if not zipfile.is_zipfile(path):
        raise argparse.ArgumentTypeError(
            f"a model must be a whole file in Keras's own format. Received: {name!r}, which is "
            'none. Write it by `model.save("....keras")`'
        )
    return path


def _new_file(name):
    path = pathlib.Path(name)
    try:
        is_place = "\0" not in name and path.parent.is_dir()
        # A device or a pipe would be replaced by the file.
        is_place = is_place and (path.is_file() or not path.exists())
    except OSError:  # a name that is too long
        is_place = False
    if not is_place:
        raise argparse.ArgumentTypeError(
            f"a file in a folder that exists must be named. Received: {name!r}. Make the folder "
            "first, or name another"
        )
    return path


def _inspect(options):
    summary(saved_models.load(options.model))


def _check_output(options):
    """Refuse to write the page over a file that is read."""
    for read in (options.model, options.data, options.labels, options.tokens):
        if read is not None and options.output.exists() and options.output.samefile(read):
            raise ValueError(
                "`--output` must not be a file that is read: the page would replace it. Received: "
                f"{str(options.output)!r} for both. Name another file."
            )


def _report(options):
    _check_output(options)
    # First what is quick to find wrong. A package that is missing is named by an error of its own.
    importlib.import_module("keras_moe.visualization")
    data = _read_data(options.data)
    tokens = None if options.tokens is None else _read(options.tokens)
    labels = None if options.labels is None else _read(options.labels)
    model = saved_models.load(options.model)
    inspection.moe_layers(model)
    _check_inputs(model, data)
    with stating(
        "The model must run on the data, and the page be written.",
        f"{str(options.data)!r} for {str(options.output)!r}",
        "Pass data like those it was trained on, and a folder that can be written to.",
    ):
        path = report(model, data, labels, tokens, options.output)
    print(f"The report is in {path}.")


def _read_data(path):
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(
            f"`--data` must be a .npy or .npz file. Received: {str(path)!r}. Write it by "
            "`numpy.save` or `numpy.savez`."
        )
    return _read(path)


def _read(path):
    """An array, a dict of arrays, or a list of lines, by the end of the file's name."""
    if path.suffix in (".npy", ".npz"):
        with stating(
            "A .npy or .npz file must hold arrays of numbers or strings, without pickled objects.",
            repr(str(path)),
            "Write it by `numpy.save` or `numpy.savez`.",
        ):
            # NumPy leaves a file open that it cannot read.
            with path.open("rb") as file:
                loaded = np.load(file)
                if isinstance(loaded, np.ndarray) != (path.suffix == ".npy"):
                    raise ValueError(f"its content is not that of a {path.suffix}: rename it")
                return loaded if path.suffix == ".npy" else dict(loaded)
    with stating(
        "A text file must be UTF-8.", repr(str(path)), "Save it as UTF-8, one document a line."
    ):
        return path.read_text(encoding="utf-8").splitlines()


def _check_inputs(model, data):
    """The data against the inputs of a model that says what they are."""
    inputs = {tensor.name: tensor.shape for tensor in getattr(model, "inputs", None) or ()}
    arrays = data
    if not isinstance(data, dict):
        arrays = dict.fromkeys(inputs, data) if len(inputs) == 1 else {"": data}
    if not inputs:
        return
    given = {name: array.shape for name, array in arrays.items()}
    fit = given.keys() == inputs.keys() and all(fits(given[n], inputs[n]) for n in given)
    numbers = all(array.dtype.kind in "biuf" for array in arrays.values())
    if not fit or not numbers:
        raise ValueError(
            "`--data` must hold what the model takes: numbers of these shapes by the names of "
            f"inputs, {inputs}. Received: {given} of "
            f"{' and '.join(sorted({str(array.dtype) for array in arrays.values()}))}. Change the "
            "file."
        )
    check_inputs("--data", data, model)


if __name__ == "__main__":
    main()
