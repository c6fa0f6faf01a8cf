"""Each study in its small size, on made-up text that needs no network."""

import json

import compare_routers
import comparisons
import hyperparameter_tuning
import keras
import language_model
import numpy as np
import pretrained
import pruning
import pytest
import resuming
import sparsity
import tasks
import transformers
import translation
import translation_causes
import upcycling
from made_up_text import use_made_up_data

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


def written(folder):
    return json.loads((folder / "results.json").read_text())


def test_language_models_are_compared(tmp_path):
    arguments = ["--smoke", "--experts", "4", "--compare", "--output", str(tmp_path)]
    results = language_model.main(arguments)["results"]
    (sparse,), (dense,), (in_time,) = results.values()
    assert max(run["validation_perplexity"] for run in (sparse, dense)) < 60, "mere guessing"
    assert sparse["active_parameters"] < sparse["parameters"]
    # They differ by two routers, and by the second expert's output biases.
    assert abs(sparse["active_parameters"] - dense["parameters"]) < 200
    assert dense["active_parameters"] == dense["parameters"] and in_time["epochs"] >= 1
    assert written(tmp_path)["results"] == results
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000
    assert not (tmp_path / "progress").exists()


def test_translators_are_compared(tmp_path, capsys):
    arguments = ["--smoke", "--epochs", "1", "--experts", "4", "--beams", "2", "--compare"]
    results = translation.main([*arguments, "--output", str(tmp_path)])["results"]
    (sparse,), (dense,) = results.values()
    # They differ by routers and by the output biases of the second experts.
    assert 0 < sparse["active_parameters"] - dense["parameters"] < 150
    assert f"difference in bleu: {sparse['bleu'] - dense['bleu']:+.4f}" in capsys.readouterr().out
    assert written(tmp_path)["results"] == results
    assert (tmp_path / "learning_curves.png").exists()
    assert not (tmp_path / "unfinished").exists()


def test_each_cause_is_compared_with_the_dense_model(tmp_path, capsys):
    changes = ["none", "decoder only"]
    command = ["--smoke", "--output", str(tmp_path), "--seeds", "0", "--changes", *changes]
    results = translation_causes.main(command)
    runs = [results[name][0] for name in changes]
    assert runs[0]["dense"] == runs[1]["dense"], "it was trained once"
    assert runs[0]["mixture"] != runs[1]["mixture"]
    shown = capsys.readouterr().out
    assert shown.count("dense, seed 0") == 1 and shown.count("mixture, seed 0") == 2
    assert f"{runs[0]['mixture'] - runs[0]['dense']:+.4f}" in shown


@pytest.fixture
def few_models(monkeypatch):
    """The study of sparsity with two models and one learning rate."""
    models = {name: sparsity.MODELS[name] for name in ("dense", "8 experts")}
    monkeypatch.setattr(sparsity, "MODELS", models)
    monkeypatch.setattr(sparsity, "BATCH_SIZE", 8)
    monkeypatch.setattr(sparsity, "LEARNING_RATES", sparsity.LEARNING_RATES[:1])


def test_a_second_command_adds_seeds_and_trains_nothing_twice(few_models, tmp_path, monkeypatch):
    arguments = ["--smoke", "--output", str(tmp_path), "--seeds"]
    first = sparsity.main([*arguments, "0"])
    dense, sparse = (runs[0] for runs in first.values())
    assert all(run["losses"][-1] < run["losses"][0] for run in (dense, sparse))
    assert sparse["parameters"] > 1.2 * dense["parameters"]
    # Beyond the twin a token pays for the router, and for the biases of two experts.
    router = 2 * 8 * sparsity.SMOKE.features
    assert 0 < sparse["active_parameters"] - dense["active_parameters"] < 2 * router
    assert (tmp_path / "sparsity.png").exists()

    trained, fit = [], resuming.fit
    monkeypatch.setattr(
        resuming, "fit", lambda *args, **kwargs: trained.append(1) or fit(*args, **kwargs)
    )
    second = sparsity.main([*arguments, "0", "1"])
    assert len(trained) == len(first), "one run each of the new seed, and no trial"
    assert {name: runs[0] for name, runs in second.items()} == {
        name: runs[0] for name, runs in first.items()
    }


def test_upcycled_models_train_on_from_the_dense_one(tmp_path, monkeypatch):
    monkeypatch.setattr(upcycling, "BATCH_SIZE", 8)
    arguments = ["--smoke", "--seeds", "0", "--output", str(tmp_path), "--models", "32 halves"]
    results = upcycling.main(arguments)
    assert list(results) == ["dense", "32 halves"]
    dense, sparse = (runs[0] for runs in results.values())
    assert sparse["before"] == dense["before"], "both begin where the first half ended"
    assert all(run["losses"][-1] < run["before"] for run in (dense, sparse))
    # Two halves serve a token: beyond the dense layer it pays for the router.
    router = upcycling.SMOKE.blocks * upcycling.SMOKE.features * 32
    assert router < sparse["active_parameters"] - dense["active_parameters"] < 1.2 * router
    monkeypatch.setattr(language_model, "fit", None)
    assert upcycling.main(arguments) == results, "nothing is trained twice"


