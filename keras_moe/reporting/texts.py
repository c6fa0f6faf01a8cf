"""The text at each position of a layer."""

import keras
import numpy as np

from keras_moe._internal.checks import shortened


def token_texts(tokens, arrays, positions, num_documents):
    """One string for each token of a layer, documents one after the other.

    Args:
        tokens: for each document a list of strings or a text, or None.
        arrays: the data.
        positions: those that the layer has in each document; 0 if its tokens are not laid out so.
        num_documents: number of documents.
    """
    if not positions:
        return []
    if tokens is None:
        documents, length = _from_data(arrays, positions, num_documents)
    else:
        documents = [text.split() if isinstance(text, str) else _listed(text) for text in tokens]
        lengths = [array.shape[1] for array in keras.tree.flatten(arrays) if array.ndim > 1]
        length = max([length for length in lengths if length % positions == 0], default=positions)
    size = max(length // positions, 1)
    return [
        " ".join(map(_as_text, document[place * size : (place + 1) * size]))
        for document in documents
        for place in range(positions)
    ]


def _listed(text):
    if not hasattr(text, "__iter__"):
        raise ValueError(
            "`tokens` must hold a text or a list of strings for each document. "
            f"Received: {shortened(text)}"
        )
    return list(text)


def _as_text(token):
    """The text of a token; of an array (N, L, 1) or a nested list without brackets."""
    parts = keras.tree.flatten(token.tolist() if hasattr(token, "tolist") else token)
    return " ".join(map(str, parts))


def _from_data(arrays, positions, num_documents):
    """Integers as they are; else the number of the position."""
    for array in keras.tree.flatten(arrays):
        if array.ndim == 2 and np.issubdtype(array.dtype, np.integer):
            return array.tolist(), array.shape[1]
    return [[f"#{place}" for place in range(positions)]] * num_documents, positions
