"""What README and guides show, run as it stands there."""

import pathlib
import re

import keras
import numpy as np
import pytest

from keras_moe import layers, ops, routers

# Of KerasTuner.
pytestmark = pytest.mark.filterwarnings("ignore:(currentThread|getName)\\(\\):DeprecationWarning")
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


def test_the_guide_to_routers_makes_layers_and_a_router():
    experts = layers.FeedForwardExperts(8, 16)
    modules = {"keras": keras, "layers": layers, "ops": ops, "routers": routers}
    names = run("docs/routers.md", experts=experts, **modules)
    routing = names["NearestRouter"](8)(keras.random.normal((5, 4)))
    assert routing.indices.shape == (5, 2)


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


@pytest.mark.filterwarnings("ignore")  # of exporters, and of layers that Keras cannot quantize
@pytest.mark.parametrize("document", ["deploy", "fine_tuning"])
def test_the_guides_to_deployment_and_fine_tuning_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(f"docs/{document}.md")
    if document == "fine_tuning":
        trained = sum(np.prod(weight.shape) for weight in names["experts"].trainable_weights)
        assert trained == 3 * 8 * 4 * (64 + 128)
