"""A table of what a lower loss costs."""

import math
from typing import NamedTuple

# The largest number that the message to the chief can hold.
_ALL = 2**31 - 1


class ParetoRow(NamedTuple):
    """One trial: `efficient` if no other has a loss as low at a cost as low."""

    trial: str
    cost: float
    loss: float
    efficient: bool
    values: dict


def pareto_table(search, cost="active_flops", loss="val_loss"):
    """Return what a lower loss costs: all finished trials, the cheapest first.

    Args:
        search: `keras_tuner.Tuner` after `search`, whose callbacks had a `CostMonitor`.
        cost: String. Name in the logs of what is spent.
        loss: String. Name in the logs of what is minimised.

    Returns:
        List of one `ParetoRow` for each finished trial; `format_table` makes it text.

    Raises:
        ValueError: If a trial has no such value in its logs.
    """
    points = []
    for trial in _finished(search.oracle):
        spent, value = (float(trial.metrics.get_best_value(name)) for name in (cost, loss))
        points.append((spent, value, trial))
    rows, least = [], math.inf
    for spent, value, trial in sorted(points, key=lambda point: point[:2]):
        values = dict(trial.hyperparameters.values)
        rows.append(ParetoRow(trial.trial_id, spent, value, value < least, values))
        least = min(least, value)
    return rows


def _finished(oracle):
    if hasattr(oracle, "trials"):
        return [trial for trial in oracle.trials.values() if trial.status == "COMPLETED"]
    # A worker of a distributed search has none, and asks its chief.
    return oracle.get_best_trials(oracle.max_trials or _ALL)


def format_table(rows):
    """Return a `pareto_table` as text, one line a trial; `*` marks the efficient ones.

    Args:
        rows: List of `ParetoRow`.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    lines = [["", "trial", "cost", "loss", *names]]
    for row in rows:
        values = [_text(row.values.get(name, "-")) for name in names]
        mark = "*" if row.efficient else ""
        lines.append([mark, row.trial, f"{row.cost:,.6g}", f"{row.loss:.4f}", *values])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines
    )


def _text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
