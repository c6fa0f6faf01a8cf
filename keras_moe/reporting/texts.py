"""The text at each position of a layer."""

import keras
import numpy as np

from keras_moe._internal.validation import shortened


def positions_of(routing, num_documents):
    """Positions a layer has in each document; 0 if its tokens are not laid out by document."""
    num_tokens = len(routing.mask)
    return num_tokens // num_documents if num_tokens % num_documents == 0 else 0


def token_texts(tokens, arrays, positions, num_documents):
    """One string for each token of a layer, documents one after the other.

    Args:
        tokens: for each document a list of strings or a text, or None.
        arrays: the data.
        positions: what `positions_of` says.
        num_documents: number of documents.
    """
    if not positions:
        return []
    if tokens is None:
        documents, length = _from_data(arrays, positions, num_documents)
    else:
        if getattr(getattr(tokens, "dtype", None), "kind", "U") not in "biuSUO":
            raise ValueError(
                "`tokens` must be texts, or integers as texts. Received: an array of "
                f"{tokens.dtype}. Pass for each document a list of strings."
            )
        for text in tokens:
            if not hasattr(text, "__iter__") or getattr(text, "shape", None) == ():
                raise ValueError(
                    "Each entry of `tokens` must be a text or a list of strings. "
                    f"Received: {shortened(text)}. Put it into a list."
                )
        documents = [text.split() if isinstance(text, str) else list(text) for text in tokens]
        length = _length(arrays, positions)
    size = max(length // positions, 1)
    return [
        " ".join(map(_as_text, document[place * size : (place + 1) * size]))
        for document in documents
        for place in range(positions)
    ]


def _as_text(token):
    """What is written for a token: of an array (N, L, 1) or a nested list, without brackets."""
    parts = keras.tree.flatten(token.tolist() if hasattr(token, "tolist") else token)
    return " ".join(map(str, parts))


def _from_data(arrays, positions, num_documents):
    """Integers as they are; else the number of the position."""
    for array in keras.tree.flatten(arrays):
        if array.ndim == 2 and np.issubdtype(array.dtype, np.integer):
            return array.tolist(), array.shape[1]
    return [[f"#{place}" for place in range(positions)]] * num_documents, positions


def _length(arrays, positions):
    """Tokens in a document: the second axis of the data."""
    lengths = [array.shape[1] for array in keras.tree.flatten(arrays) if array.ndim > 1]
    return max([length for length in lengths if length % positions == 0], default=positions)
