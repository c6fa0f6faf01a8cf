"""What a trial costs, and an objective that knows it."""

import math
import time
from collections.abc import Mapping
from functools import partial

import keras
import keras_tuner

from keras_moe._internal.named_arguments import NamedArguments, check_is_made
from keras_moe._internal.validation import (
    check_model,
    check_name,
    check_positive_number,
    check_scalar,
    listed,
)
from keras_moe.inspection import summarize


class CostMonitor(keras.callbacks.Callback):
    """Adds what a model costs to the logs of each epoch, for `WithinBudget` and `pareto_table`.

    - `active_flops`: of one token in all MoE layers, forward, as in `inspection.LayerSummary`.
    - `parameters`: number of trained parameters of the whole model.
    - `step_seconds`: time of a training step, without the first of the epoch, which may compile.

    Example:

    >>> monitor = keras_moe.tuner.CostMonitor()
    >>> # search.search(x, y, validation_data=validation, callbacks=[monitor])
    """

    def __init__(self):
        super().__init__()
        self._ends = []

    def on_epoch_begin(self, epoch, logs=None):
        self._ends = [(-1, time.perf_counter())]

    def on_train_batch_end(self, batch, logs=None):
        self._ends.append((batch, time.perf_counter()))

    def on_epoch_end(self, epoch, logs=None):
        check_model(self.model)
        if len(self._ends) < 2:
            raise ValueError(
                "An epoch must have a step to be measured. Received: the end of an epoch without "
                "one. Use the monitor as a callback of `fit`."
            )
        logs = {} if logs is None else logs
        weights = self.model.trainable_weights
        logs["active_flops"] = float(sum(layer.flops for layer in summarize(self.model)))
        logs["parameters"] = float(sum(math.prod(weight.shape) for weight in weights))
        logs["step_seconds"] = self._seconds_per_step()

    def _seconds_per_step(self):
        first = 1 if len(self._ends) > 2 else 0
        (begin, began), (end, ended) = self._ends[first], self._ends[-1]
        return (ended - began) / (end - begin)


class WithinBudget(NamedArguments, keras_tuner.Objective):
    """The least loss under a budget: any trial above it is worse than every trial within it.

    The score within the budget grows with the loss from 0 to 1; above the budget, the cost as a
    multiple of the budget is added, so that the search learns what is cheaper. KerasTuner averages
    the scores of a trial's executions, not their losses: compare losses by `pareto_table`.

    Args:
        budget: highest cost.
        cost: what is limited: "active_flops" or "step_seconds", which `CostMonitor` measures, or
            any other value in the logs.
        loss: value in the logs to minimise.

    Raises:
        ValueError: If `budget` is not a finite number above 0.

    Example:

    >>> objective = keras_moe.tuner.WithinBudget(1000)
    >>> frugal = objective.get_value({"val_loss": 3.0, "active_flops": 1000.0})
    >>> lavish = objective.get_value({"val_loss": 0.1, "active_flops": 1001.0})
    >>> objective.better_than(frugal, lavish)
    True
    """

    _attribute_checks = {
        "budget": partial(check_positive_number, example=100_000),
        "cost": check_name,
        "loss": check_name,
    }
    _kept_attributes = ("cost", "loss")

    def __init__(self, budget, cost="active_flops", loss="val_loss"):
        self.budget = budget
        self.cost = cost
        self.loss = loss
        super().__init__(name=f"{loss}_within_{cost}", direction="min")

    def has_value(self, logs):
        check_is_made(self)
        if not isinstance(logs, Mapping):
            raise TypeError(
                "`logs` must be a dict of names to numbers. Received: an object of type "
                f"{type(logs).__name__}. Pass the logs of an epoch."
            )
        return self.cost in logs and self.loss in logs

    def get_value(self, logs):
        if not self.has_value(logs):
            # Fatal to KerasTuner, which would otherwise go on with the next trial.
            raise keras_tuner.errors.FatalValueError(
                f"The logs must have {self.loss!r} and {self.cost!r}. Received: "
                f"{listed(sorted(logs)) or 'nothing'}. Give `search` validation data and "
                "`callbacks=[tuner.CostMonitor()]`."
            )
        cost, loss = (check_scalar(name, logs[name]) for name in (self.cost, self.loss))
        score = (1 + loss / (1 + abs(loss))) / 2
        return score if cost <= self.budget else score + cost / self.budget
