"""The benchmark programs, on shapes so small that only counts and outputs mean anything."""

import argparse
import json
import pathlib
import sys

import keras
import numpy as np
import pytest
from backends import unless_compiled

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    batch_sizes,
    contestants,
    counts,
    decode,
    endurance,
    exported,
    figure,
    layer,
    measure,
    memory,
    model,
    monitoring,
    peers,
    routers,
    tagger,
)
from benchmarks.executed import executed_flops  # noqa: E402
from benchmarks.rivals import RIVALS, KerasHubMixtral, RaggedDot  # noqa: E402
from keras_moe.routers import BY_NAME  # noqa: E402

BACKEND = keras.backend.backend()
T, D, H, E, K = 64, 8, 16, 4, 2
OPTIONS = {"features": D, "hidden": H, "top_k": K, "gated": False, "activation": "gelu"}


# `test_layer_compares_skews_and_number_of_tokens` times a compiled step on every backend. These
# programs time others in the same way, and would take half a minute each.
where_nothing_is_compiled = pytest.mark.backends("torch")


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")


def options(**changes):
    return argparse.Namespace(**{**OPTIONS, **changes})


def written(name):
    text = (measure.RESULTS / f"{name}-{BACKEND}-smoke.json").read_text()
    assert str(ROOT) not in text and str(measure.RESULTS) not in text
    record = json.loads(text)
    assert record["backend"] == BACKEND
    assert set(record["machine"]) == {"device", "processor", "cores", "GLIBC_TUNABLES"}
    assert record["versions"]["keras"] == keras.__version__
    return record


def assert_timed(rows):
    for row in rows:
        assert row["ms"] > 0
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_layer_compares_skews_and_number_of_tokens(capsys):
    # Each number of tokens is another program.
    numbers = unless_compiled([16, 32], [32])
    rows = layer.main(["--smoke", "--tokens", *map(str, numbers), "--skew", "balanced", "zipf"])
    assert written("layer")["rows"] == rows
    assert_timed(rows)
    contests = {(row["pass"], row["tokens"], row["name"]) for row in rows}
    assert contests == {
        (direction, tokens, name)
        for direction in ("forward", "forward+backward")
        for tokens in numbers
        for name in ("dense twin", "E=4 balanced", "E=4 zipf")
    }
    assert {row["ratio"] for row in rows if row["name"] == "dense twin"} == {1.0}
    printed = capsys.readouterr().out
    assert "T=32, forward+backward" in printed and "E=4 zipf" in printed


def test_of_several_processes_the_middle_ratio_is_shown_between_the_extremes():
    runs = [
        [{"name": "E=4", "ms": ms, "ratio": ratio}] for ms, ratio in ((5, 1.5), (9, 1.1), (7, 1.2))
    ]
    expected = {"name": "E=4", "ms": 7, "ratio": 1.2, "ratio_low": 1.1, "ratio_high": 1.5}
    assert layer.middle(runs) == [expected]


def test_layer_takes_gated_experts_in_low_precision():
    rows = layer.main(["--smoke", "--gated", "--dtype", "bfloat16"])
    assert_timed(rows)
    assert written("layer")["options"]["activation"] == "silu"
    assert keras.config.dtype_policy().name == "mixed_bfloat16"


@where_nothing_is_compiled
def test_model_trains_whole_transformers():
    rows = model.main(["--smoke"])
    assert written("model")["rows"] == rows
    assert [row["name"] for row in rows] == ["dense twin", "E=4"]
    assert_timed(rows)


@pytest.mark.filterwarnings("ignore")  # what exporters warn of is not about this package
def test_exported_programs_with_more_experts_are_timed_against_those_with_few():
    (program, *_) = exported.PROGRAMS
    rows = exported.main(["--smoke", "--programs", program])
    assert written("exported")["rows"] == rows
    assert [(row["program"], row["name"]) for row in rows] == [(program, "E=2"), (program, "E=4")]
    assert rows[0]["ratio"] == 1.0


def test_the_models_differ_by_router_and_idle_experts_only():
    sizes = [
        sum(np.prod(weight.shape) for weight in built.trainable_weights)
        for built in (
            model.transformer(lambda: contestants.dense_twin(options()), 8, options()),
            model.transformer(lambda: contestants.mixture(K, options()), 8, options()),
        )
    ]
    router, second_bias = D * K, D
    assert sizes[1] - sizes[0] == model.BLOCKS * (router + second_bias)


