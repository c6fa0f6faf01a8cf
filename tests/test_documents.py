"""What README and guides show, run as it stands there: the blocks of a page are one program."""

import ast
import functools
import inspect
import os
import pathlib
import re
import runpy

import keras
import numpy as np
import pytest
from backends import BACKEND, ROOT, on_each_backend, run_python
from replicas_models import free_ports

import keras_moe
from keras_moe import layers, losses, routers

# Parts are tested on each backend elsewhere. Pages with code for each backend run there, too.
pytestmark = [
    pytest.mark.backends("torch"),
    # Of KerasTuner.
    pytest.mark.filterwarnings("ignore:(currentThread|getName)\\(\\):DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:No trial so far"),
]
LINKS = runpy.run_path(str(ROOT / "docs" / "reference_links.py"))
IDENTIFIERS = LINKS["identifiers"]()


def blocks(document, section=""):
    """The Python of a document, or of one of its sections."""
    text = (ROOT / document).read_text(encoding="utf-8")
    if section:
        text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(document, changes=(), section="", **names):
    """Run the Python of a document from top to bottom, and return its names."""
    for code in blocks(document, section):
        for old, new in changes:
            assert old in "".join(blocks(document, section)), "nothing to change"
            code = code.replace(old, new)
        exec(compile(code, document, "exec"), names)
    return names


def test_the_tutorial_shows_the_program_to_copy():
    program = ast.unparse(ast.parse((ROOT / "examples/text_classification.py").read_text("utf-8")))
    shown = [ast.unparse(ast.parse(code)) for code in blocks("docs/text_classification.md")]
    assert shown and all(code in program for code in shown)


@on_each_backend
def test_the_readme_trains_a_mixture_that_is_better_than_a_dense_layer(capsys):
    run("README.md")
    dense, mixture, rows = capsys.readouterr().out.strip().split("\n", 2)
    assert 1 < float(mixture.split()[-1]) < 0.8 * float(dense.split()[-1])
    assert min(map(int, re.findall(r"\d+", rows))) > 1000
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split("```python")[0].split()) <= 130
    assert len(text.split("## Two commands")[0].split()) <= 450
    assert len(blocks("README.md")[0].splitlines()) <= 16


def test_names_used_elsewhere_are_refused_with_the_name_used_here():
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    rows = page.partition("| elsewhere | here |")[2].split("\n\n")[0].splitlines()[2:]
    arguments = [row.split(" | ") for row in rows if "(" not in row.split(" | ")[0]]
    assert len(arguments) == 12
    for elsewhere, here in arguments:
        name = re.search(r"`(?:layers\.)?(\w+)", here)
        here = rf"`{name[1]}[`(]|{name[1]}=" if name else here.rstrip(" |")
        for each in re.findall(r"`(\w+)", elsewhere):
            value = "swiglu" if each == "activation" else 1
            with pytest.raises((TypeError, ValueError), match=here):
                layers.MixtureOfExperts(num_experts=8, hidden_dim=64, **{each: value})
    layer = layers.MixtureOfExperts(num_experts=8, hidden_dim=64)
    layer(np.ones((4, 8)))
    with pytest.raises(NotImplementedError, match=r"experts\.enable_lora"):
        layer.enable_lora(4)


def test_the_page_on_routers_has_the_default_losses_of_each():
    page = (ROOT / "docs" / "routers.md").read_text(encoding="utf-8")
    rows = page.partition("| router | default losses |")[2].split("\n\n")[0].splitlines()[2:]
    named = {}
    for row in rows:
        names, said = (set(re.findall(r"`(\w+)`", cell)) for cell in row.split(" | "))
        named |= dict.fromkeys(names, said - {"balancer"})
    abstract = (routers.LogitRouter, routers.Router)
    for name in routers.__all__:
        cls = getattr(routers, name)
        if inspect.isclass(cls) and issubclass(cls, routers.Router) and cls not in abstract:
            default = {type(losses.get(loss)).__name__ for loss in cls.default_losses}
            assert named.pop(name, set()) == default, name
    assert not named
    assert not routers.TopKRouter(4, balancer="loss_free").default_losses


def test_the_example_of_the_home_page_trains():
    names = run("docs/index.md")
    model, monitor = names["model"], names["callbacks"].ExpertMonitor()
    ids = np.random.default_rng(0).integers(1, 20_000, (4, 6))
    history = model.fit(ids, np.arange(4), callbacks=[monitor], verbose=0).history
    assert {"load_imbalance", "dead_experts", "router_loss"} <= history.keys()


def test_files_that_documents_name_exist():
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = document.read_text(encoding="utf-8")
        named = re.findall(r"\b(?:examples|studies|benchmarks|tests|keras_moe)/[\w/]+\.py\b", text)
        missing = [name for name in named if not (ROOT / name).exists()]
        assert not missing, document.name


