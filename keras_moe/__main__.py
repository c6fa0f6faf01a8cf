"""Looks into saved models.

    python -m keras_moe inspect model.keras
    python -m keras_moe report model.keras --data inputs.npy

The model is loaded on the backend that KERAS_BACKEND names, wherever it was saved.
"""

import argparse
import importlib
import pathlib
import zipfile

import keras
import numpy as np

from keras_moe import inspection, metrics, report, summary


def main(arguments=None):
    options = _parse(arguments)
    for name in options.modules:
        importlib.import_module(name)
    model = keras.saving.load_model(options.model, compile=False)
    options.command(model, options)


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m keras_moe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
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
    reporting.add_argument(
        "--data",
        type=_file,
        required=True,
        help="what the model takes: .npy of one array, or .npz of arrays by the names of inputs",
    )
    reporting.add_argument("--labels", type=_file, help="one a document: .npy, or lines of text")
    reporting.add_argument("--tokens", type=_file, help="text with one document a line, to show")
    reporting.add_argument("--output", type=pathlib.Path, default=pathlib.Path("report.html"))
    return parser.parse_args(arguments)


def _file(name):
    path = pathlib.Path(name)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name!r}")
    return path


def _model_file(name):
    path = _file(name)
    if not zipfile.is_zipfile(path):
        raise argparse.ArgumentTypeError(f'{name!r} was not written by `model.save("....keras")`')
    return path


def _inspect(model, options):
    layers = summary.summarize(model)
    total, active = summary.count_parameters(model)
    print(f"{model.name}: {total:,} parameters, {active:,} of them active for a token\n")
    header = ("layer", "experts", "parameters", "active", "FLOPs a token", "busiest", "dead")
    rows = [(*header, "engine"), *map(_row, layers, inspection.describe(model))]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        print(name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:])), sep="  ")
    if not any(sum(layer.counts) for layer in layers):
        print("\nThe counters are empty: save a model in training to see them.")


def _row(layer, description):
    used = sum(layer.counts) > 0
    busiest = float(metrics.load_imbalance(layer.counts)) + 1
    return (
        layer.name,
        f"{layer.top_k} of {layer.num_experts}",
        f"{layer.parameters:,}",
        f"{layer.active_parameters:,}",
        f"{layer.flops:,}",
        f"{busiest:.2f} x fair" if used else "-",
        str(layer.counts.count(0)) if used else "-",
        f"{description.engine or '-'} ({description.platform})",
    )


def _report(model, options):
    tokens = None if options.tokens is None else _read(options.tokens)
    labels = None if options.labels is None else _read(options.labels)
    path = report(model, _read(options.data), labels, tokens, options.output)
    print(f"The report is in {path}.")


def _read(path):
    """An array, a dict of arrays, or a list of lines, by the end of the file's name."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".npz":
        return dict(np.load(path))
    return path.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    main()
