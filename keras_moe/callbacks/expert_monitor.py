"""The use of every expert in the logs of each epoch."""

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import metrics
from keras_moe._internal.checks import shortened
from keras_moe._internal.keras_internals import forget_compiled, renew_test_function
from keras_moe.inspection import moe_layers


class ExpertMonitor(keras.callbacks.Callback):
    """Turns the assignment counts of every MoE layer into epoch logs.

    For each `MixtureOfExperts` layer, with its name in front, and with `val_` before that for
    validation:

    - `load_imbalance`: load of the busiest expert above the mean, 0 at balance
    - `load_entropy`: 1 at balance, 0 if one expert has everything
    - `dead_experts`: number of experts with less than a thousandth of the mean
    - `dropped_fraction`: share of the assignments that found no slot
    - `router_entropy`: entropy of a token's scores, in nats: `log E` undecided, 0 decided
    - `load_balance_loss`, ...: mean of each router loss by its name, before its weight
    - `expert_share_0`, ...: each expert's share, with `expert_shares=True`
    - and one for each of `metrics`, by the name of the function

    They appear in the progress bar and in `History`, and other callbacks can monitor them:
    `EarlyStopping(monitor="val_moe_load_imbalance", mode="min")` for a layer `"moe"`. Put the
    monitor first in the list of callbacks, or, for a short progress line, after a
    `keras.callbacks.ProgbarLogger()`. `model.evaluate` prints the numbers, but does not return
    them: a callback after the monitor can keep them, such as
    `LambdaCallback(on_test_end=numbers.update)` with a dict.

    The attributes `shares` and `validation_shares` are for `visualization.shares_over_time`: dicts
    from layers to lists with the shares (E,) of each epoch, NaN for an epoch without the monitor or
    without validation. `fit` starts new ones, or with an `initial_epoch` continues those it has.
    Shares that you assign begin with epoch 0.

    Args:
        expert_shares: Boolean. Whether each expert's share is logged as well, one key an expert.
        log_dir: String or path. Folder for TensorBoard, or None. The numbers above are written to
            its folders `train` and `validation`, which `keras.callbacks.TensorBoard` uses too, as
            `LAYER/load_imbalance` and so on, with the shares as the histogram `LAYER/shares` and
            the heat map `LAYER/shares_over_time`. Needs `pip install tensorboard matplotlib`.
        metrics: List of functions from the counts of a layer, a NumPy array (E,) of the assignments
            of each expert in the epoch, to a number. NaN is logged without counts.

    Raises:
        ValueError: If `metrics` are not functions of different names, the model has no
            `MixtureOfExperts` layer, or another monitor resets the counters within an epoch.
        ImportError: If there is a `log_dir`, but no TensorBoard or no matplotlib.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> moe = keras_moe.layers.MixtureOfExperts(experts, name="moe")
    >>> model = keras.Sequential([keras.Input((16,)), moe, keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> x, y = keras.random.normal((64, 16)), keras.random.normal((64, 1))
    >>> history = model.fit(x, y, callbacks=[keras_moe.callbacks.ExpertMonitor()], verbose=0)
    >>> imbalance = history.history["moe_load_imbalance"]
    """

    def __init__(
        self,
        expert_shares: bool = False,
        log_dir: str | os.PathLike | None = None,
        metrics: Sequence[Callable] = (),
    ):
        super().__init__()
        self.expert_shares = expert_shares
        self.shares: dict = {}
        self.validation_shares: dict = {}
        self._metrics = {getattr(function, "__name__", ""): function for function in metrics}
        if len(self._metrics) < len(metrics) or not all(map(str.isidentifier, self._metrics)):
            rule = "`metrics` must be functions of different names, which are theirs in the logs"
            raise ValueError(f"{rule}. Received: metrics={shortened(metrics)}")
        # The test function of the model that counts.
        self._counting: Any = None
        # How often the counters had been reset when the epoch began; None outside of training.
        self._resets = None
        # Numbers and shares of the layers in this epoch.
        self._training: Any = None
        self._test: Any = None
        self._event_files = None
        if log_dir is not None:
            # Here, so that the package can be imported without TensorBoard.
            from keras_moe.callbacks.event_files import EventFiles

            self._event_files = EventFiles(log_dir)

    @property
    def shares(self) -> dict[str, list]:
        """The share of each expert in training, a list of one array (E,) an epoch, by layer."""
        return self._shares

    @shares.setter
    def shares(self, shares):
        self._shares, self._first_epoch = shares, 0

    def set_model(self, model):
        if self._counting is not None:  # An evaluation or a training was interrupted.
            self._count_evaluation(False)
            self._forget_counting()
        super().set_model(model)
        self._resets = self._training = self._test = None

    def on_train_end(self, logs=None):
        self._reset_counts()  # Another callback may have evaluated.
        self._resets = None
        self._forget_counting()
        if self._event_files is not None:
            self._event_files.close()

    def on_epoch_begin(self, epoch, logs=None):
        if self._resets is None:
            self._keep_shares_before(epoch)
        self._reset_counts()
        self._training = self._test = None
        self._resets = self._count_resets()

    def on_test_begin(self, logs=None):
        if self._resets is None:
            self._reset_counts()
        else:
            self._training = self._read_training()
        self._count_evaluation(True)
        if self._counting is None or self.model.test_function is not self._counting:
            # Whether a function counts is fixed when it is traced.
            renew_test_function(self.model)
            self._counting = self.model.test_function

    def on_test_end(self, logs=None):
        self._count_evaluation(False)
        if self._resets is None:
            self._forget_counting()
        self._test = self._read_counts(keep=self._resets is None)
        logs.update(_logs(self._test[0]))

    def on_epoch_end(self, epoch, logs=None):
        training = self._training or self._read_training()
        test: tuple = self._test or ({}, {})
        logs.update({**_logs(training[0]), **_logs(test[0], "val_")})
        for split, (numbers, shares), so_far in (
            ("train", training, self.shares),
            ("validation", test, self.validation_shares),
        ):
            for name, row in shares.items():
                rows = so_far.setdefault(name, [])
                missing = epoch - self._first_epoch - len(rows)
                rows += [np.full_like(row, np.nan)] * missing + [row]
            if numbers and self._event_files is not None:
                self._event_files.write(split, epoch, numbers, so_far)

    def _keep_shares_before(self, epoch):
        """Keep the shares of former trainings, if this one continues them."""
        kept, layers = epoch - self._first_epoch, moe_layers(self.model)
        if self.shares.keys() == layers.keys() and all(
            0 < kept and len(rows) and len(rows[0]) == layers[name].experts.num_experts
            for name, rows in self.shares.items()
        ):
            self._shares, self.validation_shares = (
                {name: list(rows[:kept]) for name, rows in shares.items()}
                for shares in (self.shares, self.validation_shares)
            )
        else:
            self.shares, self.validation_shares = {}, {}
            self._first_epoch = epoch

    def _count_evaluation(self, counts):
        for layer in moe_layers(self.model).values():
            layer.counts_in_evaluation = counts

    def _forget_counting(self):
        """Let evaluations without the monitor trace a function that does not count."""
        if self._counting is not None and self.model.test_function is self._counting:
            forget_compiled(self.model, ["test_function"])
        self._counting = None

    def _reset_counts(self):
        for layer in moe_layers(self.model).values():
            layer.reset_counts()

    def _count_resets(self):
        return sum(layer.resets for layer in moe_layers(self.model).values())

    def _read_training(self):
        if self._resets != self._count_resets():
            raise ValueError(
                "A model must have one `ExpertMonitor`, in one call at a time: put it before what "
                "evaluates with one. Received: counters that were reset within an epoch"
            )
        return self._read_counts(keep=True)

    def _read_counts(self, keep=False):
        """The numbers and the shares of each layer since the last reset, which are reset.

        `keep` leaves the counts for `summary` and `ExpertHealth`, which find the counters empty.
        """
        numbers, shares = {}, {}
        for name, layer in moe_layers(self.model).items():
            if not layer.built:
                continue
            counts = ops.convert_to_numpy(layer.expert_counts)
            shares[name] = ops.convert_to_numpy(metrics.expert_share(counts))
            calls = ops.maximum(layer.call_count.value, 1.0)
            losses = ops.convert_to_numpy(layer.router_loss_totals.value / calls)
            found = {
                "load_imbalance": metrics.load_imbalance(counts),
                "load_entropy": metrics.load_entropy(counts),
                "dead_experts": metrics.dead_experts(counts),
                "dropped_fraction": metrics.dropped_fraction(layer.dropped_count.value, counts),
                "router_entropy": layer.router_entropy_total.value / calls,
            }
            for key, function in self._metrics.items():
                found[key] = function(counts) if counts.any() else math.nan
            found.update(zip(_loss_names(layer.router_losses), losses))
            if self.expert_shares:
                found.update({f"expert_share_{e}": each for e, each in enumerate(shares[name])})
            numbers[name] = {key: float(value) for key, value in found.items()}
            if keep:
                layer.last_counts, layer.last_losses = counts, losses
            layer.reset_counts()
        return numbers, shares


def _logs(numbers, prefix=""):
    return {
        f"{prefix}{name}_{key}": value
        for name, of_layer in numbers.items()
        for key, value in of_layer.items()
    }


# Between words, also after an abbreviation: `KLDivergence` is `kl_divergence`, as in Keras.
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def _loss_names(router_losses):
    """`LoadBalance` or `LoadBalanceLoss` is "load_balance_loss"; a second one ends with "_1"."""
    names = [
        _WORDS.sub("_", type(loss).__name__).lower().removesuffix("_loss") + "_loss"
        for loss in router_losses
    ]
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}_{number}" if number else name for name, number in zip(names, earlier)]
