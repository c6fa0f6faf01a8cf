"""What studies share: data, batches, translators, resuming, and whole files."""

import pathlib
import subprocess

import files
import keras
import numpy as np
import pytest
import resuming
import translation
from backends import on_one_backend
from datasets import downloads
from id_batches import Batches
from made_up_text import made_up_pairs
from sentence_batches import SentenceBatches, Shapes
from subwords import Subwords

pytestmark = on_one_backend


def test_a_file_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "new" / "model.keras"
    with files.whole(path) as part:
        assert part.suffix == path.suffix
        part.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.whole(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


class EndsInTheSecondEpoch(resuming.Journal):
    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        if epoch == 1:
            raise KeyboardInterrupt


def test_a_resumed_training_equals_an_uninterrupted_one(monkeypatch, tmp_path):
    subwords, batches = made_up_batches(tmp_path)

    def train(folder, seed):
        keras.utils.set_random_seed(seed)
        model = small_translator(batches, len(subwords))
        translation.compile_for_training(model, 2 * len(batches))
        return translation.fit(model, batches, batches, 2, folder)

    whole = train(tmp_path / "whole", seed=3)
    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resuming, "Journal", EndsInTheSecondEpoch)
        train(folder, seed=3)
    # A kill leaves halves beside what is finished.
    for name in (".7-epoch-2.weights.h5", "epoch-2.weights.h5", ".7-journal.json"):
        (folder / name).write_bytes(b"half")
    # Weights and dropout of another seed are replaced.
    resumed = train(folder, seed=5)
    assert len(resumed.pop("ms_per_step")) == 2
    for name, values in resumed.items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-6)
    assert [path.name for path in folder.glob("*.h5")] == ["epoch-2.weights.h5"]


def test_batches_begin_at_the_epoch_and_show_each_row_once_a_pass():
    batches = Batches(np.arange(14).reshape(7, 2), batch_size=2, steps=2, seed=0)

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


def made_up_batches(folder):
    """Subwords of made-up pairs, and batches in two shapes, for which some pairs are too long."""
    train, *_ = made_up_pairs()
    subwords = Subwords.train([*train.sources, *train.targets], 60, folder)
    encoded = (subwords.encode(texts) for texts in train)
    return subwords, SentenceBatches(*encoded, Shapes((4, 7), 56))


def small_translator(batches, vocabulary_size):
    setting = translation.Setting(experts=4)
    return translation.build_model(setting, batches, vocabulary_size, translation.SMOKE, True)


@pytest.fixture
def downloaded(monkeypatch):
    """Programs that download a file of their own."""

    def run(command, cwd, **kwargs):
        name = "made-up_1_all.deb" if "apt-get" in command else "made_up-1.0-py3-none-any.whl"
        pathlib.Path(cwd, name).write_bytes(b"package")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", run)


def test_downloads_are_checked_before_they_are_opened(downloaded, tmp_path):
    (tmp_path / "00.whl").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="must be those with the digests.*'00'.*Delete"):
        downloads.read_from_wheel("made-up==1.0", "00", "member", tmp_path)
    (package,) = downloads.fetch_packages(["made-up"], tmp_path)
    assert downloads.fetch_packages(["made-up"], tmp_path) == [package]
    package.write_bytes(b"pack")
    with pytest.raises(ValueError, match="must be those with the digests.*made-up_1.*Delete"):
        downloads.fetch_packages(["made-up"], tmp_path)
