"""Replicas of `tf.distribute`. Their counters are summed when they are read."""

import contextlib
import threading

import tensorflow as tf

from keras_moe._internal.keras_internals import current_model
from keras_moe.backend.base import Devices


class TensorFlowDevices(Devices):
    def num_replicas(self):
        replica = tf.distribute.get_replica_context()
        return 1 if replica is None else replica.num_replicas_in_sync

    def sum(self, values):
        return self._across_replicas(
            values, lambda replica: replica.all_reduce(tf.distribute.ReduceOp.SUM, values)
        )

    def gather(self, values):
        return self._across_replicas(values, lambda replica: replica.all_gather(values, axis=0))

    def _across_replicas(self, values, collective):
        if self.num_replicas() == 1:
            return values
        with _other_losses_kept():
            return collective(tf.distribute.get_replica_context())

    def split_experts(self, experts, data):
        rule = "Keras splits no weights on TensorFlow: use `tf.distribute.MirroredStrategy`"
        raise ValueError(f"{rule}. Received: keras.backend.backend()='tensorflow'")

    def separate_losses(self, layer):
        # Keras keeps one list in each layer, and traces replicas in threads: while one waits for
        # others in a collective operation, theirs would replace or join its losses.
        layer._losses = _LossesOfThread()


class _LossesOfThread(threading.local):
    """A list of losses for each thread, with the methods that Keras calls."""

    def __init__(self):
        self._losses: list = []
        self.extend, self.clear = self._losses.extend, self._losses.clear

    def __getitem__(self, index):
        return self._losses[index]

    def __setitem__(self, index, losses):
        self._losses[index] = losses


@contextlib.contextmanager
def _other_losses_kept():
    """Keep this replica's losses of other layers while other replicas trace."""
    model = current_model()
    layers = () if model is None else model._flatten_layers()
    lists = [(layer._losses, layer._losses[:]) for layer in layers]
    yield
    for losses, of_replica in lists:
        losses[:] = of_replica
