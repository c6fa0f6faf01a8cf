"""Dense and sparse language models at equal cost, on made-up text that needs no network."""

import gzip
import pathlib
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sentencepiece")

pytestmark = pytest.mark.backends("torch")

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "studies"))

import comparison_table  # noqa: E402
import datasets  # noqa: E402
import sparsity  # noqa: E402
import twins  # noqa: E402
from datasets import manual_pages  # noqa: E402
from made_up_text import made_up_text  # noqa: E402

from keras_moe.layers import MixtureOfExperts  # noqa: E402

MODELS = (sparsity.DENSE, "8 experts")
WIDE = "dense, 8 times as wide"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Arguments of the study with two models and one learning rate."""
    data = made_up_text((96, 48, 32), num_words=40)
    monkeypatch.setattr(datasets, "load", lambda name, data_dir=None: data)
    monkeypatch.setattr(sparsity, "SMOKE", sparsity.SMOKE._replace(subwords=40))
    monkeypatch.setattr(sparsity, "BATCH_SIZE", 8)
    monkeypatch.setattr(sparsity, "MODELS", {name: sparsity.MODELS[name] for name in MODELS})
    monkeypatch.setattr(sparsity, "LEARNING_RATES", sparsity.LEARNING_RATES[:1])
    return ["--smoke", "--output", str(tmp_path / "out"), "--seeds"]


def test_a_second_command_adds_seeds_and_trains_nothing_twice(small, tmp_path, monkeypatch, capsys):
    first = sparsity.main([*small, "0"])
    assert set(first) == set(MODELS)
    for runs in first.values():
        assert np.isfinite(runs[0]["losses"]).all()
        assert runs[0]["losses"][-1] < runs[0]["losses"][0]
    dense, sparse = (first[name][0] for name in MODELS)
    assert sparse["parameters"] > 1.2 * dense["parameters"]
    # Beyond the twin a token pays for the router, and for the biases of two experts.
    router = 2 * 8 * sparsity.SMOKE.features
    assert 0 < sparse["active_parameters"] - dense["active_parameters"] < 2 * router
    assert (tmp_path / "out" / "sparsity.png").exists()

    trained = []
    fit = sparsity.resuming.fit
    monkeypatch.setattr(
        sparsity.resuming, "fit", lambda *args, **kwargs: trained.append(1) or fit(*args, **kwargs)
    )
    second = sparsity.main([*small, "0", "1"])
    assert len(trained) == len(MODELS), "one run each of the new seed, and no trial"
    assert {name: runs[0] for name, runs in second.items()} == {
        name: runs[0] for name, runs in first.items()
    }
    assert capsys.readouterr().out.count("equal time") == 2 * 2 * len(MODELS) - 2


@pytest.mark.parametrize(
    "name, millions",
    [("dense", 25.7), ("8 experts", 25.8), ("64 narrow experts", 26.0), (WIDE, 143.3)],
)
def test_models_for_a_gpu_have_the_active_weights_that_docs_say(name, millions):
    study = sparsity.Study(sparsity.GPU, sparsity.GPU.subwords, *[None] * 4)
    model = study.make(name)
    looked_up = model.get_layer("embedding").count_params()
    active = twins.count_parameters(model)["active_parameters"] - looked_up
    assert round(active / 1e6, 1) == millions


def test_models_for_a_gpu_compute_in_bfloat16_at_lower_rates(small, monkeypatch):
    tiny = sparsity.SMOKE._replace(features=128, hidden_dim=8, blocks=1)
    monkeypatch.setitem(sparsity.SIZES, "gpu", tiny)
    computes_in, make = set(), sparsity.Study.make

    def spied(study, name, *args):
        model = make(study, name, *args)
        computes_in.update(
            layer.compute_dtype
            for layer in model._flatten_layers()
            if isinstance(layer, MixtureOfExperts)
        )
        return model

    monkeypatch.setattr(sparsity.Study, "make", spied)
    results = sparsity.main([*small[1:], "0", "--size", "gpu"])
    for runs in results.values():
        assert np.isfinite(runs[0]["losses"]).all()
        assert runs[0]["learning_rate"] == sparsity.LEARNING_RATES[0] / 2
    assert computes_in == {"bfloat16"}


def test_a_smoke_test_has_one_size(small, capsys):
    with pytest.raises(SystemExit):
        sparsity.main([*small, "0", "--size", "gpu"])
    assert "Received: --smoke --size gpu. Leave out --size" in capsys.readouterr().err


def test_an_interval_covers_the_mean_of_two_seeds():
    # Student's t of 95% at one degree of freedom is 12.706.
    assert comparison_table.interval([1.0, 3.0]) == "+2.0000 +- 12.7062"
    assert comparison_table.interval([1.0]) == "+1.0000"


@pytest.mark.parametrize(
    "source, text",
    [
        (".TH LS 1\n.SH NAME\nls \\- list", "NAME ls - list"),
        (".BR printf (3),\n.I format", "printf(3), format"),
        ('.BI "int " fd ;\n\\fBa\\fP \\(bu \\&b\\e', "int fd; a • b\\"),
        (".TS\nl l.\na\tb\n.TE\nrest", "rest"),
        (".de Sp\n.if t .sp\n..\nrest", "rest"),
        ('.\\" a comment\n\'\\" t\n.\n.PP\ntext', "text"),
    ],
)
def test_the_text_of_a_manual_page_has_no_roff(source, text):
    assert manual_pages.plain_text(source) == text


def test_manual_pages_are_labelled_and_a_page_is_in_one_split(monkeypatch, tmp_path):
    page = gzip.compress(b".TH A 1\n.SH NAME\n" + b"some words of it " * 40)
    members = {
        f"./usr/share/man/{folder}man1/{name}.1.gz": page
        for folder in ("", "de/", "pt_BR/")
        for name in map(str, range(40))
    }
    members["./usr/share/doc/manpages/changelog.gz"] = page
    members["./usr/share/man/de/man1/short.1.gz"] = gzip.compress(b".so man1/other.1")
    monkeypatch.setattr(manual_pages, "fetch_packages", lambda names, folder: ["all"])
    monkeypatch.setattr(manual_pages, "read_members", lambda package, suffix: members)
    builder = manual_pages.ManualPages(data_dir=str(tmp_path))
    manager = type("Manager", (), {"download_dir": tmp_path})()
    splits = builder._split_generators(manager)
    pages = [{key.split("/")[1] for key, _ in examples} for examples in splits.values()]
    assert sum(map(len, pages)) == 40, "no page is in two splits"
    examples = [
        example for part in builder._split_generators(manager).values() for _, example in part
    ]
    assert {example["label"] for example in examples} == {"en", "de", "pt"}
    assert len(examples) == 120
