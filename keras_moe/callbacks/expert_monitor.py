"""The use of every expert in the logs of each epoch."""

import math
import os
import re
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe import metrics
from keras_moe._internal.keras_internals import test_function_of_its_own
from keras_moe._internal.named_arguments import NamedArguments, check_is_made
from keras_moe._internal.validation import check_flag, check_function, check_model, shortened
from keras_moe.inspection import moe_layers
from keras_moe.inspection.recording import Counting


def _check_shares(name, value):
    if isinstance(value, (str, os.PathLike)):
        raise ValueError(
            f"`{name}` must be True or False. Received: {name}={value!r}. Pass a folder as "
            f"`log_dir={value!r}`."
        )
    return check_flag(name, value)


class ExpertMonitor(NamedArguments, keras.callbacks.Callback):
    """Turns the assignment counts of every MoE layer into epoch logs.

    For each `MixtureOfExperts` layer, with its name in front, and with `val_` before that for
    validation:

    - `load_imbalance`: load of the busiest expert above the mean, 0 at balance
    - `load_entropy`: 1 at balance, 0 if one expert has everything
    - `dead_experts`: number of experts without a single assignment in the epoch
    - `dropped_fraction`: share of the assignments that found no slot
    - `router_entropy`: of the scores of a token, in nats: `log E` undecided, 0 decided
    - `load_balance_loss`, ...: mean of each router loss by its name, before its weight
    - `expert_share_0`, ...: each expert's share, with `expert_shares=True`
    - and one for each of `metrics`, by the name of the function

    They appear at the end of the progress bar and in `History`, and other callbacks can monitor
    them: `EarlyStopping(monitor="val_moe_load_imbalance", mode="min")` for a layer `"moe"`, with
    `"max"` for `load_entropy`. Put the monitor first in the list of callbacks. `model.evaluate`
    prints them too, but does not return them, as Keras gives callbacks a copy of its logs: a
    callback behind the monitor can keep them, as below.

    The attributes `shares` and `validation_shares` are for `visualization.shares_over_time`: dicts
    with the shares of the experts of each layer, a list of one array (E,) for each epoch. An epoch
    without validation has NaN, if a later one has a validation. `fit` begins them anew, but with an
    `initial_epoch` it continues those of the epochs before, if the monitor has some; epochs that
    it lacks have NaN. Shares that you assign begin with epoch 0.

    Args:
        expert_shares: whether each expert's share is logged as well, one key an expert.
        log_dir: folder for TensorBoard, or None. The numbers above are written to its folders
            `train` and `validation`, which `keras.callbacks.TensorBoard` uses too, as
            `LAYER/load_imbalance` and so on, with the shares as the histogram `LAYER/shares` and
            the heat map `LAYER/shares_over_time`; each layer has its own group of cards. Needs
            `pip install tensorboard matplotlib`.
        metrics: list of functions of your own from the counts of a layer, a NumPy array (E,) of
            the assignments of each expert in the epoch, to a number. NaN is logged where nothing
            was counted.

    Raises:
        ValueError: If the model has no `MixtureOfExperts` layer.
        ImportError: If there is a `log_dir`, but no TensorBoard or no matplotlib.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(
    ...     keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32), name="moe"
    ... )
    >>> model = keras.Sequential([keras.Input((16,)), moe, keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> x, y = keras.random.normal((64, 16)), keras.random.normal((64, 1))
    >>> monitor = keras_moe.callbacks.ExpertMonitor()
    >>> history = model.fit(x, y, callbacks=[monitor], verbose=0)
    >>> imbalance = history.history["moe_load_imbalance"]
    >>> numbers = {}
    >>> keep = keras.callbacks.LambdaCallback(on_test_end=numbers.update)
    >>> loss = model.evaluate(x, y, callbacks=[monitor, keep], verbose=0)
    >>> imbalance_of_evaluation = numbers["moe_load_imbalance"]
    """

    _attribute_checks = {"expert_shares": _check_shares}

    def __init__(self, expert_shares=False, log_dir=None, metrics=()):
        super().__init__()
        self._metrics = _by_name(metrics)
        self.expert_shares = expert_shares
        self.shares, self.validation_shares = {}, {}
        self._begins = False
        self._training = self._test = self._resets = None
        self._event_files = None
        if log_dir is not None:
            # Here, so that the package can be imported without TensorBoard.
            from keras_moe.callbacks.event_files import EventFiles

            self._event_files = EventFiles(log_dir)

    @property
    def shares(self):
        """The share of each expert in training, a list of one array (E,) an epoch, by layer."""
        return self._shares

    @shares.setter
    def shares(self, shares):
        self._shares, self._first_epoch = shares, 0

    def set_model(self, model):
        check_model(model)
        check_is_made(self)
        super().set_model(model)
        self._training = self._test = self._resets = None

    def on_train_begin(self, logs=None):
        if self._event_files is not None:
            # A training that was interrupted has left them open.
            self._event_files.close()
        self._begins = True

    def on_train_end(self, logs=None):
        self._resets = None
        if self._event_files is not None:
            self._event_files.close()

    def on_epoch_begin(self, epoch, logs=None):
        if self._begins:
            self._keep_shares_before(epoch)
            self._begins = False
        self._read_counts()
        self._training = self._test = None
        self._resets = self._resets_so_far()

    def on_test_begin(self, logs=None):
        if self._is_training:
            self._training = self._read_training()
        else:
            self._read_counts()
        if not isinstance(self.model.test_function, _CountedStep):
            self.model.test_function = _CountedStep(self.model)

    def on_test_batch_begin(self, batch, logs=None):
        self.model.test_function.is_watched = True

    def on_test_end(self, logs=None):
        self._test = self._read_counts()
        if logs is not None:
            logs.update(self._logs(self._test))
        if not self._is_training:
            self._keep_last(self._test)

    def on_epoch_end(self, epoch, logs=None):
        training = self._training
        if training is None:
            training = self._read_training()
        test = self._test or {}
        if logs is not None:
            logs.update(self._logs(training))
            logs.update({f"val_{key}": value for key, value in self._logs(test).items()})
        for split, usages, shares in (
            ("train", training, self.shares),
            ("validation", test, self.validation_shares),
        ):
            for name, usage in usages.items():
                rows = shares.setdefault(name, [])
                missing = epoch - self._first_epoch - len(rows)
                rows += [np.full_like(usage.shares, np.nan)] * missing + [usage.shares]
            if usages and self._event_files is not None:
                self._event_files.write(split, epoch, self._numbers(usages), shares)

    def _keep_shares_before(self, epoch):
        """Of former trainings, if this one continues them."""
        kept, layers = epoch - self._first_epoch, moe_layers(self.model)
        is_continued = self.shares.keys() == layers.keys() and all(
            0 < kept and len(rows) and len(rows[0]) == layers[name].experts.num_experts
            for name, rows in self.shares.items()
        )
        if is_continued:
            self._shares, self.validation_shares = (
                {name: list(rows[:kept]) for name, rows in shares.items()}
                for shares in (self.shares, self.validation_shares)
            )
        else:
            self._shares, self.validation_shares = {}, {}
            self._first_epoch = epoch

    @property
    def _is_training(self):
        return self._resets is not None

    def _resets_so_far(self):
        return sum(layer.resets for layer in moe_layers(self.model).values())

    def _read_training(self):
        """What was counted since the epoch began, unless others have read and reset it."""
        if self._resets != self._resets_so_far():
            raise ValueError(
                "A model must have one `ExpertMonitor`, in one call of `fit` or `evaluate` at a "
                "time, which resets the counters that it has read. Received: counters that were "
                "reset within an epoch, by a second monitor or by an `evaluate` with a monitor "
                "that a callback makes. Leave the other monitor out, or put this one before the "
                "callback."
            )
        usages = self._read_counts()
        self._keep_last(usages)
        return usages

    def _read_counts(self):
        """What was counted since the last call: a `_Usage` by the name of the layer."""
        usages = {}
        for name, layer in moe_layers(self.model).items():
            if layer.built:
                usages[name] = _usage(layer, self._metrics)
                layer.reset_counts()
        return usages

    def _keep_last(self, usages):
        """For `summary` and `ExpertHealth`, which find the counters empty."""
        layers = moe_layers(self.model)
        for name, usage in usages.items():
            layers[name].last_counts, layers[name].last_losses = usage.counts, usage.losses

    def _logs(self, usages):
        return {
            f"{name}_{key}": value
            for name, numbers in self._numbers(usages).items()
            for key, value in numbers.items()
        }

    def _numbers(self, usages):
        """What is logged of each layer, by its name."""
        numbers = {}
        for name, usage in usages.items():
            numbers[name] = dict(usage.numbers)
            if self.expert_shares:
                shares = enumerate(usage.shares)
                numbers[name].update({f"expert_share_{e}": float(share) for e, share in shares})
        return numbers


