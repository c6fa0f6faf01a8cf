"""HTML page about the experts of a model on some data."""

import os
import pathlib
from typing import Any

import keras

__all__ = ["report"]


def report(
    model: keras.Model,
    data: Any,
    labels: Any = None,
    tokens: Any = None,
    path: str | os.PathLike = "report.html",
) -> pathlib.Path:
    """Write one self-contained HTML page about the experts of a model, and return its path.

    It shows verdicts with what to try, a table of the layers, the text coloured by the expert that
    got each token, typical words, and plots. All data are shown: pass a few hundred documents.

    Args:
        model: A Keras model.
        data: Array or nested list, or a list or dict of arrays for a model with several inputs. All
            documents at once, as `model.predict` takes them, not in batches.
        labels: Integers or strings, one for each document or (documents, positions), or None.
        tokens: Strings to show, for each document a list or a text that is split at blanks, or
            None, which shows integer data as they are. Layers that see different tokens take a dict
            of `tokens` or `labels` by the name of the layer.
        path: String or path. File to write. If that fails, an existing file stays as it was.

    A ValueError is raised if the model has no MoE layer, or `data`, `labels` or `tokens` do not
    fit, an ImportError if matplotlib is missing.

    Example:

    >>> path = keras_moe.report(model, data=[[5, 6, 7], [8, 9, 10]])  # doctest: +SKIP
    """
    path = pathlib.Path(path)
    # Before the model runs. A device or a pipe would be replaced by the file.
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        rule = "`path` must name a file in a folder that exists"
        raise ValueError(f"{rule}. Received: path={str(path)!r}")
    # Here, so that the package can be imported without matplotlib.
    from keras_moe.reporting import page

    num_documents, found = page.study(model, data, labels, tokens)
    text = page.render(model.name, num_documents, found)
    part = path.with_name(f".{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
