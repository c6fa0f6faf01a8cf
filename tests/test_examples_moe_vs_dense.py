"""Mixtures against dense models, on made-up text that needs no network."""

import pathlib
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sentencepiece")

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

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
    assert capsys.readouterr().out.count("loss, equal time") == len(results)


def test_the_loss_at_a_time_lies_on_the_line_between_epochs():
    run = moe_vs_dense.course([4.0, 2.0, 1.0], steps_an_epoch=10, ms_per_step=100.0)
    assert run["seconds"] == [1, 2, 3]
    assert moe_vs_dense.loss_at(run, 1.5) == 3.0
    assert moe_vs_dense.loss_at(run, 9) == 1.0