@where_nothing_is_compiled
def test_monitoring_is_timed_against_layers_that_count_nothing():
    rows = monitoring.main(["--smoke"])
    assert_timed(rows)
    names = [monitoring.BLIND, "counters", "ExpertMonitor", "with ExpertHealth"]
    assert [row["name"] for row in rows] == names
    assert written("monitoring")["rows"] == rows


@where_nothing_is_compiled
def test_routers_are_timed_alone_and_as_a_share_of_the_step():
    rows = routers.main(["--smoke", "--routers", *BY_NAME])
    assert written("routers")["rows"] == rows
    top_k = {row["name"]: row["top_k"] for row in rows}
    assert list(top_k) == list(BY_NAME)
    # Some names stand for a K, and experts that choose have none.
    assert {top_k[name] for name in ("top_k", "cosine", "deepseek_v3", "sinkhorn")} == {K}
    assert (top_k["switch"], top_k["gshard"], top_k["expert_choice"]) == (1, 2, E)
    for row in rows:
        assert 0 < row["routing_ms"] and 0 < row["step_ms"]
        assert 0 < row["share_low_%"] <= row["share_%"] <= row["share_high_%"]


def test_memory_is_written():
    (row,) = memory.main(["--smoke"])
    assert written("memory")["rows"] == [row]
    assert row["ms"] > 0 and row["page_faults"] >= 0 and row["system_ms"] >= 0


def test_decode_takes_few_tokens():
    rows = decode.main(["--smoke"])
    assert written("decode")["rows"] == rows
    assert {row["tokens"] for row in rows} == {1, 4}
    names = {"dense twin", "keras_moe", "int8", "int4", "all experts"}
    assert {row["name"] for row in rows} == names
    assert_timed(rows)


@pytest.mark.parametrize("gated", [False, True])
def test_all_experts_compute_what_the_chosen_ones_do(gated):
    mixture = contestants.mixture(E, options(gated=gated))
    for bias in [weight for weight in mixture.experts.weights if "bias" in weight.name]:
        bias.assign(keras.random.normal(bias.shape, seed=1))
    inputs = contestants.tokens(T, options())
    outputs = peers.infer(contestants.AllExperts(mixture), inputs)
    np.testing.assert_allclose(outputs, peers.infer(mixture, inputs), atol=1e-5)


def test_a_dense_twin_is_one_wide_expert():
    twin = contestants.dense_twin(options(gated=True))
    mixture = contestants.mixture(1, options(gated=True, hidden=K * H, top_k=1))
    for name, dense in {"gate": twin.gate, "up": twin.up, "down": twin.down}.items():
        getattr(mixture.experts, f"{name}_kernel").assign(dense.kernel.value[None])
    twin.gate.activation = mixture.experts.activation
    inputs = contestants.tokens(T, options())
    np.testing.assert_allclose(peers.infer(twin, inputs), peers.infer(mixture, inputs), atol=1e-5)


@pytest.mark.parametrize(
    "skew, least, most", [("balanced", 0.08, 0.2), ("zipf", 0.2, 0.45), ("all-to-one", 0.5, 0.5)]
)
def test_loads_lean_as_their_name_says(skew, least, most):
    mixture = contestants.mixture(8, options(), skew)
    routing = mixture.router(keras.ops.convert_to_tensor(contestants.tokens(1024, options())))
    load = keras.ops.convert_to_numpy(routing.counts)
    assert load.sum() == 1024 * K
    assert least <= load.max() / load.sum() <= most


def test_peers_agree_or_say_why_they_are_not_timed():
    rows = peers.main(["--smoke"])
    assert written("peers")["rows"] == rows
    by_name = {row["name"]: row for row in rows}
    assert set(by_name) == {"keras_moe", *RIVALS}
    for name, rival in RIVALS.items():
        if BACKEND not in rival.backends:
            reason = f"NotImplementedError: runs on {', '.join(rival.backends)}, not on {BACKEND}"
            assert by_name[name]["not timed"] == reason
        elif "not timed" in by_name[name]:
            # Packages of the extra `bench` may be missing, and nothing else.
            assert by_name[name]["not timed"].startswith("ModuleNotFoundError: No module named")
        else:
            assert_timed([by_name[name]])
            assert by_name[name]["max_difference"] <= 1e-5


