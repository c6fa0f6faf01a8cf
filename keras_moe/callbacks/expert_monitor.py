"""The use of every expert in the logs of each epoch."""

import keras
from keras import ops

from keras_moe import metrics
from keras_moe.inspection import moe_layers


class ExpertMonitor(keras.callbacks.Callback):
    """Turns the assignment counts of every MoE layer into epoch logs.

    For each `MixtureOfExperts` layer, with its name in front, and with `val_` before that for
    validation:

    - `load_imbalance`: load of the busiest expert above the mean, 0 at balance
    - `load_entropy`: 1 at balance, 0 if one expert has everything
    - `dead_experts`: number of experts without a single assignment in the epoch
    - `dropped_fraction`: share of the assignments that found no room
    - `expert_share_0`, ...: each expert's share, with `expert_shares=True`

    They stand in the last line of the progress bar and in `History`, and can be monitored by
    other callbacks: `EarlyStopping(monitor="val_mixture_of_experts_load_imbalance")`. Put the
    monitor first in the list of callbacks.

    Args:
        expert_shares: whether each expert's share is logged as well, one key an expert.

    Raises:
        ValueError: If the model has no `MixtureOfExperts` layer.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(
    ...     keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32), name="moe"
    ... )
    >>> model = keras.Sequential([keras.Input((16,)), moe, keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> x, y = keras.random.normal((64, 16)), keras.random.normal((64, 1))
    >>> history = model.fit(x, y, callbacks=[keras_moe.callbacks.ExpertMonitor()], verbose=0)
    >>> imbalance = history.history["moe_load_imbalance"]
    """

    def __init__(self, expert_shares=False):
        super().__init__()
        self.expert_shares = expert_shares

    def set_model(self, model):
        super().set_model(model)
        self._training_logs = self._test_logs = None
        self._is_training = False
        self._retrace_evaluation()

    def on_train_begin(self, logs=None):
        self._is_training = True

    def on_train_end(self, logs=None):
        self._is_training = False
        self._retrace_evaluation()

    def on_epoch_begin(self, epoch, logs=None):
        self._read_counts()
        self._training_logs = self._test_logs = None

    def on_test_begin(self, logs=None):
        self._training_logs = self._read_counts()
        self._count_in_evaluation(True)

    def on_test_end(self, logs=None):
        self._count_in_evaluation(False)
        self._test_logs = self._read_counts()
        if logs is not None:
            logs.update(self._test_logs)
        if not self._is_training:
            self._retrace_evaluation()

    def on_epoch_end(self, epoch, logs=None):
        training_logs = self._training_logs
        if training_logs is None:
            training_logs = self._read_counts()
        validation_logs = {f"val_{key}": value for key, value in (self._test_logs or {}).items()}
        if logs is not None:
            logs.update({**training_logs, **validation_logs})

    def _retrace_evaluation(self):
        """Whether a test function counts assignments is fixed when it is traced."""
        self.model.test_function = None

    def _count_in_evaluation(self, counts):
        for layer in moe_layers(self.model).values():
            layer.counts_in_evaluation = counts

    def _read_counts(self):
        """Logs of what was counted since the last call."""
        logs = {}
        for name, layer in moe_layers(self.model).items():
            if layer.built:
                logs.update(self._layer_logs(name, layer))
                layer.reset_counts()
        return logs

    def _layer_logs(self, name, layer):
        counts = ops.convert_to_numpy(layer.expert_counts.value)
        logs = {
            "load_imbalance": metrics.load_imbalance(counts),
            "load_entropy": metrics.load_entropy(counts),
            "dead_experts": metrics.dead_experts(counts),
            "dropped_fraction": metrics.dropped_fraction(layer.dropped_count.value, counts),
        }
        if self.expert_shares:
            shares = ops.convert_to_numpy(metrics.expert_share(counts))
            logs.update({f"expert_share_{expert}": share for expert, share in enumerate(shares)})
        return {f"{name}_{key}": float(value) for key, value in logs.items()}


__all__ = ["ExpertMonitor"]
