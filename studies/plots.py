"""Plots of training runs over epochs, steps or seconds."""

import numpy as np
from files import save_figure
from matplotlib.figure import Figure


def courses(tasks, path, costs=("steps", "seconds"), entry="losses", **settings):
    """An entry of runs, their mean, against each cost of training; one row for each task.

    Shaded is what lies between the lowest and the highest run. `tasks` maps the title of a task to
    lists of runs by the name of the model; a run has lists `steps`, `losses` and so on.
    """
    figure = Figure(figsize=(2 + 4 * len(costs), 4 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(costs), squeeze=False, sharey="row")
    for row, (task, models) in zip(panels, tasks.items()):
        for axes, cost in zip(row, costs):
            for index, (name, runs) in enumerate(models.items()):
                where = np.mean([run[cost] for run in runs], axis=0)
                values = np.array([run[entry] for run in runs])
                color, style = f"C{index % 10}", ("-", "--", ":")[index // 10]
                axes.plot(where, values.mean(axis=0), style, color=color, label=name)
                axes.fill_between(
                    where, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2
                )
            axes.set(xlabel=f"{cost} of training", title=task, **settings)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(entry)
        row[0].legend(fontsize="x-small")
    save_figure(figure, path)


def at_equal_cost(models, path, label="test loss", begin=1):
    """The losses of runs by the name of the model, against steps and against seconds.

    The epochs before `begin` are left out. An arrow leads from the end of the first model to where
    the quickest other one has reached its loss.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_steps, by_seconds = panels = figure.subplots(1, 2, sharey=True)
    for axes, cost in zip(panels, ("steps", "seconds")):
        ends = {}
        for index, (name, runs) in enumerate(models.items()):
            where = np.mean([run[cost] for run in runs], axis=0)[begin:]
            values = np.array([run["losses"] for run in runs])[:, begin:]
            axes.plot(where, values.mean(axis=0), "o-", color=f"C{index}", markersize=3)
            axes.fill_between(where, values.min(axis=0), values.max(axis=0), alpha=0.2)
            ends[name] = where, values.mean(axis=0)
        axes.set_xlabel(f"{cost} of training")
        axes.grid(alpha=0.3)
    by_steps.set_ylabel(label)
    _name_lines(by_steps, {name: values[-1] for name, (_, values) in ends.items()})

    (where, values), *others = ends.values()
    # Losses fall, and `interp` wants them to rise.
    reached = [np.interp(-values[-1], -losses, seconds) for seconds, losses in others]
    if reached and min(reached) < where[-1]:
        by_seconds.annotate(
            f"  the same loss,\n  {min(reached) / where[-1]:.0%} of the time",
            (min(reached), values[-1]),
            (where[-1], values[-1]),
            arrowprops={"arrowstyle": "->", "color": "0.3"},
            va="center",
        )
        by_seconds.set_xlim(right=max(by_seconds.get_xlim()[1], 1.3 * where[-1]))
    save_figure(figure, path)


def _name_lines(axes, last):
    """Write the name of each line beside its `last` value, one below the other."""
    bottom, top = axes.get_ylim()
    right, height = axes.get_xlim()[1], np.inf
    names = list(last)
    for name in sorted(names, key=lambda each: -last[each]):
        height = min(last[name], height - (top - bottom) / 20)
        color = f"C{names.index(name)}"
        axes.text(right, height, name, color=color, va="center", fontsize="small")
    axes.set_xlim(right=1.35 * right)
    axes.set_ylim(bottom=min(bottom, height - (top - bottom) / 20))
