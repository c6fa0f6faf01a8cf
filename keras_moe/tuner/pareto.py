"""A table of what a lower loss costs."""

import itertools
import math
import numbers
from typing import NamedTuple

from keras_moe._internal.validation import check_name, shortened

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
    """What a lower loss costs: all finished trials, the cheapest first.

    Args:
        search: a `keras_tuner.Tuner` after `search`, whose callbacks had a `CostMonitor`.
        cost: name in the logs of what is spent.
        loss: name in the logs of what is minimised.

    Returns:
        List of one `ParetoRow` for each trial; `format_table` makes it text.

    Raises:
        ValueError: If no trial has finished, or one has no such value in its logs.
    """
    if not hasattr(search, "oracle"):
        raise TypeError(
            "`search` must be a `keras_tuner.Tuner`. Received: an object of type "
            f"{type(search).__name__}. Pass the tuner, after its `search`."
        )
    check_name("cost", cost)
    check_name("loss", loss)
    trials = _finished(search.oracle)
    if not trials:
        raise ValueError("A table needs a finished trial. Received: none. Call `search` first.")
    for name, trial in itertools.product((cost, loss), trials):
        if not trial.metrics.exists(name):
            raise ValueError(
                f"Each trial must have measured what the table shows. Received: {name!r}, but "
                f"only {', '.join(sorted(trial.metrics.metrics))} in trial {trial.trial_id}. "
                "Give `search` `callbacks=[tuner.CostMonitor()]`."
            )
    points = [
        (*(float(trial.metrics.get_best_value(name)) for name in (cost, loss)), trial)
        for trial in trials
    ]
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
    """Text of a `pareto_table`, one line a trial; `*` marks the efficient ones."""
    if not isinstance(rows, (list, tuple)) or not all(map(_is_row, rows)):
        raise TypeError(
            "`rows` must be a list of `ParetoRow`. Received: "
            f"{shortened(rows)}. Pass what `pareto_table` returned."
        )
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


def _is_row(row):
    return (
        isinstance(row, ParetoRow)
        and isinstance(row.trial, str)
        and isinstance(row.values, dict)
        and all(isinstance(number, numbers.Real) for number in (row.cost, row.loss))
    )


def _text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
