"""Upcycling and pruning of language models, on made-up text that needs no network."""

import json
import pathlib
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sentencepiece")

pytestmark = pytest.mark.one_backend("torch")

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


def test_both_halves_train_from_one_model(tmp_path, capsys):
    arguments = ["--smoke", "--experts", "4", "--output", str(tmp_path)]
    results = upcycling.main(arguments)
    dense, sparse, continued = (runs[0] for runs in results.values())
    assert sparse["parameters"] > dense["parameters"] == continued["parameters"]
    # Half a copy is an expert, and two serve a token: but for the router the size is the same.
    router = sparse["active_parameters"] - dense["active_parameters"]
    assert 0 < router < 0.1 * dense["parameters"]
    later = [run["validation_perplexity"] for run in (sparse, continued)]
    assert max(later) < dense["validation_perplexity"], "both go on from there"
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert capsys.readouterr().out.count("\nupcycled ") == 1


def test_each_measure_prunes_the_same_model(tmp_path, capsys):
    results = pruning.main(["--smoke", "--experts", "4", "--draws", "1", "--output", str(tmp_path)])
    assert set(results) == {"all experts", *pruning.MEASURES}
    assert np.isfinite([*results.values()]).all()
    assert "saliency" in capsys.readouterr().out
