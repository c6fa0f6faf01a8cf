"""The page that shows what the experts of a model do on some data."""

from keras_moe._internal.files import write_whole
from keras_moe._internal.validation import check_path


def report(model, data, labels=None, tokens=None, path="report.html"):
    """Write one self-contained HTML page about the experts of a model.

    It opens without a network and shows verdicts with what to try, a table of the layers, plots,
    and the text coloured by the expert that served each token, with weights and probabilities under
    the mouse or the arrow keys. The model runs on all of the data, and all are shown: pass a few
    hundred documents, not all you have. For a model without MoE layers
    the page says that it has none.

    Layers that see different tokens, as the encoder and decoder of a translator do, take their own
    `labels` and `tokens`: a dict of them by the name of the layer.

    Needs matplotlib: `pip install matplotlib`.

    Args:
        model: a Keras model.
        data: all documents at once, as `model.predict` takes them: an array, or a list or dict of
            arrays for a model with several inputs. `surgery` and `inspection` take lists of batches
            instead.
        labels: integers or strings, one for each document or (documents, positions), or None.
        tokens: strings to show, for each document a list or a text that is split at blanks; None
            shows integer data as they are. Where a layer sees fewer positions than there are
            tokens, each position shows the neighbours it stands for.
        path: file to write; it is whole or not there.

    Returns:
        The path, a `pathlib.Path`.

    Raises:
        ValueError: If `data` is empty or not what the model takes, or `labels` or `tokens` do not
            fit it, or are of a layer that the model does not have.
        ImportError: If matplotlib is missing.

    Example:

    >>> import tempfile
    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> model = keras.Sequential([
    ...     keras.layers.Embedding(100, 16), keras_moe.layers.MixtureOfExperts(experts, name="moe")
    ... ])
    >>> data = keras.ops.convert_to_numpy(keras.random.randint((8, 10), 0, 100))
    >>> path = keras_moe.report(model, data, path=f"{tempfile.mkdtemp()}/report.html")
    """
    path = check_path("path", path)
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise ValueError(
            "`path` must name a file in a folder that exists. Received: "
            f"path={str(path)!r}. Make the folder first, or name another."
        )
    # Here, so that the package can be imported without matplotlib.
    from keras_moe.reporting import page, study

    found = study.study(model, data, labels, tokens)
    write_whole(path, page.render(model.name, found))
    return path


__all__ = ["report"]
