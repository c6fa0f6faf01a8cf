"""What README and guides show, run as it stands there."""

import pathlib
import re

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import layers, routers

# Of KerasTuner.
pytestmark = pytest.mark.filterwarnings("ignore:(currentThread|getName)\\(\\):DeprecationWarning")
# Public as functions; the reference shows them with their module.
FUNCTIONS = {"report": "reporting", "summary": "inspection", "upcycle": "upcycling"}
ROOT = pathlib.Path(__file__).parents[1]


def run(document, changes=(), **names):
    """Run the Python of a document from top to bottom, and return its names."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for old, new in changes:
            code = code.replace(old, new)
        exec(compile(code, document, "exec"), names)
    return names


def test_the_example_of_the_readme_trains():
    names = run("README.md")
    model, monitor = names["model"], names["callbacks"].ExpertMonitor()
    ids = np.random.default_rng(0).integers(1, 20_000, (4, 6))
    history = model.fit(ids, np.arange(4), callbacks=[monitor], verbose=0).history
    assert "mixture_of_experts_load_imbalance" in {re.sub(r"_\d+_", "_", key) for key in history}


def test_files_that_documents_name_exist():
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = document.read_text(encoding="utf-8")
        named = re.findall(r"\b(?:examples|studies|benchmarks|tests|keras_moe)/[\w/]+\.py\b", text)
        missing = [name for name in named if not (ROOT / name).exists()]
        assert not missing, document.name


def test_the_start_page_trains_saves_and_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("docs/index.md")
    assert names["layer"].router.num_experts == 8
    assert (tmp_path / "model.keras").exists()


def test_the_site_has_every_page_and_every_public_part():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"[\w/]+\.md", site))
    reference = "".join(path.read_text("utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    for name in dir(keras_moe):
        if not name.startswith("__"):
            assert f"::: keras_moe.{FUNCTIONS.get(name, name)}" in reference, name


def test_the_guide_to_routers_makes_layers_and_a_router():
    experts = layers.FeedForwardExperts(8, 16)
    modules = {"keras": keras, "keras_moe": keras_moe, "layers": layers, "routers": routers}
    names = run("docs/routers.md", experts=experts, **modules)
    routing = names["NearestRouter"](8)(keras.random.normal((5, 4)))
    assert routing.indices.shape == (5, 2)


def test_the_page_on_reliability_pads_to_few_lengths():
    pad = run("docs/reliability.md")["pad_to_bucket"]
    lengths = {pad(np.ones((2, length), "int32")).shape for length in range(1, 65)}
    assert lengths == {(2, 8), (2, 16), (2, 32), (2, 64)}
    np.testing.assert_array_equal(pad(np.ones((1, 6))), [[1, 1, 1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("document", ["capacity", "metrics", "surgery", "upcycling"])
def test_guides_that_need_nothing_run(document, capsys):
    names = run(f"docs/{document}.md")
    assert names["model"].count_params() > 0
    assert capsys.readouterr().out.count("[") >= 1


def test_the_search_of_the_guide_to_tuning_finds_a_layer(tmp_path, monkeypatch, capsys):
    pytest.importorskip("keras_tuner")
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(32, 64)).astype("float32")
    y = x[:, :1]
    changes = [("max_trials=12", "max_trials=2"), ("epochs=3", "epochs=1")]
    names = run("docs/tuning.md", changes, x=x, y=y, x_val=x, y_val=y)
    assert len(names["search"].oracle.end_order) == 2
    assert "active_width" in capsys.readouterr().out
    keras.backend.clear_session()


def test_the_recipes_for_parts_of_ones_own_run_and_are_short():
    names = run("docs/extending.md")
    assert names["layer"].expert_counts.shape == (8,)
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    recipes = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert max(len(recipe.splitlines()) for recipe in recipes) <= 25


@pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called:UserWarning")
def test_the_guide_to_other_packages_converts_their_models(tmp_path, monkeypatch):
    pytest.importorskip("keras_hub")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    transformers.MixtralForCausalLM(config).save_pretrained("other")
    names = run("docs/convert.md", path="other")
    assert names["tokens"].shape == (1, 5) and len(names["layers"]) == 1
    assert names["outputs"].shape == (2, 10, 8)
    assert list(names["arrays"])[:2] == [
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    ]


@pytest.mark.filterwarnings("ignore")  # of exporters, and of layers that Keras cannot quantize
@pytest.mark.parametrize("document", ["deploy", "fine_tuning"])
def test_the_guides_to_deployment_and_fine_tuning_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(f"docs/{document}.md")
    if document == "fine_tuning":
        trained = sum(np.prod(weight.shape) for weight in names["experts"].trainable_weights)
        assert trained == 3 * 8 * 4 * (64 + 128)
