"""Beam search with a model that caches what it has read.

A model takes part by two methods:

    start(inputs, max_length) -> cache            a structure of tensors (B, ...)
    step(tokens (B,), cache, position) -> (B, V) logits of the next token, and the new cache

Axes: B batch, W beams, V vocabulary, M `max_length`.
"""

import keras
from keras import ops
from resuming import HAS_XLA, say
from subwords import END, PADDING, START, pad

IMPOSSIBLE = -1e9
# Sentences that are written side by side.
ROWS = 64


def write(model, subwords, texts, shapes, beams, rows=None):
    """Translations of texts, in batches of fixed shapes.

    A text longer than the largest of the shapes is cut off.
    """
    longest, rows = shapes.lengths[-1], rows or min(ROWS, len(texts))
    sources = [row[:longest] for row in subwords.encode(texts)]
    writer = Writer(model, longest + longest // 4, beams)
    translations = [""] * len(texts)
    for bucket, length in enumerate(shapes.lengths):
        members = [n for n, row in enumerate(sources) if shapes.bucket(len(row)) == bucket]
        for first in range(0, len(members), rows):
            chosen = members[first : first + rows]
            # Rows that fill a batch up say nothing, so that they are over at once.
            filling = [[END]] * (rows - len(chosen))
            written = writer.predict_on_batch(pad([sources[n] for n in chosen] + filling, length))
            say(".", end="")
            for n, text in zip(chosen, subwords.decode(written[: len(chosen)])):
                translations[n] = text
    say(f" {len(texts)} texts written")
    return translations


class Writer(keras.Model):
    """Writes sequences by `predict_on_batch`, compiled once for each shape of its inputs."""

    def __init__(self, model, max_length, beams=1):
        super().__init__()
        self.model, self.max_length, self.beams = model, max_length, beams
        self.built = True
        self.jit_compile = HAS_XLA

    def call(self, inputs):
        return beam_search(self.model, inputs, self.max_length, self.beams)


def beam_search(model, inputs, max_length, beams):
    """(B, M) int32: the hypothesis of the highest mean log probability, then padding.

    W hypotheses are written side by side.
    """
    batch_size = ops.shape(inputs)[0]
    cache = keras.tree.map_structure(
        lambda tensor: ops.repeat(tensor, beams, axis=0), model.start(inputs, max_length)
    )
    written = ops.full((batch_size * beams, max_length), PADDING, dtype="int32")
    last = ops.full((batch_size * beams,), START, dtype="int32")
    # All beams begin alike: only the first may go on at first.
    first = ops.where(ops.arange(beams) == 0, 0.0, IMPOSSIBLE)
    scores = ops.tile(ops.expand_dims(first, 0), (batch_size, 1))
    lengths = ops.zeros((batch_size, beams), "float32")

    def write_one(position, last, written, scores, lengths, cache):
        logits, cache = model.step(last, cache, position)
        over = ops.reshape(_is_over(last), (-1, beams))
        lengths = lengths + ops.cast(~over, "float32")
        sums = ops.expand_dims(scores, -1) + _log_probabilities(logits, over)
        ranks = sums / ops.expand_dims(lengths, -1)
        vocabulary = logits.shape[-1]
        _, chosen = ops.top_k(ops.reshape(ranks, (-1, beams * vocabulary)), beams)
        scores = ops.take_along_axis(ops.reshape(sums, (-1, beams * vocabulary)), chosen, axis=1)
        parents, token = chosen // vocabulary, ops.cast(chosen % vocabulary, "int32")
        lengths = ops.take_along_axis(lengths, parents, axis=1)
        rows = ops.reshape(parents + beams * ops.expand_dims(ops.arange(batch_size), 1), (-1,))
        token = ops.reshape(token, (-1,))
        written, cache = keras.tree.map_structure(
            lambda tensor: ops.take(tensor, rows, axis=0), (written, cache)
        )
        written = ops.slice_update(written, [0, position], ops.expand_dims(token, 1))
        return position + 1, token, written, scores, lengths, cache

    def goes_on(position, last, *_):
        return ops.logical_and(position < max_length, ops.any(~_is_over(last)))

    state = (ops.zeros((), "int32"), last, written, scores, lengths, cache)
    _, _, written, scores, lengths, _ = ops.while_loop(goes_on, write_one, state)
    best = ops.argmax(scores / lengths, axis=-1)
    written = ops.reshape(written, (-1, beams, max_length))
    return ops.squeeze(ops.take_along_axis(written, ops.reshape(best, (-1, 1, 1)), axis=1), 1)


def _log_probabilities(logits, over):
    """(B, W, V) of the next token; what is over is followed by padding only."""
    log_probs = ops.reshape(ops.log_softmax(logits), (-1, over.shape[-1], logits.shape[-1]))
    only_padding = ops.where(ops.arange(logits.shape[-1]) == PADDING, 0.0, IMPOSSIBLE)
    return ops.where(ops.expand_dims(over, -1), only_padding, log_probs)


def _is_over(last):
    return ops.logical_or(ops.equal(last, END), ops.equal(last, PADDING))
