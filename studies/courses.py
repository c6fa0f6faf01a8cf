"""How a loss went during training, and how long that took."""

import json
import time

import numpy as np
import resuming
from whole_files import write_json

TIMED_ROUNDS = 30


def course(losses, steps_an_epoch, ms_per_step):
    """Validation losses by epoch, with the steps and the seconds of training they took."""
    steps = [steps_an_epoch * (1 + epoch) for epoch in range(len(losses))]
    seconds = [step * ms_per_step / 1000 for step in steps]
    return {"losses": losses, "steps": steps, "seconds": seconds, "ms_per_step": ms_per_step}


def loss_at(run, seconds):
    """Loss of a run after so much training time, between two epochs by their line.

    Before the end of the first epoch it is not known: NaN. The run goes on after that time, at a
    higher learning rate than a run that ends there would have.
    """
    return float(np.interp(seconds, run["seconds"], run["losses"], left=np.nan))


def step_times(models, inputs, targets, folder, clock=time.perf_counter):
    """Milliseconds of a training step of each model, in a dict like `models`.

    They take single steps in turns, so that what else the machine does slows all alike, and the
    median of each counts. What was measured before, of the same models, stands in the folder and is
    not measured again.

    Args:
        models: dict from names to functions that return a compiled model.
        inputs: of `train_on_batch`, as are `targets`.
        folder: keeps the times.
        clock: function that returns seconds; `time.process_time` where others use the machine.
    """
    path = folder / f"step_times-{resuming.digest(*models)}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    models = {name: make() for name, make in models.items()}
    times: dict = {name: [] for name in models}
    for model in models.values():
        model.train_on_batch(inputs, targets)  # compiles
    for _ in range(TIMED_ROUNDS):
        for name, model in models.items():
            start = clock()
            model.train_on_batch(inputs, targets)
            times[name].append(1000 * (clock() - start))
    medians = {name: float(np.median(each)) for name, each in times.items()}
    write_json(path, medians)
    return medians
