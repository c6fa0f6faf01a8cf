"""Plots of a training run over its epochs, steps or seconds."""

import numpy as np
from matplotlib.figure import Figure
from whole_files import save_figure


def learning_curves(histories, path, metric="accuracy"):
    """A metric by epoch; `histories` maps a model's name to the logs of `fit`."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, logs) in enumerate(histories.items()):
        epochs = range(1, 1 + len(logs[metric]))
        axes.plot(epochs, logs[metric], f"C{index}--", label=f"{name}, training")
        axes.plot(epochs, logs[f"val_{metric}"], f"C{index}o-", label=f"{name}, validation")
    axes.set(xlabel="epoch", ylabel=metric)
    axes.legend()
    save_figure(figure, path)


def imbalances(results, steps_an_entry, balanced, path):
    """Load imbalance over the steps of training, mean of the runs: one panel a comparison."""
    results = {title: methods for title, methods in results.items() if methods}
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (title, methods) in zip(panels, results.items()):
        for index, (name, runs) in enumerate(methods.items()):
            traces = np.array([run["imbalance"] for run in runs])
            steps = steps_an_entry * np.arange(1, 1 + traces.shape[1])
            style = ("-", "--", ":")[index // 10]
            axes.plot(steps, traces.mean(axis=0), style, color=f"C{index % 10}", label=name)
        axes.axhline(balanced, color="grey", linewidth=0.8)
        axes.set(title=title, xlabel="step", ylabel="load imbalance, max / mean - 1")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="x-small", ncols=2)
    save_figure(figure, path)


def losses_by_steps_and_time(results, path):
    """Validation loss of each task, mean of the runs: against steps, and against seconds."""
    figure = Figure(figsize=(10, 4 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False, sharey="row")
    for row, (task, models) in zip(panels, results.items()):
        for axes, unit in zip(row, ("steps", "seconds")):
            for name, runs in models.items():
                where, losses = (
                    np.mean([run[key] for run in runs], axis=0) for key in (unit, "losses")
                )
                axes.plot(where, losses, "o-", markersize=3, label=name)
            axes.set(xlabel=f"{unit} of training", title=task)
        row[0].set_ylabel("validation loss")
        row[0].legend()
    save_figure(figure, path)


def losses_by_cost(results, path):
    """Held-out loss, mean of the seeds: against steps, FLOPs and seconds of training.

    Shaded is what lies between the lowest and the highest seed.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for index, (name, runs) in enumerate(results.items()):
        runs = list(runs.values())
        losses = np.array([run["losses"] for run in runs])
        steps = np.array(runs[0]["steps"])
        costs = steps, steps * runs[0]["flops_per_step"], np.array(runs[0]["seconds"])
        for axes, cost in zip(panels, costs):
            axes.plot(cost, losses.mean(axis=0), "o-", color=f"C{index}", markersize=3, label=name)
            axes.fill_between(cost, losses.min(axis=0), losses.max(axis=0), alpha=0.2)
    for axes, unit in zip(panels, ("steps", "FLOPs", "seconds")):
        axes.set(xlabel=f"{unit} of training")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test loss")
    panels[0].legend(fontsize="small")
    save_figure(figure, path)
