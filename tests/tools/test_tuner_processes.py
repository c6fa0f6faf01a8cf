"""A search that several processes share: the chief of KerasTuner and its workers."""

import json
import os
import subprocess
import sys

import pytest
from backends import ROOT
from replicas_models import free_ports

pytestmark = pytest.mark.backends("torch")

# A worker begins when both are there, so that each has trials.
DISTRIBUTED = """
import json, os, pathlib, sys, time
import keras_tuner, numpy as np
from test_tuner import D, build, normal, tuner

folder, me = pathlib.Path(sys.argv[1]), os.environ["KERASTUNER_TUNER_ID"]
own, sleep = [], time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.2))  # The chief looks every 20 seconds.

class Search(keras_tuner.RandomSearch):
    def on_trial_begin(self, trial):
        (folder / me).touch()
        while len([*folder.glob("worker*")]) < 2:
            sleep(0.05)
        own.append(trial.trial_id)

search = Search(build, tuner.WithinBudget(1000), max_trials=6, seed=3, directory=folder)
x, y = normal(8, D), np.zeros((8, 1), "float32")
search.search(x, y, validation_data=(x, y), callbacks=[tuner.CostMonitor()], verbose=0)
if me == "chief":
    own = [
        [*map(trial.metrics.get_best_value, ("active_flops", "val_loss")), trial.score]
        for trial in search.oracle.get_best_trials(6)
    ]
print(json.dumps(own))
"""


def test_a_chief_and_two_workers_share_the_trials(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment |= {"KERASTUNER_ORACLE_IP": "127.0.0.1"}
    environment |= {"KERASTUNER_ORACLE_PORT": str(free_ports(1)[0])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, tmp_path],
            env={**environment, "KERASTUNER_TUNER_ID": name},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("chief", "worker0", "worker1")
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    trials, *of_workers = (json.loads(text.splitlines()[-1]) for text in printed)
    assert all(of_workers) and sorted(sum(of_workers, [])) == [str(number) for number in range(6)]
    within = [loss for cost, loss, _ in trials if cost <= 1000]
    assert within == sorted(within) and 0 < len(within) < 6
    assert [score < 1 for *_, score in trials] == [cost <= 1000 for cost, *_ in trials]
