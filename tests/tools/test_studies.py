"""Each study in its small size, on made-up text that needs no network."""

import json
import re

import compare_routers
import comparisons
import datasets
import growing
import hyperparameter_tuning
import keras
import language_model
import numpy as np
import pretrained
import pruning
import pytest
import resuming
import several
import short_runs
import sparsity
import tables
import tasks
import text_classification
import transformers
import translation
import translation_causes
import translations
import upcycling
from forced_router import ForcedRouter
from made_up_text import TOPICS, made_up_text, use_made_up_data

from keras_moe import layers

# KerasTuner asks the current thread for its name in an old way.
pytestmark = [
    pytest.mark.backends("torch"),
    pytest.mark.filterwarnings("ignore:(currentThread|getName)\\(\\):DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def made_up_data():
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_made_up_data(monkeypatch)
        monkeypatch.setattr(comparisons, "TIMED_ROUNDS", 2)
        yield


@pytest.fixture
def study(tmp_path):
    """A function that runs a study in its small size, and returns its report."""
    return lambda module, *arguments: module.main(
        ["--smoke", "--output", str(tmp_path), *arguments]
    )


def test_the_classifier_learns_and_shows_its_experts(study, monkeypatch, tmp_path, capsys):
    data = made_up_text((256, 32, 32), num_words=12)
    monkeypatch.setattr(datasets, "load", lambda name, data_dir: data)
    monkeypatch.setattr(text_classification, "BATCH_SIZE", 16)
    report = study(text_classification, "--epochs", "3", "--experts", "4", "--compare")
    sparse, dense, linear = (runs[0] for runs in report["results"].values())
    assert min(sparse["test_accuracy"], linear["test_accuracy"]) > 0.8
    assert min(sparse["seconds"], dense["seconds"], linear["seconds"]) > 0
    # They differ by a router and the output biases of the second expert.
    assert 0 < sparse["active_parameters"] - dense["active_parameters"] < 100
    assert sparse["active_parameters"] < dense["parameters"] / 2, "a table of words is not active"
    printed = capsys.readouterr().out
    typical = printed.partition("typical words of each expert")[2]
    assert any(word in typical.splitlines()[1] for word in " ".join(TOPICS.values()).split())
    assert f"page about the experts: {tmp_path / 'report.html'}" in printed
    assert "about equal" in text_classification.verdict([dense], [dense], 9)
    worse = {"test_accuracy": dense["test_accuracy"] - 0.05}
    assert "better than the dense model by 5.0%" in text_classification.verdict([dense], [worse], 9)
    assert json.loads((tmp_path / "results.json").read_text()) == report
    for written in ("learning_curves.png", "experts_by_class.png", "report.html"):
        assert (tmp_path / written).stat().st_size > 1000


def test_words_have_the_colours_of_their_experts_in_a_terminal_alone(monkeypatch):
    phrases, experts = ["moon and", "orbit", "brake", ""], [3, 3, 0, 1]
    assert text_classification.in_colours(phrases, experts) == "[3] moon and orbit [0] brake "
    monkeypatch.setattr(text_classification, "HAS_COLOURS", True)
    coloured = text_classification.in_colours(phrases, experts, width=12)
    assert [line.count("moon") for line in coloured.split("\n")] == [1, 0]
    colours = re.findall(r"\x1b\[48;5;(\d+);38;5;16m(\w+) \x1b\[0m", coloured)
    assert [word for _, word in colours] == ["moon", "and", "orbit", "brake"]
    assert colours[0][0] == colours[2][0] != colours[3][0]


def test_language_models_are_compared(study, tmp_path):
    results = study(language_model, "--experts", "4", "--compare")["results"]
    (sparse,), (dense,), (in_time,) = results.values()
    assert max(run["validation_perplexity"] for run in (sparse, dense)) < 60, "mere guessing"
    assert abs(sparse["active_parameters"] - dense["parameters"]) < 200
    assert in_time["epochs"] >= 1 and not (tmp_path / "progress").exists()
    assert (tmp_path / "learning_curves.png").exists()


def test_translators_are_compared(study, tmp_path, capsys):
    options = ["--epochs", "1", "--experts", "4", "--beams", "2", "--compare"]
    dense, sparse = (runs[0] for runs in study(translation, *options).values())
    assert 0 < sparse["active_parameters"] - dense["parameters"] < 150
    assert len(sparse["texts"]) == 16 and len(sparse["words"]) == 4
    printed = capsys.readouterr().out
    assert f"difference in BLEU: {sparse['BLEU'] - dense['BLEU']:+.4f} over seeds" in printed
    assert f"\ndense: {dense['texts'][0]}\n" in printed or sparse["texts"][0] not in printed
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000


def test_verses_are_drawn_alike_for_both_models(capsys):
    references = [f"the king of the {name} went up to a house" for name in "abcdefghijkl"]
    # The better one is better in each text, by as much.
    better, worse = (
        {"texts": [" ".join(text.split()[:length]) for text in references]} for length in (8, 6)
    )
    translations.print_differences([better] * 2, [worse] * 2, references)
    lines = capsys.readouterr().out.splitlines()
    for line, (name, metric) in zip(lines, translations.METRICS.items(), strict=True):
        scores = [metric.corpus_score(run["texts"], [references]).score for run in (better, worse)]
        difference, _, low, high = map(float, re.findall(r"[-+]?\d+\.\d+", line)[:4])
        assert line.startswith(f"difference in {name}: ") and "above 0 in 100.0%" in line
        np.testing.assert_allclose([difference, low, high], np.subtract(*scores), atol=0.1)


def test_typical_words_are_those_that_an_expert_serves_most_often():
    class Words(list):
        def pieces(self, ids):
            return [self[index] for index in ids]

    ids = keras.Input((4,), dtype="int32", name="target")
    bank = layers.FeedForwardExperts(2, 4)
    outputs = layers.MixtureOfExperts(bank, ForcedRouter(top_k=1))(
        keras.layers.Embedding(7, 4)(ids)
    )
    model = keras.Model({"target": ids}, outputs)
    # Even positions are served by the first expert; the last word is with both.
    batch = {"target": np.array([[4, 5, 6, 6]] * 40, "int32")}
    words = Words("pad start end unknown even odd both".split())
    found = translations.words_by_expert(model, [(batch, None, None)], words)
    assert [each["words"] for each in found] == [["even", "both"], ["odd", "both"]]
    assert [each["share"] for each in found] == [0.5, 0.5]


def test_a_second_command_adds_seeds_and_trains_nothing_twice(study, monkeypatch):
    models = {name: sparsity.MODELS[name] for name in ("dense", "8 experts")}
    monkeypatch.setattr(sparsity, "MODELS", models)
    monkeypatch.setattr(sparsity, "BATCH_SIZE", 8)
    monkeypatch.setattr(sparsity, "LEARNING_RATES", sparsity.LEARNING_RATES[:1])
    first = study(sparsity, "--seeds", "0")
    dense, sparse = (runs[0] for runs in first.values())
    assert all(run["losses"][-1] < run["losses"][0] for run in (dense, sparse))
    # Beyond the twin a token pays for the router, and for the biases of two experts.
    router = 2 * 8 * sparsity.SMOKE.features
    assert 0 < sparse["active_parameters"] - dense["active_parameters"] < 2 * router
    trained, fit = [], resuming.fit
    monkeypatch.setattr(
        resuming, "fit", lambda *args, **kwargs: trained.append(1) or fit(*args, **kwargs)
    )
    second = study(sparsity, "--seeds", "0", "1")
    assert len(trained) == len(first), "one run each of the new seed, and no trial"
    assert all(second[name][0] == runs[0] for name, runs in first.items())


def test_experts_are_copied_in_the_middle_of_training(study, monkeypatch):
    monkeypatch.setattr(growing, "BATCH_SIZE", 8)
    # Measured times would give other numbers of steps.
    monkeypatch.setattr(growing, "step_times", lambda *arguments: {"8": 1.0, "32": 1.0})
    results = study(growing, "--seeds", "0")
    whole, grown, few = (results[name][0] for name in growing.MODELS)
    assert few["half"] == few["then"] == grown["half"] != grown["then"]
    assert grown["parameters"] == whole["parameters"] > few["parameters"]
    assert all(run["loss"] < run["half"] for run in (whole, grown, few))


def test_a_pretrained_model_trains_on(study, monkeypatch, capsys):
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
    )
    loaded = transformers.LlamaForCausalLM(config), lambda text: {"input_ids": [*text.encode()]}
    monkeypatch.setattr(pretrained, "load", lambda: loaded)
    results = study(pretrained, "--seeds", "0", "--models", "2 of 8")
    assert "100.0% next tokens equal" in capsys.readouterr().out.partition("2 of 8")[2]
    assert all(runs[0]["losses"][-1] < runs[0]["losses"][0] for runs in results.values())


def test_a_collapse_stays_until_it_is_balanced(study, monkeypatch):
    # Twenty steps are few: the bias has to hurry.
    bias = lambda: (compare_routers.routers.LossFreeBias(rate=0.02), [])  # noqa: E731
    monkeypatch.setitem(compare_routers.BALANCING, "loss_free bias", bias)
    options = ["--seeds", "1", "--routers", "top_k", "hash", "--balancing", "nothing"]
    results = study(compare_routers, *options, "loss_free bias")
    assert all(runs[0]["test_accuracy"] > 0.6 for runs in results["routers"].values())
    collapsed = compare_routers.NUM_EXPERTS / 2 - 1  # two of sixteen experts do everything
    assert results["balancing"]["nothing"][0]["imbalance"] == [collapsed] * 2
    assert results["balancing"]["loss_free bias"][0]["imbalance"][-1] < collapsed / 2


@pytest.mark.parametrize("relatedness", [1.0, 0.5, 0.0])
def test_the_targets_of_two_tasks_are_as_related_as_was_set(relatedness):
    x, y = tasks.make_data(relatedness, np.random.default_rng(0), 20_000)
    directions = x.T @ (y - y.mean(axis=0))
    cosine = np.prod(directions, axis=1).sum() / np.prod(np.linalg.norm(directions, axis=0))
    assert abs(abs(cosine) - relatedness) < 0.05


SMALL = [
    (translation_causes, "--seeds 0 --changes none"),
    (pruning, "--experts 4 --draws 1"),
    (short_runs, "--seeds 1 --tasks table --settings default --steps 2"),
    (hyperparameter_tuning, "--epochs 1 --seeds 1 --trials 2"),
    (upcycling, "--seeds 0"),
    (several, "--seeds 0"),
]


@pytest.mark.parametrize("module, arguments", SMALL)
def test_a_study_measures_finite_numbers(study, module, arguments, monkeypatch):
    if hasattr(module, "BATCH_SIZE"):
        monkeypatch.setattr(module, "BATCH_SIZE", 8)
    report = study(module, *arguments.split())
    numbers = [each for each in keras.tree.flatten(report) if isinstance(each, float)]
    assert numbers and np.isfinite(numbers).all()


def test_tasks_of_known_relatedness_are_compared():
    name = "MMoE, DSelect-2 for all"
    (runs,) = tasks.main(["--smoke", "--seeds", "1", "--models", name])[name]
    assert np.isfinite([result["error"] for result in runs.values()]).all()
    assert runs[0.0]["experts"] == tasks.NUM_EXPERTS and 0 < runs[0.0]["distance"] < 1


def test_models_of_a_table_are_compared_after_as_many_trials(study, monkeypatch):
    table, draw = tables.TABLES["adult"], np.random.default_rng(0)
    codes = draw.integers(0, 9, (400, len(table.numbers + table.categories)))
    rows = [dict(zip(table.numbers + table.categories, map(str, row))) for row in codes]
    for row in rows:
        row["income"] = " >50K" if int(row["age"]) > 4 else " <=50K"
    monkeypatch.setattr(tables, "read", lambda table: rows)
    results = study(tables, "--tables", "adult", "--seeds", "1")
    assert [each["model"] for each in results] == [*tables.NETWORKS, "gradient boosting"]
    assert results[-1]["scores"] == [1.0]
