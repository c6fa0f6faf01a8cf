"""Mixtures against dense models, on made-up text that needs no network."""

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
import moe_vs_dense  # noqa: E402
from datasets import pairs  # noqa: E402
from made_up_text import made_up_text  # noqa: E402


def test_every_task_is_trained_with_and_without_experts(monkeypatch, tmp_path, capsys):
    data = made_up_text((96, 48, 32), num_words=40)
    monkeypatch.setattr(datasets, "load", lambda name, data_dir=None: data)
    sentences = [f"{word} {other}" for word in "abcdefgh" for other in "ijklmnop"]
    both = pairs.Pairs(sentences, [sentence.upper() for sentence in sentences])
    monkeypatch.setattr(pairs, "load", lambda name, data_dir=None: [both, both, both])
    monkeypatch.setattr(
        moe_vs_dense.translation, "SMOKE", moe_vs_dense.translation.SMOKE._replace(vocabulary=40)
    )
    monkeypatch.chdir(tmp_path)
    size = moe_vs_dense.language_model.SMOKE._replace(subwords=40)
    monkeypatch.setattr(moe_vs_dense.language_model, "SMOKE", size)
    arguments = ["--smoke", "--experts", "4", "--seeds", "1", "--output", str(tmp_path / "out")]
    results = moe_vs_dense.main(arguments)
    assert set(results) == set(moe_vs_dense.TASKS)
    for task, models in results.items():
        assert set(models) == {"dense", "4 experts"}
        for (run,) in models.values():
            assert np.isfinite(run["losses"]).all()
            assert task != "language_model" or run["losses"][-1] < run["losses"][0]
            assert run["seconds"][-1] == run["steps"][-1] * run["ms_per_step"] / 1000
    assert (tmp_path / "out" / "moe_vs_dense.png").exists()
    assert not (tmp_path / "out" / "progress").exists()
    assert capsys.readouterr().out.count("loss at that time") == len(results)


def test_the_loss_at_a_time_lies_on_the_line_between_epochs():
    run = moe_vs_dense.course([4.0, 2.0, 1.0], steps_an_epoch=10, ms_per_step=100.0)
    assert run["seconds"] == [1, 2, 3]
    assert moe_vs_dense.loss_at(run, 1.5) == 3.0
    assert moe_vs_dense.loss_at(run, 9) == 1.0
    assert np.isnan(moe_vs_dense.loss_at(run, 0.9)), "no loss is known yet"


def test_the_table_compares_runs_of_one_seed(capsys):
    dense, sparse = (
        [moe_vs_dense.course(losses, 10, ms) for losses in both]
        for both, ms in (([[4, 2], [4, 3]], 100), ([[3, 1], [3, 2.5]], 200))
    )
    moe_vs_dense.print_table("made up", {"dense": dense, "4 experts": sparse})
    title, first, second = capsys.readouterr().out.strip().splitlines()
    assert first.split() == "dense 2.5000 +- 0.5000 +0.0000 to +0.0000 2.5000 +- 0.5000 100".split()
    # The dense models ended after 2 s, the first epoch of the others.
    assert (
        second.split()
        == "4 experts 1.7500 +- 0.7500 -1.0000 to -0.5000 3.0000 +- 0.0000 200".split()
    )