@where_nothing_is_compiled
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")
def test_a_model_of_keras_hub_is_timed_before_and_after():
    pytest.importorskip("keras_hub")
    rows = peers.main(["--smoke", "--models"])
    assert written("peers")["rows"] == rows and len(rows) == 4
    assert_timed(rows)
    assert all(row["max_difference"] <= 1e-5 for row in rows)


def test_ragged_dot_needs_no_package():
    if BACKEND != "jax":
        pytest.skip("ragged_dot is JAX's own")
    mixture = contestants.mixture(E, options(gated=True, activation="silu"))
    _, difference = peers.admit(RaggedDot, mixture, contestants.tokens(T, options()))
    assert difference <= 1e-5


class Wrong(KerasHubMixtral):
    def adopt(self, mixture):
        self.factor = mixture.router.top_k

    def call(self, x, training=None):
        return self.factor * x


class Missing(Wrong):
    def adopt(self, mixture):
        import a_package_nobody_has  # noqa: F401


def test_a_peer_that_differs_or_is_missing_is_named_with_its_reason(monkeypatch):
    monkeypatch.setattr(peers, "RIVALS", {"wrong": Wrong, "missing": Missing})
    rows = peers.main(["--smoke"])
    reasons = {row["name"]: row["not timed"] for row in rows[1:]}
    assert reasons["missing"] == "ModuleNotFoundError: No module named 'a_package_nobody_has'"
    assert reasons["wrong"].startswith("ValueError: its outputs differ from ours by ")


def test_counts_of_a_step(monkeypatch, tmp_path):
    if BACKEND == "torch":  # where no compilation is counted
        monkeypatch.setattr(counts, "in_observed_process", lambda run, *rest: run(*rest, tmp_path))
    twin, mixture = counts.main(["--smoke"])
    assert written("counts")["rows"] == [twin, mixture]
    assert twin["name"] == "dense twin" and mixture["name"] == "E=4"
    twin_weights = 2 * D * K * H + K * H + D
    assert twin["gradients_mb"] == pytest.approx(4 * (twin_weights + 32 * D) / 1e6)
    if BACKEND == "torch":
        assert "compilations" not in mixture
    else:
        assert mixture["compilations"] == twin["compilations"] == 1
        assert 0 < mixture["busiest_low"] < mixture["busiest_high"] <= 1
    if BACKEND == "jax":
        assert 0 < twin["xla_gflops"] and 0 < twin["xla_gb"] and 0 < twin["xla_temp_mb"]
    if BACKEND == "tensorflow":
        assert mixture["matmul_gflops"] is None
    else:
        assert mixture["matmul_ratio"] > 1


@pytest.mark.skipif(BACKEND != "torch", reason="Transformers runs on torch")
def test_a_peer_that_needs_too_much_memory_is_not_run():
    pytest.importorskip("transformers")
    mixture = contestants.mixture(E, options(gated=True, activation="silu"))
    rival = RIVALS["Transformers Qwen3-MoE, batched_mm"]
    with pytest.raises(MemoryError, match="^would copy 3 GB of kernels$"):
        peers.admit(rival, mixture, np.zeros((10**6, D), "float32"))


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow offers no count")
def test_executed_flops_count_every_product_once():
    inputs = contestants.tokens(T, options())
    flops = executed_flops(contestants.dense_twin(options()), inputs)
    products = 6 * (2 * T * D * K * H)  # two forward, four backward
    assert flops == products
    # Without experts to choose from, all rows are in one group that blocks cover exactly.
    mixture = contestants.mixture(1, options(top_k=1, hidden=K * H))
    router = 3 * (2 * T * D)
    assert executed_flops(mixture, inputs) == products + router


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    for program in (endurance, batch_sizes):
        monkeypatch.setattr(
            program, "in_observed_process", lambda run, *arguments: run(*arguments, tmp_path)
        )


@where_nothing_is_compiled
def test_endurance_watches_numbers_experts_and_memory(in_this_process):
    rows = endurance.main(["--smoke"])
    assert written("endurance")["rows"] == rows
    mixture, twin = rows
    assert (mixture["name"], twin["name"]) == ("mixture", "dense twin")
    assert mixture["policy"] == "mixed_float16" and mixture["loss_scale"] > 0
    assert mixture["steps"] == 16 and mixture["dead_experts"] in range(2 * E)
    assert 0 <= mixture["least_share"] <= 1
    for row in rows:
        assert row["not_finite"] == 0 and np.isfinite(row["loss_last"])
        assert row["ms"] > 0 and row["last_mb"] > 0