def test_a_pretrained_model_trains_on(tmp_path, monkeypatch, capsys):
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
    )
    dense = transformers.LlamaForCausalLM(config)
    monkeypatch.setattr(
        pretrained, "load", lambda: (dense, lambda text: {"input_ids": [*text.encode()]})
    )
    arguments = ["--smoke", "--seeds", "0", "--output", str(tmp_path), "--models", "8 halves"]
    results = pretrained.main(arguments)
    assert list(results) == ["dense", "8 halves"]
    assert "100.0% next tokens equal" in capsys.readouterr().out.partition("8 halves")[2]
    assert all(
        run["losses"][-1] < run["losses"][0] for runs in results.values() for run in runs.values()
    )
    monkeypatch.setattr(keras.Model, "fit", None)
    assert pretrained.main(arguments) == results, "nothing is trained twice"


def test_each_measure_prunes_the_same_model(tmp_path):
    results = pruning.main(["--smoke", "--experts", "4", "--draws", "1", "--output", str(tmp_path)])
    assert set(results) == {"all experts", *pruning.MEASURES}
    assert np.isfinite([runs[0]["loss"] for runs in results.values()]).all()
    flops = [results[name][0]["flops"] for name in ("top-1", "all experts", "top-3", "top-4")]
    assert flops == sorted(set(flops))


def test_a_collapse_stays_until_it_is_balanced(monkeypatch, tmp_path):
    # Twenty steps are few: the bias has to hurry.
    bias = lambda: (compare_routers.routers.LossFreeBias(rate=0.02), [])  # noqa: E731
    monkeypatch.setitem(compare_routers.BALANCING, "loss_free bias", bias)
    arguments = ["--smoke", "--seeds", "1", "--routers", "top_k", "hash", "--balancing", "nothing"]
    results = compare_routers.main([*arguments, "loss_free bias", "--output", str(tmp_path)])
    assert all(runs[0]["test_accuracy"] > 0.6 for runs in results["routers"].values())
    collapsed = compare_routers.NUM_EXPERTS / 2 - 1  # two of sixteen experts do everything
    assert results["balancing"]["nothing"][0]["imbalance"] == [collapsed] * 2
    assert results["balancing"]["loss_free bias"][0]["imbalance"][-1] < collapsed / 2
    assert (tmp_path / "imbalance.png").exists()


def test_an_interrupted_search_resumes_and_is_never_worse_than_the_default(tmp_path, monkeypatch):
    class Interrupted(hyperparameter_tuning.tuner.CostMonitor):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            if list(tmp_path.glob("*/trial_1")):
                raise KeyboardInterrupt

    arguments = ["--smoke", "--epochs", "1", "--seeds", "1", "--trials", "2"]
    arguments += ["--output", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hyperparameter_tuning.tuner, "CostMonitor", Interrupted)
        hyperparameter_tuning.main(arguments)
    (folder,) = tmp_path.iterdir()
    finished, interrupted = (folder / name / "trial.json" for name in ("trial_0", "trial_1"))
    values = json.loads(interrupted.read_text())["hyperparameters"]["values"]
    before = finished.read_bytes()
    report = hyperparameter_tuning.main(arguments)
    assert finished.read_bytes() == before
    trials = {trial["trial"]: trial for trial in report["trials"]}
    assert sorted(trials) == ["0", "1"]
    assert trials["1"]["values"] == values, "the interrupted trial runs again"
    default, best = report["results"].values()
    assert default["trial"] == "0" and default["values"]["moe/num_experts"] == 4
    within = [trial for trial in report["trials"] if trial["cost"] <= report["budget"]]
    assert best["loss"] == min(trial["loss"] for trial in within) <= default["loss"]
    assert all(0 <= result["test_accuracy"] <= 1 for result in (default, best))
    assert written(folder) == report
    assert (folder / "trade_off.png").stat().st_size > 1000


def test_tasks_of_known_relatedness_are_compared():
    name = "MMoE, DSelect-2 for all"
    (runs,) = tasks.main(["--smoke", "--seeds", "1", "--models", name])[name]
    assert np.isfinite([result["error"] for result in runs.values()]).all()
    assert runs[0.0]["experts"] == tasks.NUM_EXPERTS and 0 < runs[0.0]["distance"] < 1


@pytest.mark.parametrize("relatedness", [1.0, 0.5, 0.0])
def test_the_targets_of_two_tasks_are_as_related_as_was_set(relatedness):
    x, y = tasks.make_data(relatedness, np.random.default_rng(0), 20_000)
    directions = x.T @ (y - y.mean(axis=0))
    cosine = np.prod(directions, axis=1).sum() / np.prod(np.linalg.norm(directions, axis=0))
    assert abs(abs(cosine) - relatedness) < 0.05