class _CountedStep:
    """The test function of a model, and one that counts assignments, for steps that are watched.

    Whether a function counts is fixed when it is traced, so there are two. Keras tells callbacks
    nothing of an evaluation that is interrupted or has no monitor. So the monitor announces each
    step, and all others are left as they were.
    """

    def __init__(self, model):
        self.is_watched = False
        self._model = model
        self._step = model.test_function
        self._counting_step = test_function_of_its_own(model)

    def __call__(self, *arguments):
        if not self.is_watched:
            return self._step(*arguments)
        self.is_watched = False
        with Counting(self._model):
            return self._counting_step(*arguments)


# What is logged of every layer: functions of the layer and of its counts (E,).
_MEASURES = {
    "load_imbalance": lambda layer, counts: metrics.load_imbalance(counts),
    "load_entropy": lambda layer, counts: metrics.load_entropy(counts),
    "dead_experts": lambda layer, counts: metrics.dead_experts(counts),
    "dropped_fraction": lambda layer, counts: metrics.dropped_fraction(
        layer.dropped_count.value, counts
    ),
    "router_entropy": lambda layer, counts: layer.router_entropy_total.value / _calls(layer),
}


class _Usage(NamedTuple):
    numbers: dict
    shares: Any
    counts: Any
    losses: Any


