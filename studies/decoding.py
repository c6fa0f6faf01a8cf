"""Writing sequences with a model that remembers what it has read: greedily, or with beams.

A model takes part by two methods:

    start(inputs, max_length) -> cache            a structure of tensors (B, ...)
    step(tokens (B,), cache, position) -> (B, V) logits of the next token, and the new cache

Axes: B batch, W beams, V vocabulary, M `max_length`.
"""

import keras
from keras import ops
from subwords import END, PADDING, START

IMPOSSIBLE = -1e9


class Writer(keras.Model):
    """Writes sequences by `predict_on_batch`, compiled once for each shape of its inputs.

    Args:
        model: what has `start` and `step`.
        max_length: number of tokens to write at most, M.
        beams: number of hypotheses that are followed, W.
        length_penalty: hypotheses of the length n compete by their log probability divided by
            `n ** length_penalty`.

    Returns:
        (B, M) int32: the best hypothesis of each row, up to and with `END`, then padding.
    """

    def __init__(self, model, max_length, beams=1, length_penalty=1.0):
        super().__init__()
        self.model = model
        self.max_length = max_length
        self.beams = beams
        self.length_penalty = length_penalty
        self.built = True
        # PyTorch's compiler would take longer than it saves.
        self.jit_compile = keras.backend.backend() != "torch"

    def call(self, inputs):
        if self.beams == 1:
            return greedy_search(self.model, inputs, self.max_length)
        return beam_search(self.model, inputs, self.max_length, self.beams, self.length_penalty)


def greedy_search(model, inputs, max_length):
    """The most likely token, again and again: (B, M)."""
    cache = model.start(inputs, max_length)
    batch_size = ops.shape(inputs)[0]
    written = ops.full((batch_size, max_length), PADDING, dtype="int32")
    last = ops.full((batch_size,), START, dtype="int32")

    def write(position, last, written, cache):
        logits, cache = model.step(last, cache, position)
        token = ops.where(_is_over(last), PADDING, ops.cast(ops.argmax(logits, -1), "int32"))
        return position + 1, token, _put(written, token, position), cache

    def goes_on(position, last, written, cache):
        return ops.logical_and(position < max_length, ops.any(~_is_over(last)))

    return ops.while_loop(goes_on, write, (_zero(), last, written, cache))[2]


def beam_search(model, inputs, max_length, beams, length_penalty=1.0):
    """The best of `beams` hypotheses that are written side by side: (B, M)."""
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

    def write(position, last, written, scores, lengths, cache):
        logits, cache = model.step(last, cache, position)
        over = ops.reshape(_is_over(last), (-1, beams))
        lengths = lengths + ops.cast(~over, "float32")
        sums = ops.expand_dims(scores, -1) + _log_probabilities(logits, over)
        ranks = sums / ops.expand_dims(lengths**length_penalty, -1)
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
        return position + 1, token, _put(written, token, position), scores, lengths, cache

    def goes_on(position, last, *_):
        return ops.logical_and(position < max_length, ops.any(~_is_over(last)))

    state = (_zero(), last, written, scores, lengths, cache)
    _, _, written, scores, lengths, _ = ops.while_loop(goes_on, write, state)
    best = ops.argmax(scores / lengths**length_penalty, axis=-1)
    written = ops.reshape(written, (-1, beams, max_length))
    return ops.squeeze(ops.take_along_axis(written, ops.reshape(best, (-1, 1, 1)), axis=1), 1)


def _log_probabilities(logits, over):
    """(B, W, V) of the next token; what is over is followed by padding only."""
    log_probs = ops.reshape(ops.log_softmax(logits), (-1, over.shape[-1], logits.shape[-1]))
    only_padding = ops.where(ops.arange(logits.shape[-1]) == PADDING, 0.0, IMPOSSIBLE)
    return ops.where(ops.expand_dims(over, -1), only_padding, log_probs)


def _is_over(last):
    return ops.logical_or(ops.equal(last, END), ops.equal(last, PADDING))


def _put(written, token, position):
    return ops.slice_update(written, [0, position], ops.expand_dims(token, 1))


def _zero():
    return ops.zeros((), "int32")
