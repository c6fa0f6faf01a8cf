"""Running text in batches of rows for a language model."""

import itertools

import keras
import numpy as np
import tensorflow as tf


def rows(texts, length):
    """(rows, length + 1) ids: the texts end to end, each row with the first id of the next."""
    ids = np.concatenate(texts)
    number = (len(ids) - 1) // length
    return np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length][:number]


def shifted(rows):
    """Inputs and targets: each id and the one that follows it."""
    return rows[:, :-1], rows[:, 1:]


class Batches(keras.callbacks.Callback):
    """Endless batches of rows, in another order in each pass.

    Among the callbacks, they begin where training begins. An epoch has `steps` batches.
    """

    def __init__(self, rows, batch_size, steps, seed):
        super().__init__()
        self.rows, self.batch_size, self.steps, self.seed = rows, batch_size, steps, seed
        self._epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def dataset(self):
        """Pairs of ids and following ids, both (batch_size, length)."""
        # XLA uses all cores only where sizes are known when TensorFlow traces the step.
        shape = tf.TensorSpec((self.batch_size, self.rows.shape[1] - 1), "int32")
        return tf.data.Dataset.from_generator(self._from_here, output_signature=(shape, shape))

    def _from_here(self):
        batches_a_pass = len(self.rows) // self.batch_size
        for step in itertools.count(self._epoch * self.steps):
            passes, batch = divmod(step, batches_a_pass)
            order = np.random.default_rng([self.seed, passes]).permutation(len(self.rows))
            chosen = self.rows[order[batch * self.batch_size :][: self.batch_size]]
            yield shifted(chosen)