def _by_name(metrics):
    """The functions by their names, which no number that is logged anyway may have."""
    if not isinstance(metrics, (list, tuple)):
        raise TypeError(
            "`metrics` must be a list of functions. Received: "
            f"metrics={shortened(metrics)} (of type {type(metrics).__name__}). Pass `[function]`."
        )
    by_name: dict = {}
    for metric in metrics:
        name = _name_of(metric)
        check_function("metrics", metric, "counts")
        if by_name.setdefault(name, metric) is not metric or name in _MEASURES:
            raise ValueError(
                "Each of `metrics` must have a name of its own, which is its name in the logs. "
                f"Received: a second {name!r}. Name the function otherwise, by `def`."
            )
    return by_name


def _name_of(metric):
    name = getattr(metric, "__name__", None)
    if not callable(metric) or name is None or not name.isidentifier():
        raise TypeError(
            "`metrics` must be functions from the counts (E,) of a layer to a number. Received: "
            f"{shortened(metric)} (of type {type(metric).__name__}). Write a function with `def`: "
            "its name is the name in the logs."
        )
    return name


def _usage(layer, own_metrics):
    counts = ops.convert_to_numpy(layer.expert_counts)
    numbers = {name: measure(layer, counts) for name, measure in _MEASURES.items()}
    is_counted = counts.any()
    for name, metric in own_metrics.items():
        numbers[name] = _number(name, metric(counts)) if is_counted else math.nan
    losses = ops.convert_to_numpy(layer.router_loss_totals.value / _calls(layer))
    numbers.update(zip(_loss_names(layer.router_losses), losses))
    shares = ops.convert_to_numpy(metrics.expert_share(counts))
    numbers = {key: float(value) for key, value in numbers.items()}
    return _Usage(numbers, shares, counts, losses)


def _calls(layer):
    return ops.maximum(layer.call_count.value, 1.0)


def _number(name, value):
    """What a function of the user's own returned, as a float."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`metrics` must be functions from the counts (E,) of a layer to a number. Received: "
            f"{shortened(value)} (of type {type(value).__name__}) from {name!r}. Mend the function."
        ) from error


# Between words, also behind an abbreviation: `KLDivergence` is `kl_divergence`, as in Keras.
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def _loss_names(router_losses):
    """`LoadBalance` or `LoadBalanceLoss` is "load_balance_loss"; a second one ends with "_1"."""
    names: list[str] = []
    for loss in router_losses:
        name = _WORDS.sub("_", type(loss).__name__).lower().removesuffix("_loss") + "_loss"
        same = sum(re.fullmatch(rf"{name}(_\d+)?", other) is not None for other in names)
        names.append(f"{name}_{same}" if same else name)
    return names


__all__ = ["ExpertMonitor"]
