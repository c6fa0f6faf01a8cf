"""The benchmark programs, on shapes so small that only counts and outputs mean anything."""

import argparse
import json
import os

import keras
import numpy as np
import pytest
from backends import BACKEND, ROOT, on_one_backend

from benchmarks import (
    batch_sizes,
    contestants,
    counts,
    decode,
    endurance,
    exported,
    first_step,
    generation,
    layer,
    measure,
    memory,
    model,
    peers,
    tasks,
)
from benchmarks.rivals import ANY, RIVALS, Rival

T, D, H, E, K = 64, 8, 16, 4, 2


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path):
    """Results go to a folder of the test, and what has a process of its own stays in this one."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    for program in (endurance, batch_sizes, first_step):
        monkeypatch.setattr(
            program, "in_observed_process", lambda run, *arguments: run(*arguments, tmp_path)
        )
    monkeypatch.setattr(first_step, "in_fresh_process", lambda run, *arguments: run(*arguments))


def options(**changes):
    given = {"features": D, "hidden": H, "top_k": K, "gated": False, "activation": "gelu"}
    return argparse.Namespace(**{**given, **changes})


def run(program, *arguments):
    """The rows of a program, which it has written as well."""
    rows = program.main(["--smoke", *arguments])
    name = f"{program.__name__.rpartition('.')[2]}-{BACKEND}-smoke.json"
    text = (measure.RESULTS / name).read_text()
    assert str(ROOT) not in text and str(measure.RESULTS) not in text
    record = json.loads(text)
    assert record["rows"] == rows and record["backend"] == BACKEND
    assert set(record["machine"]) == {"device", "processor", "cores", "GLIBC_TUNABLES"}
    assert record["versions"]["keras"] == keras.__version__
    return rows


TWIN = "dense twin"
TASKS = ["MMoE by hand", "MMoE of keras_moe", "PLE by hand", "PLE of keras_moe", "dense gates"]
TASKS += ["top-2 gates", "one network", "8 networks, top-1"]
PROGRAMS = [
    (layer, "--skew zipf", [TWIN, "E=4 zipf"] * 2),
    (layer, "--gated --dtype bfloat16 --skew all-to-one", [TWIN, "E=4 all-to-one"] * 2),
    (model, "", [TWIN, "E=4"]),
    (memory, "", ["0 MB"]),
    (first_step, "", [f"{TWIN}, 1 blocks", "E=4, 1 blocks"]),
    (batch_sizes, "--calls train layer", ["train"] * 2 + ["layer"] * 2),
    (tasks, "", TASKS),
    (generation, "--models 4:halves --modes float32", ["dense", "4 halves"]),
    (decode, "--tokens 4", [TWIN, "all experts", "keras_moe", "keras_moe", "int8", "int4"]),
    (peers, "--models", ["KerasHub Mixtral model", "the same, converted"] * 2),
]


@on_one_backend
@pytest.mark.filterwarnings("ignore")  # of Keras, about layers without kernels, `x.T` and shuffling
@pytest.mark.parametrize("program, arguments, names", PROGRAMS)
def test_contestants_are_timed(program, arguments, names):
    rows = run(program, *(each.replace(":", " ") for each in arguments.split()))
    assert [row["name"] for row in rows] == names
    for row in rows:
        if "ms" in row:
            assert row["ms"] > 0
        if "ratio" in row:
            assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert max(row.get("max_difference", 0.0), row.get("difference", 0.0)) <= 1e-5


@pytest.mark.backends("tensorflow", "jax")
def test_layers_are_compared():
    assert len(run(layer)) == 4


@on_one_backend
def test_a_layer_is_measured_with_both_settings_of_the_allocator(monkeypatch):
    settings = []

    def run_here(function, options):
        settings.append(os.environ.get("MALLOC_MMAP_MAX_"))
        return function(options)

    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    monkeypatch.setattr(layer, "in_fresh_process", run_here)
    rows = run(layer, "--kept")
    assert settings == [None, "0"] and "MALLOC_MMAP_MAX_" not in os.environ
    assert [row.get("memory") for row in rows] == [None] * 4 + ["kept"] * 4


@pytest.mark.filterwarnings("ignore")  # what exporters warn of is not about this package
def test_exported_programs_with_more_experts_are_timed_against_those_with_few():
    (program, *_) = exported.PROGRAMS
    rows = run(exported, "--programs", program)
    assert [(row["program"], row["name"]) for row in rows] == [(program, "E=2"), (program, "E=4")]
    assert rows[0]["ratio"] == 1.0


@pytest.mark.parametrize("gated", [False, True])
def test_a_dense_twin_is_one_wide_expert(gated):
    twin = contestants.DenseTwin(options(gated=gated))
    mixture = contestants.mixture(1, options(gated=gated, hidden=K * H, top_k=1))
    kernels = {"up": twin.up, "down": twin.down, **({"gate": twin.gate} if gated else {})}
    for name, dense in kernels.items():
        getattr(mixture.experts, f"{name}_kernel").assign(dense.kernel.value[None])
    (twin.gate or twin.up).activation = mixture.experts.activation
    inputs = contestants.tokens(T, options())
    np.testing.assert_allclose(peers.infer(twin, inputs), peers.infer(mixture, inputs), atol=1e-5)


def wrong(mixture):
    return Rival(None, lambda block, x, training: 2 * x)


def missing(mixture):
    import a_package_nobody_has  # noqa: F401


@on_one_backend
def test_peers_agree_or_say_why_they_are_not_timed(monkeypatch):
    rivals = {**RIVALS, "wrong": (ANY, wrong), "missing": (ANY, missing)}
    monkeypatch.setattr(peers, "RIVALS", rivals)
    rows = run(peers)
    reasons = {row["name"]: row.get("not timed") for row in rows}
    assert set(reasons) == {"keras_moe", *rivals}
    assert reasons["missing"] == "ModuleNotFoundError: No module named 'a_package_nobody_has'"
    assert reasons["wrong"].startswith("ValueError: its outputs differ from ours by ")
    assert reasons["jax.lax.ragged_dot"] == "NotImplementedError: runs on jax, not on torch"
    others = [row for row in rows if "not timed" not in row]
    assert all(row["max_difference"] <= 1e-5 for row in others[1:])
    # Packages of the extra `bench` may be missing, and nothing else.
    for name in set(RIVALS) - {row["name"] for row in others} - {"jax.lax.ragged_dot"}:
        assert reasons[name].startswith("ModuleNotFoundError: No module named")


@on_one_backend
def test_counts_of_a_step(monkeypatch, tmp_path):
    monkeypatch.setattr(counts, "in_observed_process", lambda run, *rest: run(*rest, tmp_path))
    twin, mixture = run(counts)
    twin_weights = 2 * D * K * H + K * H + D
    assert twin["gradients_mb"] == pytest.approx(4 * (twin_weights + 32 * D) / 1e6)
    assert mixture["matmul_ratio"] > 1


@pytest.mark.backends("jax", "torch")
def test_executed_flops_count_every_product_once():
    inputs = contestants.tokens(T, options())
    flops = counts.executed_flops(contestants.DenseTwin(options()), inputs)
    products = 6 * (2 * T * D * K * H)  # two forward, four backward
    assert flops == products
    # Without experts to choose from, all rows are in one group that blocks cover exactly.
    mixture = contestants.mixture(1, options(top_k=1, hidden=K * H))
    router = 3 * (2 * T * D)
    # What the last bias gives to the weights' gradient; PyTorch differentiates small layers.
    weights = 0 if BACKEND == "torch" else 2 * T * D
    assert counts.executed_flops(mixture, inputs) == products + router + weights


@on_one_backend
def test_endurance_watches_numbers_experts_and_memory():
    mixture, twin = run(endurance)
    assert (mixture["name"], twin["name"]) == ("mixture", "dense twin")
    assert mixture["policy"] == "mixed_float16"
    assert mixture["steps"] == 16 and mixture["dead_experts"] in range(2 * E)
    assert 0 <= mixture["least_share"] <= 1
    for row in (mixture, twin):
        assert row["not_finite"] == 0 and np.isfinite(row["loss_last"]) and row["last_mb"] > 0
    numbers = [keras.Variable([1.0, np.nan, np.inf]), keras.Variable([1, 2], trainable=False)]
    assert endurance.not_finite(numbers) == 2


def test_the_table_shows_every_key_and_what_is_missing(capsys):
    rows = [{"name": "a", "n": 1000}, {"name": "b", "x": 0.5}]
    measure.publish("made-up", "title", argparse.Namespace(tag=""), rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [[], ["title"]]
    assert lines[2:5] == [["name", "n", "x"], ["a", "1,000", "-"], ["b", "-", "0.500"]]


def test_contestants_take_turns_and_ratios_are_those_of_each_round():
    turns = []
    times, first = measure.interleave({n: lambda n=n: turns.append(n) for n in "ab"}, rounds=2)
    assert turns == list("ababab")
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert set(first) == {"a", "b"}
    times = {"twin": np.array([1.0, 2.0, 4.0]), "moe": np.array([2.0, 3.0, 4.0])}
    twin, moe = measure.summarise(times, {"twin": 0.0, "moe": 0.0}, "twin")
    assert twin["ratio"] == 1.0
    assert (moe["ms"], moe["ratio_low"], moe["ratio"], moe["ratio_high"]) == (3.0, 1.25, 1.5, 1.75)
