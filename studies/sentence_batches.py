"""Sentence pairs in batches of few shapes: each holds sentences of about one length."""

import typing

import keras
import numpy as np
import tensorflow as tf
from subwords import START, pad


class Shapes(typing.NamedTuple):
    """A batch holds sentences of up to one of these lengths, and about that many pieces."""

    lengths: tuple
    pieces: int

    def bucket(self, length):
        """Number of the smallest length that has room, or None."""
        return next((n for n, room in enumerate(self.lengths) if length <= room), None)

    def rows(self, bucket):
        return max(1, self.pieces // self.lengths[bucket])


class SentenceBatches(keras.callbacks.Callback):
    """The pairs in another order each epoch, the same for the same epoch.

    Among the callbacks, they know which epoch it is. Pairs longer than the largest shape are left
    out, and counted in `left_out`. The last batch of a shape is filled up with empty rows that
    weigh nothing, so that no further shape is compiled.
    """

    def __init__(self, sources, targets, shapes):
        super().__init__()
        self.sources = sources
        self.targets = targets
        self.shapes = shapes
        self.epoch = 0
        buckets = [shapes.bucket(max(map(len, pair))) for pair in zip(sources, targets)]
        self.members = [
            np.array([row for row, bucket in enumerate(buckets) if bucket == number], int)
            for number in range(len(shapes.lengths))
        ]
        self.left_out = buckets.count(None)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def __len__(self):
        return sum(
            -(-len(members) // self.shapes.rows(bucket))
            for bucket, members in enumerate(self.members)
        )

    def __iter__(self):
        generator = np.random.default_rng(self.epoch)
        batches = []
        for bucket, members in enumerate(self.members):
            order, size = generator.permutation(members), self.shapes.rows(bucket)
            batches += [(bucket, order[n : n + size]) for n in range(0, len(order), size)]
        for index in generator.permutation(len(batches)):
            yield self._batch(*batches[index])

    def _batch(self, bucket, members):
        length, size = self.shapes.lengths[bucket], self.shapes.rows(bucket)
        empty = [[]] * (size - len(members))
        source = pad([self.sources[row] for row in members] + empty, length)
        following = pad([self.targets[row] for row in members] + empty, length)
        target = np.roll(following, 1, axis=1)
        target[:, 0] = START
        weights = (following > 0).astype("float32")
        return {"source": source, "target": target * (weights > 0)}, following, weights

    def dataset(self):
        """A `tf.data.Dataset` of `({"source", "target"}, next pieces, weights)`."""
        ids = tf.TensorSpec((None, None), tf.int32)
        signature = {"source": ids, "target": ids}, ids, tf.TensorSpec((None, None), tf.float32)
        dataset = tf.data.Dataset.from_generator(lambda: self, output_signature=signature)
        return dataset.apply(tf.data.experimental.assert_cardinality(len(self)))
