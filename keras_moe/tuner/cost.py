"""Costs of trials, an objective under a budget, and a table of all trials."""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import keras_tuner

from keras_moe._internal.checks import check_number
from keras_moe._internal.plain_text import table
from keras_moe.inspection import summarize


class CostMonitor(keras.callbacks.Callback):
    """Adds what a model costs to the logs of each epoch, for `WithinBudget` and `pareto_table`.

    - `active_flops`: of one token in all MoE layers, forward, as in `inspection.LayerSummary`.
    - `parameters`: number of trained parameters of the whole model.
    - `step_seconds`: time of a training step, without the first of the epoch, which may compile.

    Example:

    >>> monitor = keras_moe.tuner.CostMonitor()  # for the `callbacks` of a tuner's `search`
    """

    def on_epoch_begin(self, epoch, logs=None):
        self._ends = [(-1, time.perf_counter())]

    def on_train_batch_end(self, batch, logs=None):
        self._ends.append((batch, time.perf_counter()))

    def on_epoch_end(self, epoch, logs=None):
        weights = self.model.trainable_weights
        logs["active_flops"] = float(sum(layer.flops for layer in summarize(self.model)))
        logs["parameters"] = float(sum(math.prod(weight.shape) for weight in weights))
        first = 1 if len(self._ends) > 2 else 0
        (begin, began), (end, ended) = self._ends[first], self._ends[-1]
        logs["step_seconds"] = (ended - began) / (end - begin)


class WithinBudget(keras_tuner.Objective):
    """The least loss under a budget: any trial above it is worse than every trial within it.

    The score grows with the loss from 0 to 1; above the budget, the cost as a multiple of it is
    added. KerasTuner averages the scores of a trial's executions: compare losses by `pareto_table`.

    Args:
        budget: Float, greater than 0. Highest cost.
        cost: String. The limited value in the logs, such as "active_flops" or "step_seconds" of
            `CostMonitor`.
        loss: String. Value in the logs to minimise.

    Raises:
        ValueError: If `budget` is not a finite number above 0.

    Example:

    >>> objective = keras_moe.tuner.WithinBudget(1000)
    >>> score = objective.get_value({"val_loss": 3.0, "active_flops": 1000.0})
    """

    def __init__(self, budget: float, cost: str = "active_flops", loss: str = "val_loss"):
        super().__init__(name=f"{loss}_within_{cost}", direction="min")
        self.budget = check_number("budget", budget, above=0)
        self.cost = cost
        self.loss = loss

    def has_value(self, logs):
        return self.cost in logs and self.loss in logs

    def get_value(self, logs):
        if not self.has_value(logs):
            # Fatal to KerasTuner, which would otherwise try the next trial.
            raise keras_tuner.errors.FatalValueError(
                f"The logs must contain {self.loss!r} and {self.cost!r}: give `search` validation "
                f"data and `callbacks=[tuner.CostMonitor()]`. Received: {sorted(logs)}"
            )
        cost, loss = float(logs[self.cost]), float(logs[self.loss])
        score = (1 + loss / (1 + abs(loss))) / 2
        return score if cost <= self.budget else score + cost / self.budget


class ParetoRow(NamedTuple):
    """One trial: `efficient` if no other has a loss as low at a cost as low."""

    trial: str
    cost: float
    loss: float
    efficient: bool
    values: dict


def pareto_table(
    search: Any, cost: str = "active_flops", loss: str = "val_loss"
) -> list[ParetoRow]:
    """Return all finished trials by cost, the cheapest first, as a list of `ParetoRow`.

    Args:
        search: `keras_tuner.Tuner` after `search`, whose callbacks had a `CostMonitor`.
        cost: String. Name in the logs of what is spent.
        loss: String. Name in the logs of what is minimised.

    Raises:
        ValueError: If a trial has no such value in its logs.
    """
    oracle = search.oracle
    if hasattr(oracle, "trials"):
        trials = [trial for trial in oracle.trials.values() if trial.status == "COMPLETED"]
    else:  # A worker of a distributed search asks its chief, by a message of 32 bits.
        trials = oracle.get_best_trials(oracle.max_trials or 2**31 - 1)
    rows, least = [], math.inf
    for trial in trials:
        spent, value = (float(trial.metrics.get_best_value(name)) for name in (cost, loss))
        values = dict(trial.hyperparameters.values)
        rows.append(ParetoRow(trial.trial_id, spent, value, False, values))
    rows.sort(key=lambda row: (row.cost, row.loss))
    for place, row in enumerate(rows):
        rows[place] = row._replace(efficient=row.loss < least)
        least = min(least, row.loss)
    return rows


def format_table(rows: Sequence[ParetoRow]) -> str:
    """Return a `pareto_table` as text, one line a trial; `*` marks the efficient ones."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    lines = [["", "trial", "cost", "loss", *names]]
    for row in rows:
        values = [row.values.get(name, "-") for name in names]
        texts = [f"{each:.4g}" if isinstance(each, float) else str(each) for each in values]
        mark = "*" if row.efficient else ""
        lines.append([mark, row.trial, f"{row.cost:,.6g}", f"{row.loss:.4f}", *texts])
    return "\n".join(table(lines))
