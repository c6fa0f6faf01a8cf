"""A plot of training runs over epochs, steps or seconds."""

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
