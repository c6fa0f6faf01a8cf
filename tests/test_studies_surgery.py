"""Upcycling and pruning of language models, on made-up text that needs no network."""

import json
import pathlib
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sentencepiece")

pytestmark = pytest.mark.backends("torch")

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "studies"))

import datasets  # noqa: E402
import language_model  # noqa: E402
import pruning  # noqa: E402
import upcycling  # noqa: E402
from made_up_text import made_up_text  # noqa: E402


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    data = made_up_text((96, 48, 32), num_words=40)
    monkeypatch.setattr(datasets, "load", lambda name, data_dir=None: data)
    size = language_model.SMOKE._replace(subwords=40)
    monkeypatch.setattr(language_model, "SMOKE", size)


def test_all_models_train_on_from_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(upcycling, "SMOKE", upcycling.SMOKE._replace(subwords=40))
    monkeypatch.setattr(upcycling, "BATCH_SIZE", 8)
    arguments = ["--smoke", "--seeds", "0", "--output", str(tmp_path), "--models", "32 halves"]
    results = upcycling.main(arguments)
    assert list(results) == ["dense", "32 halves"]
    dense, sparse = (runs[0] for runs in results.values())
    assert sparse["before"] == dense["before"], "both begin where the first half ended"
    assert all(run["losses"][-1] < run["before"] for run in (dense, sparse))
    assert sparse["parameters"] > 2 * dense["parameters"]
    # Two halves serve a token: beyond the dense layer it pays for the router.
    router = upcycling.SMOKE.blocks * upcycling.SMOKE.features * 32
    assert router < sparse["active_parameters"] - dense["active_parameters"] < 1.2 * router
    assert json.loads((tmp_path / "results.json").read_text())["dense"]["0"] == dense

    monkeypatch.setattr(language_model, "fit", None)
    assert upcycling.main(arguments) == results, "nothing is trained twice"
    assert capsys.readouterr().out.count("equal time") == 2


def test_each_measure_prunes_the_same_model(tmp_path, capsys):
    results = pruning.main(["--smoke", "--experts", "4", "--draws", "1", "--output", str(tmp_path)])
    assert set(results) == {"all experts", *pruning.MEASURES}
    assert np.isfinite([*results.values()]).all()
    assert "saliency" in capsys.readouterr().out
    flops = json.loads((tmp_path / "results.json").read_text())["flops"]
    assert flops["top-1"] < flops["all experts"] < flops["top-3"] < flops["top-4"]
