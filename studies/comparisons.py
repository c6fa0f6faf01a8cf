"""Models against a dense baseline: parameters, time of a step, statistics over seeds, tables."""

import functools
import json
import time

import keras
import numpy as np
import resuming
import scipy.stats
import tensorflow as tf
from files import write_json

from keras_moe import inspection

TIMED_ROUNDS = 30


def dense_feedforward(top_k, hidden_dim, features):
    """As wide as the experts that serve one token, together."""
    up = keras.layers.Dense(top_k * hidden_dim, activation="gelu")
    return keras.Sequential([up, keras.layers.Dense(features)])


def count_parameters(model):
    """All parameters, and those that work on one token."""
    total, active = inspection.count_parameters(model)
    return {"parameters": total, "active_parameters": active}


def is_sparse(model):
    """Whether a model has MoE layers."""
    try:
        return bool(inspection.moe_layers(model))
    except ValueError:
        return False


def spread(values, form):
    """The mean of some runs and, where they differ, their population standard deviation."""
    text = form.format(np.mean(values))
    return f"{text} +- {form.format(np.std(values))}" if np.ptp(values) else text


def interval(values, form="+.4f"):
    """The mean and the half-width of the 95% interval by Student's t."""
    text = f"{np.mean(values):{form}}"
    if len(values) < 2:
        return text
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return f"{text} +- {half:{form.lstrip('+')}}"


def course(losses, steps, ms_per_step):
    """Validation losses, with the `steps` after which they were measured, and the seconds."""
    seconds = [step * ms_per_step / 1000 for step in steps]
    return {"losses": losses, "steps": steps, "seconds": seconds, "ms_per_step": ms_per_step}


def loss_at(run, seconds):
    """Loss of a run after so much training time, between two epochs by their line.

    Before the end of the first epoch it is not known: NaN. The run goes on after that time, at a
    higher learning rate than a run that ends there would have.
    """
    return float(np.interp(seconds, run["seconds"], run["losses"], left=np.nan))


def step_times(make, names, batch, folder, clock=time.perf_counter, rounds=None):
    """Milliseconds of a training step of each compiled model `make(name)`, a dict by name.

    `batch` has the arguments of `train_on_batch`. The models take single steps in turns, so that
    what else the machine does slows all alike, and the median of each counts. What was measured
    before, of the same models, is read from the folder.
    """
    path = folder / f"step_times-{resuming.digest(*names)}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    steps = {name: functools.partial(make(name).train_on_batch, *batch) for name in names}
    times: dict = {name: [] for name in names}
    resuming.say("timing steps ", end="")
    for _ in range(1 + (rounds or TIMED_ROUNDS)):
        for name, step in steps.items():
            start = clock()
            step()
            times[name].append(1000 * (clock() - start))
        resuming.say(".", end="")
    resuming.say("")
    # The first compiles.
    medians = {name: float(np.median(each[1:])) for name, each in times.items()}
    write_json(path, medians)
    return medians


def each_run(options, names, run, *given):
    """The results of each `run(name, seed, *given)` so far, which are kept in `results.json`."""
    results: dict = {}
    for seed in options.seeds:
        for name in names:
            results.setdefault(name, {})[seed] = run(name, seed, *given)
            write_json(options.output / "results.json", results)
            yield results


def compile_classifier(model, loss, learning_rate, steps, jit_compile=resuming.HAS_XLA):
    """For Adam, whose learning rate falls to zero along half a cosine."""
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    optimizer = keras.optimizers.Adam(schedule)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=jit_compile)


def shuffled_batches(ids, labels, batch_size):
    """A dataset in batches of one known size.

    A last partial one would be compiled for itself, and XLA uses all cores only where sizes are
    known when TensorFlow traces the step.
    """
    rows = tf.data.Dataset.from_tensor_slices((ids, labels)).shuffle(len(ids), seed=0)
    return rows.batch(min(batch_size, len(ids)), drop_remainder=True)


def print_runs(title, models, columns):
    """A table of lists of runs by model.

    `columns` maps headings to a form, or a function of all values, and to an entry of a run, or a
    function of it.
    """
    lines = [[title, *columns]]
    for name, runs in models.items():
        lines.append([name])
        for form, entry in columns.values():
            values = [entry(run) if callable(entry) else run[entry] for run in runs]
            lines[-1].append(form(values) if callable(form) else spread(values, form))
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for first, *others in lines:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:]))
        print(f"{first:<{widths[0]}}", *cells, sep="  ", flush=True)


# Columns of tables.
PARAMETERS = {
    "ms per step": ("{:.0f}", "ms_per_step"),
    "parameters": ("{:,.0f}", "parameters"),
    "active": ("{:,.0f}", "active_parameters"),
}


def print_comparison(results, **further):
    """A table of runs by model and seed against those of the first model.

    Differences are those of runs with one seed; after +-, half-width of the 95% interval.
    Perplexities are those of the mean loss. Equal time is what the first model took.
    """

    def perplexity(losses):
        return f"{np.exp(np.mean(losses)):.1f}"

    baseline, models = next(iter(results.values())), {}
    for name, runs in results.items():
        models[name] = []
        for seed, run in runs.items():
            end, seconds = baseline[seed]["losses"][-1], baseline[seed]["seconds"][-1]
            loss, then = run["losses"][-1], loss_at(run, seconds)
            differences = {"by steps": loss - end, "by time": then - end}
            models[name].append({**run, "loss": loss, "then": then, **differences})
    columns = {
        "seeds": (lambda losses: str(len(losses)), "loss"),
        "loss": ("{:.4f}", "loss"),
        "perplexity": (perplexity, "loss"),
        "equal steps": (interval, "by steps"),
        "equal time": (interval, "by time"),
        "perplexity then": (perplexity, "then"),
        **PARAMETERS,
        **further,
    }
    print_runs("", models, columns)


def print_ends(results, **further):
    """A table of the losses at the end of runs by model and seed, against the first model's.

    After +-, half-width of the 95% interval of the differences of runs with one seed.
    """
    baseline, models = next(iter(results.values())), {}
    for name, runs in results.items():
        models[name] = [
            {**run, "difference": run["loss"] - baseline[seed]["loss"]}
            for seed, run in runs.items()
        ]
    columns = {
        "seeds": (lambda losses: str(len(losses)), "loss"),
        "loss": ("{:.4f}", "loss"),
        "difference": (interval, "difference"),
        **further,
        "steps": ("{:,.0f}", "steps"),
        "seconds": ("{:.1f}", "seconds"),
        **PARAMETERS,
    }
    print_runs("", models, columns)
