"""What the experts of a translator see, and which of them serve which kinds of pieces."""

import collections

import numpy as np
from subwords import END, START

from keras_moe import inspection

KINDS = ("begin and end", "punctuation", "number", "name", "frequent word", "word", "inner piece")
FREQUENT = 100


def usage_by_kind(model, subwords, batches):
    """(kinds, experts) assignment counts of each MoE layer of a translator, over one batch.

    Args:
        model: a `Translator`.
        subwords: `Subwords`.
        batches: `SentenceBatches`, whose first batch is taken.
    """
    inputs, _, _ = next(iter(batches))
    kind = kind_of_each(subwords, frequent_pieces(batches))
    seen = ids_by_layer(model, inputs)
    usage = {}
    for name, (routing,) in inspection.record_routings(model, [inputs]).items():
        counts = np.zeros((len(KINDS), len(routing.counts)), int)
        kinds = kind[seen[name].reshape(-1)]
        for choice in routing.indices.T:
            served = routing.mask & (choice >= 0)
            np.add.at(counts, (kinds[served], choice[served]), 1)
        usage[name] = counts
    return usage


def ids_by_layer(model, inputs):
    """The ids (B, length) that each MoE layer sees: source in encoders, target in decoders."""
    encoder = {id(block.feedforward) for block in model.encoder}
    return {
        name: inputs["source" if id(layer) in encoder else "target"]
        for name, layer in inspection.moe_layers(model).items()
    }


def frequent_pieces(batches):
    counts = collections.Counter()
    for row in (*batches.sources, *batches.targets):
        counts.update(map(int, row))
    return {index for index, _ in counts.most_common(FREQUENT)}


def kind_of_each(subwords, frequent):
    """(V,) number of the kind of each piece of the vocabulary."""
    return np.array([KINDS.index(_kind(subwords, n, n in frequent)) for n in range(len(subwords))])


def _kind(subwords, index, frequent):
    if index in (START, END):
        return "begin and end"
    piece = subwords.piece(index)
    letters = piece.lstrip("▁")
    if not any(character.isalnum() for character in letters):
        return "punctuation"
    if letters[0].isdigit():
        return "number"
    if not piece.startswith("▁"):
        return "inner piece"
    if letters[0].isupper():
        return "name"
    return "frequent word" if frequent else "word"