def test_endurance_counts_what_is_not_finite():
    numbers = [keras.Variable([1.0, np.nan, np.inf]), keras.Variable([1, 2], trainable=False)]
    assert endurance.not_finite(numbers) == 2


def test_the_embedding_of_the_tagger_is_that_of_keras():
    ids = np.array([[1, 3, 3, 0]], "int32")
    ours, theirs = (cls(5, 2, mask_zero=True) for cls in (tagger.Embedding, keras.layers.Embedding))
    outputs = ours(ids)
    theirs.build(None)
    theirs.embeddings.assign(ours.embeddings)
    contestant, keras_own = map(keras.ops.convert_to_numpy, (outputs, theirs(ids)))
    np.testing.assert_array_equal(contestant, keras_own)


def test_batches_of_all_sizes_are_counted_with_and_without_buckets(in_this_process):
    calls = batch_sizes.CALLS if BACKEND == "torch" else ["predict"]
    rows = batch_sizes.main(["--smoke", "--calls", *calls])
    assert written("batch_sizes")["rows"] == rows
    assert [(row["name"], row["lengths"]) for row in rows] == [
        (call, lengths) for call in calls for lengths in ("all", "buckets")
    ]
    assert all(row["ms"] > 0 for row in rows)
    if BACKEND == "jax":
        assert [row["traces"] for row in rows] == [4, 2]
    if BACKEND == "tensorflow":  # It traces the second size for any number of tokens.
        assert [row["traces"] for row in rows] == [2, 2]


def test_peak_memory_sees_what_a_step_holds():
    megabytes = 64
    rise = counts.peak_mb(lambda: np.ones(megabytes * 10**6, "uint8"))
    if rise is None:
        pytest.skip("the system tells no peak")
    assert 0.9 * megabytes < rise < 1.5 * megabytes


def test_the_table_shows_every_key_and_what_is_missing(capsys):
    measure.print_table([{"name": "a", "n": 1000}, {"name": "b", "x": 0.5}], "title")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [[], ["title"], ["name", "n", "x"], ["a", "1,000", "-"], ["b", "-", "0.500"]]


def test_contestants_take_turns():
    turns = []
    times, first = measure.interleave({n: lambda n=n: turns.append(n) for n in "ab"}, rounds=2)
    assert turns == list("ababab")
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert set(first) == {"a", "b"}


def test_ratios_are_those_of_each_round():
    times = {"twin": np.array([1.0, 2.0, 4.0]), "moe": np.array([2.0, 3.0, 4.0])}
    twin, moe = measure.summarise(times, {"twin": 0.0, "moe": 0.0}, "twin")
    assert twin["ratio"] == 1.0
    assert (moe["ms"], moe["ratio_low"], moe["ratio"], moe["ratio_high"]) == (3.0, 1.25, 1.5, 1.75)


def test_figures_are_drawn_from_what_programs_write(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figure, "DOCS", tmp_path)
    measure.RESULTS.mkdir()
    twin = {"name": "dense twin", "ms": 8.0, "tokens": 8, "pass": "forward+backward"}
    twin |= {"ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.2}
    moe = {**twin, "name": "E=4 balanced", "ratio": 1.1, "experts": 4, "skew": "balanced"}
    rows = [twin, moe, {**moe, "skew": "zipf", "ratio": 9.0}, {**moe, "pass": "forward"}]
    for name in ("layer-jax", "layer-jax-tokens"):
        (measure.RESULTS / f"{name}.json").write_text(json.dumps({"rows": rows}))
    chips = {"chips": 4, "bound_ratio": 1.25, "product_ms": 2.0, "network_ms": 2.5}
    (measure.RESULTS / "topologies.json").write_text(json.dumps({"rows": [chips]}))
    figure.main()
    for name in ("speed.png", "scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "left out: benchmarks/results/layer-torch.json is missing" in capsys.readouterr().out
    assert figure.ratio_by_experts(figure.balanced("layer-jax")) == {4: 1.1}
    assert figure.time_by_tokens(figure.balanced("layer-jax-tokens")) == {8: 1000.0}
