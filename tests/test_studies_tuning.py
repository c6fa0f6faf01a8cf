"""The tuning example, on made-up text that needs no network."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

pytest.importorskip("keras_tuner")
pytest.importorskip("tensorflow_datasets")
pytest.importorskip("matplotlib")

STUDIES = pathlib.Path(__file__).parents[1] / "studies"
sys.path.insert(0, str(STUDIES))

import datasets  # noqa: E402
import hyperparameter_tuning  # noqa: E402
from made_up_text import made_up_text  # noqa: E402

# KerasTuner asks the current thread for its name in an old way.
pytestmark = [
    pytest.mark.backends("torch"),
    pytest.mark.filterwarnings("ignore:(currentThread|getName)\\(\\):DeprecationWarning"),
]

PROJECT = "reuters_r8-1_epochs-1_seeds-budget_1.1-smoke"


def made_up_data(name, data_dir=None):
    return made_up_text((128, 32, 32))


def arguments(folder, trials):
    short = ["--smoke", "--epochs", "1", "--seeds", "1"]
    return [*short, "--trials", str(trials), "--output", str(folder)]


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(datasets, "load", made_up_data)


KILLED_IN_THE_SECOND_TRIAL = """
import os, signal
import datasets, hyperparameter_tuning, test_studies_tuning as tests
from keras_moe import tuner

class Killer(tuner.CostMonitor):
    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if (tests.pathlib.Path({folder!r}) / tests.PROJECT / "trial_1").exists():
            os.kill(os.getpid(), signal.SIGKILL)

datasets.load = tests.made_up_data
tuner.CostMonitor = Killer
hyperparameter_tuning.main(tests.arguments({folder!r}, 2))
"""


def test_a_killed_search_goes_on_and_is_never_worse_than_the_default(made_up, tmp_path, capsys):
    paths = [str(STUDIES.parent), str(STUDIES), str(pathlib.Path(__file__).parent)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_THE_SECOND_TRIAL.format(folder=str(tmp_path))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = tmp_path / PROJECT / "trial_0" / "trial.json"
    assert json.loads(finished.read_text())["status"] == "COMPLETED"
    interrupted = tmp_path / PROJECT / "trial_1" / "trial.json"
    values = json.loads(interrupted.read_text())["hyperparameters"]["values"]
    before = finished.read_bytes()

    report = hyperparameter_tuning.main(arguments(tmp_path, 2))

    printed = capsys.readouterr().out
    assert "Going on after 1 of 2 trials, which an earlier run finished." in printed
    assert finished.read_bytes() == before
    trials = {trial["trial"]: trial for trial in report["trials"]}
    assert list(sorted(trials)) == ["0", "1"]
    assert trials["1"]["values"] == values, "the interrupted trial runs again"
    default, best = report["results"].values()
    assert default["trial"] == "0" and default["values"]["moe/num_experts"] == 4
    within = [trial for trial in report["trials"] if trial["cost"] <= report["budget"]]
    assert best["loss"] == min(trial["loss"] for trial in within) <= default["loss"]
    assert f"validation loss {best['loss'] / default['loss'] - 1:+.1%}" in printed
    assert f"test loss {best['test_loss'] / default['test_loss'] - 1:+.1%}" in printed
    assert all(0 <= result["test_accuracy"] <= 1 for result in (default, best))
    folder = tmp_path / PROJECT
    assert json.loads((folder / "results.json").read_text()) == report
    assert (folder / "trade_off.png").stat().st_size > 1000

    finished.write_text("{")
    with pytest.raises(ValueError, match="is damaged.*Delete this folder"):
        hyperparameter_tuning.main(arguments(tmp_path, 2))


def test_another_budget_is_another_search(made_up, tmp_path):
    report = hyperparameter_tuning.main([*arguments(tmp_path, 1), "--budget", "0.5"])
    assert [folder.name for folder in tmp_path.iterdir()] == [PROJECT.replace("1.1", "0.5")]
    assert list(report["results"]) == ["picked by hand", "nearest to the budget"]
    default, best = report["results"].values()
    assert default == best and default["cost"] == pytest.approx(2 * report["budget"])


def test_trials_and_epochs_must_be_positive(tmp_path):
    # KerasTuner takes no trials for no end of them.
    with pytest.raises(ValueError, match="^`--trials` must be a positive integer. Received"):
        hyperparameter_tuning.main(arguments(tmp_path, 0))
    with pytest.raises(ValueError, match="^`--epochs` must be a positive integer. Received"):
        hyperparameter_tuning.main([*arguments(tmp_path, 1), "--epochs", "0"])


def test_the_vocabulary_does_not_change_from_run_to_run():
    code = "from vocabulary import Vocabulary; print(Vocabulary.learn(['c b a d'] * 2, 3, 4).words)"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(STUDIES), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in "123"
    ]
    assert {run.stdout for run in runs} == {"['a', 'b', 'c']\n"}