def test_the_site_has_every_page_and_every_public_part():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    tutorials = re.findall(r'"Tutorial: [\w ]+": (\w+)\.md', site)  # have the programs
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert examples > set(tutorials)
    pages |= {f"examples/{name}.md" for name in examples.difference(tutorials)}
    pages |= {"changelog.md"}  # of CHANGELOG.md
    assert pages == set(re.findall(r"[\w/]+\.md", site[site.index("\nnav:") :]))
    redirects = re.findall(r"^        ([\w/]+\.md): ([\w/]+\.md)", site, flags=re.MULTILINE)
    assert redirects and all(old not in pages and new in pages for old, new in redirects)
    missing = set()
    for name in set(dir(keras_moe)) - {"tuner", "__version__"}:
        part = getattr(keras_moe, name)
        inside = [f"{name}.{each}" for each in getattr(part, "__all__", ()) if each != "MoE"]
        missing |= {f"keras_moe.{each}" for each in (inside if inspect.ismodule(part) else [name])}
    assert not missing - IDENTIFIERS.keys()


def test_names_in_guides_are_in_the_reference():
    parts = "layers|routers|losses|metrics|callbacks|inspection|visualization|tuner|surgery|convert"
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    guides = site[site.index("- How-to:") : site.index("- Explanation:")]
    for path in (ROOT / "docs").glob("*.md"):
        text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        names = re.findall(rf"`(?:keras_moe\.)?((?:{parts})\.(?!py`)\w+)(?:\(.*?\))?`", text)
        missing = set(names) - set(IDENTIFIERS)
        assert not missing, (path.name, missing)
        linked = IDENTIFIERS.keys() & re.findall(r"`([\w.]+)[`(]", text)
        assert linked or path.name not in guides, path.name


@pytest.mark.parametrize(
    "shuffled_by",
    [
        pytest.param("data", marks=on_each_backend),
        pytest.param("fit", marks=pytest.mark.backends("jax", "torch")),
    ],
)
def test_the_page_on_training_repeats_the_order_of_an_epoch(shuffled_by, tmp_path):
    names = run("docs/training.md", section="Resuming")
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")

    def fit(model, epochs, initial_epoch=0):
        if shuffled_by == "data":
            # Without seeds, which would set the order of batches as well.
            data = {"x": names["Shuffled"](x, x[:, :1], 2, initial_epoch), "shuffle": False}
        else:
            callbacks = [names["SeedEachEpoch"]()]
            data = {"x": x, "y": x[:, :1], "batch_size": 2, "callbacks": callbacks}
        model.fit(**data, epochs=epochs, initial_epoch=initial_epoch, verbose=0)
        return model

    keras.utils.set_random_seed(0)
    dropout = keras.layers.Dropout(0.5 if shuffled_by == "fit" else 0.0)
    model = keras.Sequential([keras.Input((4,)), dropout, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.save(tmp_path / "model.keras")
    fit(fit(model, epochs=1), initial_epoch=1, epochs=3)
    whole = fit(keras.saving.load_model(tmp_path / "model.keras"), epochs=3)
    np.testing.assert_array_equal(whole.layers[-1].kernel, model.layers[-1].kernel)


GUIDES = [(page, "") for page in ("fine_tuning", "routers", "start")]
GUIDES += [("existing_models", "Upcycle a dense model"), ("deploy", "Generate text")]
GUIDES += [("tasks", name) for name in ("Tables", "Many tasks", "Densities")]
GUIDES += [("training", "Padding to few lengths")]
GUIDES += [pytest.param("deploy", "Export", marks=on_each_backend)]


@pytest.mark.filterwarnings("ignore")  # of exporters, and of layers that Keras cannot quantize
@pytest.mark.parametrize(("document", "section"), GUIDES)
def test_a_guide_runs(document, section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(f"docs/{document}.md", section=section)  # which asserts what it says


def test_the_guide_to_images_trains():
    names = run("docs/tasks.md", [("epochs=15", "epochs=1")], "Images")
    assert [len(names[name].layers) for name in ("places", "whole")] == [5, 2]


def test_the_search_of_the_guide_to_tuning_finds_a_layer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes = [("max_trials=12", "max_trials=2"), ("epochs=3", "epochs=1"), ("1024", "32")]
    names = run("docs/tuning.md", changes)
    assert len(names["search"].oracle.end_order) == 2
    assert "active_width" in capsys.readouterr().out
    keras.backend.clear_session()


def test_the_guide_to_seeing_experts_trains_and_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("docs/seeing_experts.md")
    pictures = {"shares_over_time.png", "experts_by_label.png", "experts_by_word.png"}
    written = {"report.html"} | pictures
    assert {path.name for path in tmp_path.iterdir()} == written


@pytest.mark.backends("jax")
def test_the_guide_to_many_devices_sets_a_distribution():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    run_python("-c", blocks("docs/training.md", "Several devices")[0], XLA_FLAGS=flags)


@pytest.mark.backends("tensorflow", "torch")
def test_the_guide_to_replicas_trains_on_its_backends():
    first, *others = blocks("docs/training.md", "Several devices")[1:]
    of_backend = others[:1] if BACKEND == "tensorflow" else others[1:]
    assert f"import {BACKEND}" in of_backend[0]
    of_torchrun = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    of_torchrun["MASTER_PORT"] = str(free_ports(1)[0])
    run_python("-c", "".join([first, *of_backend]), **of_torchrun)


def test_the_recipes_for_parts_of_ones_own_train(tmp_path):
    names = run("docs/extending.md")
    assert names["layer"].expert_counts.shape == (8,)
    mixture, bank = keras_moe.layers.MixtureOfExperts, names["MatrixExperts"]
    assert bank.from_config(bank(num_experts=4).get_config()).num_experts == 4
    model = keras.Sequential(
        [
            keras.Input((16,)),
            mixture(bank(4), names["PairedRouter"](top_k=1)),
            mixture(bank(4), router_losses=[names["BusiestLoad"]()]),
            mixture(bank(4), routers.TopKRouter(balancer=names["router"].balancer)),
        ]
    )
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 16)), np.ones((4, 16)), verbose=0)
    model.save(tmp_path / "model.keras")
    keras.saving.load_model(tmp_path / "model.keras")


