"""Running text in batches of rows for a language model."""

import itertools

import keras
import numpy as np
import tensorflow as tf


def rows(texts, length):
    """(rows, length + 1) ids: the texts end to end, each row with the first id of the next.

    Args:
        texts: list of int32 arrays.
        length: ids that a row goes on by.

    Raises:
        ValueError: If the texts fill no row.
    """
    ids = np.concatenate(texts)
    number = (len(ids) - 1) // length
    if number < 1:
        raise ValueError(
            f"The texts must fill a row of {length + 1} subwords. Received: {len(ids)} subwords. "
            "Choose a larger data set."
        )
    return np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length][:number]


class Batches(keras.callbacks.Callback):
    """Endless batches of rows. Among the callbacks, they begin where training begins.

    Args:
        rows: (rows, length + 1) ids.
        batch_size: rows of a batch.
        steps: batches of an epoch.
        seed: of the order, which is another one in each pass.

    Raises:
        ValueError: If there are fewer rows than a batch holds.
    """

    def __init__(self, rows, batch_size, steps, seed):
        super().__init__()
        if len(rows) < batch_size:
            raise ValueError(
                "There must be text for one batch at least. Received: "
                f"{len(rows)} rows, batch_size={batch_size}. Pass a smaller --batch-size."
            )
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
            yield chosen[:, :-1], chosen[:, 1:]
