"""Models against a baseline, over seeds: a table at equal steps and at equal time."""

import numpy as np
import scipy.stats
from courses import loss_at


def print_comparison(results, baseline, **settings):
    """A table of runs against those of a baseline.

    Differences are those of runs with one seed; behind +-, half of a 95% interval. The perplexities
    are those of the mean loss after all steps, and after the time that the baseline took.

    Args:
        results: dict from names of models to a dict from seeds to what `course` gave.
        baseline: name of the model that the others are compared with.
        **settings: headings of further columns, with the entry of a run that is shown there.
    """
    print(f"\n{'':<24} {'seeds':>5} {'loss':>7} {'perplexity':>11} {'equal steps':>20}", end=" ")
    print(f"{'equal time':>20} {'ms':>6} {'parameters':>11} {'active':>9}", end=" ")
    print(*(f"{name:>8}" for name in settings))
    for name, runs in results.items():
        pairs = [(run, results[baseline][seed]) for seed, run in runs.items()]
        by_steps = [run["losses"][-1] - other["losses"][-1] for run, other in pairs]
        in_time = [loss_at(run, other["seconds"][-1]) for run, other in pairs]
        by_time = [loss - other["losses"][-1] for loss, (_, other) in zip(in_time, pairs)]
        loss = np.mean([run["losses"][-1] for run in runs.values()])
        perplexities = " / ".join(f"{np.exp(each):.1f}" for each in (loss, np.mean(in_time)))
        run = pairs[0][0]
        print(f"{name:<24} {len(runs):>5} {loss:>7.4f} {perplexities:>11}", end=" ")
        print(f"{interval(by_steps):>20} {interval(by_time):>20}", end=" ")
        print(f"{run['ms_per_step']:>6.0f} {run['parameters']:>11,}", end=" ")
        print(f"{run['active_parameters']:>9,}", end=" ")
        print(*(f"{run[entry]:>8}" for entry in settings.values()))


def interval(values):
    """The mean and half of the 95% confidence interval by Student's t."""
    text = f"{np.mean(values):+.4f}"
    if len(values) < 2:
        return text
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return f"{text} +- {half:.4f}"
