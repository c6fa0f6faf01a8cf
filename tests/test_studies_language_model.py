"""The language model example, on made-up text that needs no network."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sentencepiece")

pytestmark = pytest.mark.backends("torch")

STUDIES = pathlib.Path(__file__).parents[1] / "studies"
sys.path.insert(0, str(STUDIES))

import datasets  # noqa: E402
import decoder_model  # noqa: E402
import id_batches  # noqa: E402
import language_model  # noqa: E402
import twins  # noqa: E402

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


ARGUMENTS = ["--smoke", "--experts", "4", "--moe-every", "2"]
SPARSE, DENSE = "mixture of experts", "dense twin"


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(datasets, "load", made_up_data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole run: its report and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets, "load", made_up_data)
        report = language_model.main([*ARGUMENTS, "--compare", "--output", str(folder)])
    return report, folder


def perplexity(report, name=SPARSE):
    return report["results"][name]["runs"][0]["validation_perplexity"]


def test_compare_trains_reports_and_saves(trained):
    report, folder = trained
    sparse, dense = (report["results"][name] for name in (SPARSE, DENSE))
    assert max(perplexity(report, name) for name in (SPARSE, DENSE)) < 60, "mere guessing"
    assert sparse["active_parameters"] < sparse["parameters"]
    assert dense["active_parameters"] == dense["parameters"]
    # They differ by the router, and by the second expert's output bias.
    assert abs(sparse["active_parameters"] - dense["parameters"]) < 100
    assert json.loads((folder / "results.json").read_text()) == report
    assert (folder / "learning_curves.png").stat().st_size > 1000
    assert not (folder / "progress").exists()


def test_the_dense_twin_is_given_the_time_of_the_mixture(trained):
    runs = trained[0]["results"][language_model.DENSE_EQUAL_TIME]["runs"]
    assert runs[0]["epochs"] >= 1
    times = {SPARSE: 30.0, DENSE: 20.0}
    # The fastest of all runs: one of them was held up by other work.
    results = {
        name: {"runs": [{"fastest_ms_per_step": ms}, {"fastest_ms_per_step": 2 * ms}]}
        for name, ms in times.items()
    }
    size = language_model.SMOKE._replace(epochs=12)
    assert language_model.equal_time(size, results).epochs == 18


def test_a_saved_model_goes_on_with_a_text(trained):
    def generate(text, *more):
        return language_model.main(["--generate", text, "--output", str(trained[1]), *more])

    written = generate("the moon")
    assert written.startswith("the moon")
    assert len(written) > len("the moon")
    assert generate("the moon", "--seed", "0") == written
    assert generate("the moon", "--seed", "1") != written
    with pytest.raises(ValueError, match="must leave room in the model's window of 16 subwords"):
        generate("moon " * 20)


def test_writing_needs_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="without model.keras.*Train one first"):
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


@pytest.mark.parametrize("router", ["top_k", "relu", "switch"])
def test_the_twin_is_as_wide_as_the_experts_that_serve_a_token(router):
    options = language_model.parse_options(["--router", router, "--experts", "4"])
    sparse, dense = (
        twins.count_parameters(language_model.make_model(name, 50, options, language_model.SMOKE))
        for name in (SPARSE, DENSE)
    )
    assert abs(sparse["active_parameters"] - dense["active_parameters"]) < 250


def test_a_router_that_looks_ahead_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without later tokens. Received: --router expert_choice"):
        language_model.main(["--router", "expert_choice", "--output", str(tmp_path)])


def test_an_unfinished_run_of_another_command_is_kept(made_up, tmp_path):
    other = tmp_path / "progress" / "another command"
    other.mkdir(parents=True)
    language_model.main([*ARGUMENTS, "--output", str(tmp_path)])
    assert list((tmp_path / "progress").iterdir()) == [other]


def test_every_second_block_is_sparse():
    assert twins.moe_every(2, 5, lambda: "s", lambda: "d") == ["d", "s", "d", "s", "d"]
    assert twins.moe_every(1, 2, lambda: "s", lambda: "d") == ["s", "s"]
    with pytest.raises(ValueError, match="Every n-th block.*Received: 3 for 2 blocks"):
        twins.moe_every(3, 2, lambda: "s", lambda: "d")


def test_rows_overlap_by_one_id():
    found = id_batches.rows([np.arange(5), np.arange(5, 11)], length=5)
    np.testing.assert_array_equal(found, [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]])


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="must fill a row of 6 subwords. Received: 5 subwords"):
        id_batches.rows([np.arange(5)], length=5)
    with pytest.raises(ValueError, match="Received: 3 rows, batch_size=4. Pass a smaller"):
        id_batches.Batches(np.zeros((3, 6), "int32"), batch_size=4, steps=1, seed=0)


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


HANGS_IN_THE_SECOND_EPOCH = """
import time
import datasets, language_model, resuming, test_studies_language_model as tests

class Hangs(resuming.Journal):
    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if (self.epoch, batch) == (1, 5):
            print("hanging", flush=True)
            time.sleep(600)

resuming.Journal = Hangs
datasets.load = tests.made_up_data
language_model.main([*tests.ARGUMENTS, "--output", {output!r}])
"""


def test_sigkill_loses_nothing(trained, made_up, tmp_path, capsys):
    paths = [str(STUDIES.parent), str(STUDIES), str(pathlib.Path(__file__).parent)]
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS_IN_THE_SECOND_EPOCH.format(output=str(tmp_path))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any("hanging" in line for line in process.stdout), "it ended by itself"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    report = language_model.main([*ARGUMENTS, "--output", str(tmp_path)])
    assert "Going on after epoch 1 of 2, which an earlier run finished." in capsys.readouterr().out
    # The order of the data and the optimizer go on as well.
    np.testing.assert_allclose(perplexity(report), perplexity(trained[0]), rtol=1e-6)


ON_FOUR_DEVICES = """
import json
import datasets, language_model, test_studies_language_model as tests

datasets.load = tests.made_up_data
arguments = [*tests.ARGUMENTS, "--expert-parallel", "2", "--output", {output!r}]
print(json.dumps(tests.perplexity(language_model.main(arguments))))
"""


@pytest.mark.backends("jax")
def test_experts_on_two_of_four_devices_learn_the_same(made_up, tmp_path):
    alone = language_model.main([*ARGUMENTS, "--output", str(tmp_path / "alone")])
    paths = [str(STUDIES.parent), str(STUDIES), str(pathlib.Path(__file__).parent)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", ON_FOUR_DEVICES.format(output=str(tmp_path / "four"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    value = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(value, perplexity(alone), rtol=1e-3)
