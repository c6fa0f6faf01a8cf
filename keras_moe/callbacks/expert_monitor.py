"""The load of the experts in the logs of each epoch."""

import math
import re
import warnings
import weakref
from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from keras_moe import metrics
from keras_moe._internal.checks import shortened
from keras_moe._internal.keras_internals import forget_compiled, renew_test_function
from keras_moe.inspection.summaries import find_layers, named_layers
from keras_moe.layers.gate import Observer

# What to do where a layer counts no token.
PASS_TRAINING = "In a `call` of your own, pass `training` on: `self.moe(x, training=training)`."
# Lets layers count an evaluation. Shared, so that any monitor can remove it after an interruption.
_EVALUATION = Observer(counts=True)
# Test functions that were traced while layers counted.
_counting: weakref.WeakSet = weakref.WeakSet()


class ExpertCallback(keras.callbacks.Callback):
    """Abstract: a callback about MoE layers, which warns of a model without any."""

    def on_train_begin(self, logs=None):
        if not find_layers(self.model):
            warnings.warn(
                f"`{type(self).__name__}` has nothing to report: `{self.model.name}` has no "
                "`MixtureOfExperts`.",
                stacklevel=2,
            )


class ExpertMonitor(ExpertCallback):
    """Logs the load of the experts after each epoch.

    The logs get a few metrics over all `MixtureOfExperts` layers: `load_imbalance` and
    `val_load_imbalance` of the least even layer; the total of `dead_experts`; the largest
    `dropped_fraction`, if a layer has a capacity; and, if a layer has router losses, `router_loss`:
    their sum in `loss`, averaged over a layer's calls. Callbacks that read the logs, such as
    `EarlyStopping("val_load_imbalance", mode="min")` and `TensorBoard`, come after this one.
    `model.evaluate` prints the first three but does not return them.

    `history`, a dict of lists by epoch as in `keras.callbacks.History`, contains the metrics of
    each layer, such as `moe_load_imbalance`, and `val_moe_load_imbalance` in validation. Further
    ones are `load_entropy`, `router_entropy`, each unweighted router loss, such as
    `load_balance_loss`, and each of `metrics` by the name of the function. The page "Watch and
    debug" explains them.

    `shares` and `validation_shares`, for `visualization.shares_over_time`, are dicts from layers to
    lists with the shares (E,) of each epoch of the last `fit`, NaN for epochs without validation.

    Args:
        metrics: List of functions from the counts of a layer in the epoch, a NumPy array (E,), to a
            number. It is NaN without counts.
        per_layer: Boolean. Whether the logs also get all metrics of each layer.

    Raises:
        ValueError: If `metrics` are not functions of different names, or the monitor is in `fit`
            and in an evaluation within it, or twice in its callbacks.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> moe = keras_moe.layers.MixtureOfExperts(experts, name="moe")
    >>> model = keras.Sequential([keras.Input((16,)), moe])
    >>> model.compile("adam", "mse")
    >>> x, monitor = keras.random.normal((64, 16)), keras_moe.callbacks.ExpertMonitor()
    >>> logs = model.fit(x, x, callbacks=[monitor], verbose=0).history
    >>> imbalance, entropy = logs["load_imbalance"], monitor.history["moe_load_entropy"]
    """

    def __init__(self, metrics: Sequence[Callable] = (), per_layer: bool = False):
        super().__init__()
        self.per_layer = per_layer
        self.history: dict = {}
        self.shares: dict = {}
        self.validation_shares: dict = {}
        if not isinstance(metrics, (list, tuple)):
            rule = "`metrics` must be a list of functions of counts"
            raise TypeError(f"{rule}. Received: metrics={shortened(metrics)}")
        self._metrics = {getattr(each, "__name__", ""): each for each in metrics}
        if "" in self._metrics or len(self._metrics) < len(metrics):
            rule = "`metrics` must be functions of counts, of different names, which the logs show"
            raise ValueError(f"{rule}. Received: metrics={shortened(metrics)}")
        # Readings of the counters at the start of the epoch, None outside of training, and of the
        # evaluation.
        self._epoch_began: dict | None = None
        self._test_began: dict = {}
        # Numbers and shares of the layers in the validation of this epoch.
        self._test: tuple = ({}, {})

    def set_model(self, model):
        if self.model is not None:  # An evaluation or a training was interrupted.
            self._stop_counting()
        super().set_model(model)
        self._epoch_began = None

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.history, self.shares, self.validation_shares = {}, {}, {}

    def on_train_end(self, logs=None):
        self._stop_counting()

    def on_epoch_begin(self, epoch, logs=None):
        self._test = ({}, {})
        self._epoch_began = self._read()

    def on_test_begin(self, logs=None):
        self._test_began = self._read(evaluation=True)
        for layer in named_layers(self.model).values():
            layer.add_observer(_EVALUATION)
        if self.model.test_function not in _counting:
            # Whether a function counts is fixed when it is traced.
            renew_test_function(self.model)
            _counting.add(self.model.test_function)

    def on_test_end(self, logs=None):
        self._stop_counting(goes_on=self._epoch_began is not None)
        self._test = self._numbers_since(self._test_began, evaluation=True)
        self._add_logs(logs, self._test[0])

    def on_epoch_end(self, epoch, logs=None):
        if self._epoch_began is None:
            rule = "An `ExpertMonitor` must be in one call at a time, and once in its `callbacks`"
            raise ValueError(f"{rule}. Received: one that has ended the epoch already")
        numbers, shares = self._numbers_since(self._epoch_began)
        test_numbers, test_shares = self._test
        self._epoch_began = None
        self._add_logs(logs, numbers)
        unused = [name for name, share in shares.items() if not np.any(share)]
        if unused:
            warnings.warn(f"{unused}: Training counts no token. {PASS_TRAINING}", stacklevel=2)
        losses = [each["router_loss"] for each in numbers.values() if "router_loss" in each]
        if losses:
            logs["router_loss"] = sum(losses)
        self._add_logs(logs, test_numbers, "val_")
        for key, value in {**_by_key(numbers), **_by_key(test_numbers, "val_")}.items():
            self.history.setdefault(key, []).append(value)
        for name, share in shares.items():
            self.shares.setdefault(name, []).append(share)
            of_test = test_shares.get(name, np.full_like(share, np.nan))
            self.validation_shares.setdefault(name, []).append(of_test)

    def _add_logs(self, logs, numbers, prefix=""):
        """Add the numbers over all layers; of the validation of an epoch only one."""
        if not numbers:
            return
        logs[f"{prefix}load_imbalance"] = max(each["load_imbalance"] for each in numbers.values())
        if not prefix:
            logs["dead_experts"] = sum(each["dead_experts"] for each in numbers.values())
            if any(layer.capacity for layer in named_layers(self.model).values()):
                logs["dropped_fraction"] = max(
                    each["dropped_fraction"] for each in numbers.values()
                )
        if self.per_layer:
            logs.update(_by_key(numbers, prefix))

    def _stop_counting(self, goes_on=False):
        for layer in named_layers(self.model).values():
            layer.remove_observer(_EVALUATION)
        # Evaluations without a monitor trace a function that does not count.
        if self.model.test_function in _counting and not goes_on:
            forget_compiled(self.model, ["test_function"])

    def _read(self, evaluation=False):
        layers = named_layers(self.model).items()
        return {name: layer.read_counts(evaluation) for name, layer in layers if layer.built}

    def _numbers_since(self, earlier, evaluation=False):
        """The numbers and the shares of each layer since readings of its counters."""
        numbers, shares, layers = {}, {}, named_layers(self.model)
        for name, counted in self._read(evaluation).items():
            layer = layers[name]
            if name in earlier:
                counted = counted.since(earlier[name])
            counts = counted.assignments.astype("float32")
            shares[name] = ops.convert_to_numpy(metrics.expert_share(counts))
            means = counted.means
            found = {
                "load_imbalance": metrics.load_imbalance(counts),
                "load_entropy": metrics.load_entropy(counts),
                "dead_experts": metrics.dead_experts(counts),
                "dropped_fraction": counted.dropped / max(counts.sum(), 1.0),
                "router_entropy": means.entropy / math.log(max(len(counts), 2)),
            }
            for key, function in self._metrics.items():
                found[key] = function(counts) if counts.any() else math.nan
            found.update(zip(_loss_names(layer.router_losses), means.losses))
            if not evaluation and (layer.router_losses or means.added):  # or of the router itself
                found["router_loss"] = means.added
            numbers[name] = {key: float(value) for key, value in found.items()}
        return numbers, shares


def _by_key(numbers, prefix=""):
    return {
        f"{prefix}{name}_{key}": value
        for name, of_layer in numbers.items()
        for key, value in of_layer.items()
    }


# Between words, also after an abbreviation: `KLDivergence` is `kl_divergence`, as in Keras.
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def _loss_names(router_losses):
    """`LoadBalance` or `LoadBalanceLoss` is "load_balance_loss"; a second one ends with "_1"."""
    words = [_WORDS.sub("_", loss.name).lower() for loss in router_losses]
    names = [f"{name.removesuffix('_loss')}_loss" for name in words]
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}_{number}" if number else name for name, number in zip(names, earlier)]
