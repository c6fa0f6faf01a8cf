"""The language model example, on made-up text that needs no network."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sentencepiece")

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import datasets  # noqa: E402
import decoder_model  # noqa: E402
import id_batches  # noqa: E402
import language_model  # noqa: E402
from training_journal import Journal  # noqa: E402

WORDS = "the moon rocket is in orbit and brake of wheel on road".split()


def made_up_split(documents, seed):
    generator = np.random.default_rng(seed)
    # Each word is followed by one of two others: there is something to learn.
    texts = []
    for _ in range(documents):
        steps = np.cumsum(generator.integers(1, 3, 40)) % len(WORDS)
        texts.append(" ".join(WORDS[step] for step in steps))
    return datasets.Split(texts, np.zeros(documents, "int32"))


def made_up_data(name=None, data_dir=None):
    splits = [made_up_split(documents, seed) for seed, documents in enumerate((64, 16, 1))]
    return datasets.TextDataset(*splits, class_names=["made up"])


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(datasets, "load", made_up_data)


def run(tmp_path, *arguments):
    return language_model.main(["--smoke", "--experts", "4", "--output", str(tmp_path), *arguments])


def test_compare_trains_reports_saves_and_writes(made_up, tmp_path, capsys):
    report = run(tmp_path, "--compare", "--seeds", "2", "--moe-every", "2")
    sparse, dense = (report["results"][name] for name in ("mixture of experts", "dense twin"))
    for result in (sparse, dense):
        perplexities = [run["validation_perplexity"] for run in result["runs"]]
        assert len(set(perplexities)) == 2
        assert max(perplexities) < 60, "no better than guessing"
    assert sparse["active_parameters"] < sparse["parameters"]
    assert dense["active_parameters"] == dense["parameters"]
    # They differ by the router, and by the second expert's output bias.
    assert abs(sparse["active_parameters"] - dense["parameters"]) < 100
    assert "mixture of experts" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == report
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000
    assert not (tmp_path / "progress").exists()

    written = language_model.main(["--generate", "the moon", "--output", str(tmp_path)])
    assert written.startswith("the moon")
    assert len(written) > len("the moon")
    again = ["--generate", "the moon", "--output", str(tmp_path), "--seed"]
    assert language_model.main([*again, "0"]) == written
    assert language_model.main([*again, "1"]) != written
    with pytest.raises(ValueError, match="must leave room in the model's window of 16 subwords"):
        language_model.main(["--generate", "moon " * 20, "--output", str(tmp_path)])


def test_writing_needs_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="Train one first, without --generate"):
        language_model.main(["--generate", "moon", "--output", str(tmp_path)])


def test_the_cache_changes_nothing_that_is_written():
    feedforwards = [keras.layers.Dense(16), keras.layers.Dense(16)]
    model = decoder_model.build_model(20, 12, 16, feedforwards)
    ids = np.array([3, 1, 4])
    # Almost cold: the likeliest id is drawn, unless two are close.
    written = decoder_model.write(model, ids, temperature=1e-4)
    for position in range(2, 11):
        row = np.zeros((1, 12), "int32")
        row[0, : position + 1] = written[: position + 1]
        logits = keras.ops.convert_to_numpy(model(row))[0, position]
        assert written[position + 1] == np.argmax(logits)


def test_draws_follow_the_probabilities():
    writer = decoder_model.Writer(decoder_model.build_model(4, 3, 8, []), temperature=0.5)
    logits = 0.5 * np.log(np.array([[0.1, 0.2, 0.3, 0.4]], "float32"))
    draws = [0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 1.0]
    drawn = [
        int(writer._draw(keras.ops.convert_to_tensor(logits), np.array([draw], "float32"))[0])
        for draw in draws
    ]
    assert drawn == [0, 0, 1, 1, 2, 2, 3, 3]


def test_every_second_block_is_sparse():
    assert decoder_model.moe_every(2, 5, lambda: "s", lambda: "d") == ["d", "s", "d", "s", "d"]
    assert decoder_model.moe_every(1, 2, lambda: "s", lambda: "d") == ["s", "s"]


def test_rows_overlap_by_one_id():
    found = id_batches.rows([np.arange(5), np.arange(5, 11)], length=5)
    np.testing.assert_array_equal(found, [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]])


def test_batches_begin_at_the_epoch_and_show_each_row_once_a_pass():
    batches = id_batches.Batches(np.arange(14).reshape(7, 2), batch_size=2, steps=2, seed=0)

    def first(number):
        pairs = list(batches.dataset().take(number).as_numpy_iterator())
        assert all((following == ids + 1).all() for ids, following in pairs)
        return [ids[:, 0].tolist() for ids, _ in pairs]

    whole = first(6)
    for one_pass in (whole[:3], whole[3:]):
        assert len(set(sum(one_pass, []))) == 6
    assert whole[:3] != whole[3:]
    batches.on_epoch_begin(1)
    assert first(4) == whole[2:]


class Killed(Exception):
    """Stands for SIGKILL in the middle of an epoch."""


def test_an_interrupted_run_goes_on_and_ends_where_it_would_have(made_up, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")

    def kill(epoch_and_batch):
        class Bomb(Journal):
            def on_epoch_begin(self, epoch, logs=None):
                super().on_epoch_begin(epoch, logs)
                self._epoch = epoch

            def on_train_batch_end(self, batch, logs=None):
                super().on_train_batch_end(batch, logs)
                if (self._epoch, batch) == epoch_and_batch:
                    raise Killed

        return Bomb

    for moment in ((0, 4), (1, 5)):
        monkeypatch.setattr(language_model, "Journal", kill(moment))
        with pytest.raises(Killed):
            run(tmp_path / "killed")
    monkeypatch.setattr(language_model, "Journal", Journal)
    resumed = run(tmp_path / "killed")
    perplexities = [
        report["results"]["mixture of experts"]["runs"][0]["validation_perplexity"]
        for report in (whole, resumed)
    ]
    np.testing.assert_allclose(*perplexities, rtol=1e-3)


SCRIPT = """
import datasets, language_model, test_examples_language_model as made_up
datasets.load = made_up.made_up_data
language_model.SMOKE = language_model.SMOKE._replace(epochs={epochs})
language_model.main(["--smoke", "--experts", "4", "--output", {output!r}])
"""


def test_sigkill_loses_nothing_that_was_learnt(tmp_path):
    paths = [str(EXAMPLES.parent), str(EXAMPLES), str(pathlib.Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    output = str(tmp_path / "model")

    def start(epochs):
        script = SCRIPT.format(output=output, epochs=epochs)
        command = [sys.executable, "-c", script]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    endless = start(1000)
    backups = pathlib.Path(output, "progress")
    while not list(backups.glob("*/*/backup/training_metadata.json.bkp")):
        assert endless.poll() is None, "it ended by itself"
        time.sleep(0.05)
    endless.send_signal(signal.SIGKILL)
    endless.communicate()
    (journal,) = backups.glob("*/*/journal.json")
    epochs = len(json.loads(journal.read_text()))
    again = start(1000)
    for line in again.stdout:
        if "It was interrupted: going on after epoch" in line:
            break
    again.kill()
    again.communicate()
    assert int(line.rstrip(".\n").split()[-1]) == epochs