@pytest.fixture(scope="module")
def custom_loops():
    others = {"tensorflow", "torch", "jax"} - {BACKEND}
    is_foreign = re.compile(rf"import ({'|'.join(others)})\b")
    names = {}
    for code in blocks("docs/training.md", "Custom loops"):
        if not is_foreign.match(code):
            exec(compile(code, "custom_loops", "exec"), names)
    return names


@on_each_backend
def test_custom_loops_train_on_their_backend(custom_loops):
    assert custom_loops["losses"][-1] < 0.5 * custom_loops["losses"][0]
    assert custom_loops["counts"].sum() == 4 * 256 * 2  # epochs, tokens, experts of a token


class WithStepOfTensorFlow(keras.Model):
    """As the guides of Keras write it, and below the same for PyTorch."""

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"train_loss": loss}


class WithStepOfTorch(keras.Model):
    def train_step(self, data):
        import torch

        x, y = data
        self.zero_grad()
        loss = self.compute_loss(x, y, self(x, training=True))
        loss.backward()
        with torch.no_grad():
            weights = self.trainable_variables
            self.optimizer.apply([weight.value.grad for weight in weights], weights)
        return {"train_loss": loss}


@on_each_backend
def test_a_custom_train_step_trains_as_plain_fit(custom_loops):
    initializer = keras.initializers.RandomNormal(stddev=0.1, seed=3)

    def trained(model_class):
        bank = layers.FeedForwardExperts(4, 32, kernel_initializer=initializer)
        router = routers.TopKRouter(kernel_initializer=initializer)
        layer = layers.MixtureOfExperts(bank, router, router_losses=[losses.LoadBalance(100)])
        inputs = keras.Input((16,))
        model = model_class(inputs, layer(inputs))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        x = custom_loops["x"]
        history = model.fit(x, x, batch_size=len(x), epochs=3, verbose=0).history
        # Totals hold their error by rounding, which differs.
        weights = [each for each in model.weights if "value_totals" not in each.path]
        return [*history.values(), *map(keras.ops.convert_to_numpy, weights)]

    classes = {"tensorflow": WithStepOfTensorFlow, "torch": WithStepOfTorch}
    model_class = classes.get(BACKEND) or custom_loops["Model"]
    plain, custom = trained(keras.Model), trained(model_class)
    assert plain[0][0] > 90, "the loss has the router loss in it"
    for expected, value in zip(plain, custom, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


@on_each_backend
def test_router_losses_that_a_stateless_call_drops_are_warned_of(custom_loops):
    model = custom_loops["model"]
    state = [each.value for each in model.non_trainable_variables]
    call = functools.partial(
        model.stateless_call, [each.value for each in model.trainable_variables], state
    )
    with pytest.warns(UserWarning, match="router losses of `moe` are dropped"):
        call(custom_loops["x"], training=True)
    call(custom_loops["x"], training=True, return_losses=True)
    call(custom_loops["x"], training=False)


def test_the_page_on_translation_has_the_code_of_an_example_that_is_run():
    example = (ROOT / "examples" / "sequence_to_sequence.py").read_text(encoding="utf-8")
    (decoder,) = blocks("docs/translation.md")
    assert decoder in example


def test_every_page_with_code_is_run_here():
    pages = [path for path in (ROOT / "docs").glob("*.md") if blocks(path)]
    lines = [line for path in pages for code in blocks(path) for line in code.splitlines()]
    assert not [line for line in lines if len(line) > 76]
    tests = pathlib.Path(__file__).read_text(encoding="utf-8")
    assert not [page.name for page in pages if not re.search(rf"\b{page.stem}\b", tests)]


@pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called:UserWarning")
def test_the_guide_to_other_packages_converts_their_models(tmp_path, monkeypatch):
    import transformers

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
    section = "Convert a mixture of KerasHub or Hugging Face"
    names = run("docs/existing_models.md", section=section, path="other")
    assert names["tokens"].shape == (1, 5) and len(names["layers"]) == 1
    assert names["outputs"].shape == (2, 10, 8)
    assert list(names["arrays"])[:2] == [
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    ]
