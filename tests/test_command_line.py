"""The command line: its output, and one line with exit code 2 for whatever is wrong."""

import importlib
import os
import pathlib
import sys
import zipfile

import keras
import numpy as np
import pytest
from backends import on_each_backend, on_one_backend
from layer_checks import D, E, moe, normal

from keras_moe.__main__ import main

pytestmark = on_one_backend


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.keras"
    inputs = keras.Input((5, D), name="x")
    keras.Model(inputs, keras.layers.Dense(2)(moe(name="moe")(inputs))).save(path)
    return path


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A model and good files, in the working directory."""
    (tmp_path / "model.keras").write_bytes(saved.read_bytes())
    np.save(tmp_path / "x.npy", normal(3, 5, D))
    (tmp_path / "labels.txt").write_text("sport\nspace\nsport\n")
    (tmp_path / "texts.txt").write_text("a b c d e\nf g h i j\nk l m n o\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@on_each_backend
def test_inspect_prints_layers_sizes_and_costs(folder, capsys):
    main(["inspect", "model.keras"])
    printed = capsys.readouterr().out.splitlines()
    router, expert, head = D * E, 2 * D * 16 + 16 + D, 2 * D + 2
    layer, active = router + E * expert, router + 2 * expert
    model = keras.saving.load_model("model.keras")
    counters = model.count_params() - layer - head
    assert printed[0].endswith(
        f": {layer + head + counters:,} parameters, {active + head:,} of them active for a token"
    )
    assert printed[3].split() == [
        *("moe", "2", "of", str(E), f"{layer:,}", f"{active:,}", f"{2 * active:,}", "-", "-"),
        "float32",
    ]
    assert printed[-1].startswith("No counts are here: experts are counted in training")
    model.get_layer("moe").expert_counts.assign([6, 2, 0, 0])
    model.save("model.keras")
    main(["inspect", "model.keras"])
    assert capsys.readouterr().out.splitlines()[-1].split()[-5:-1] == ["3.00", "x", "fair", "2"]


def test_report_writes_a_page(folder, capsys):
    np.savez("x.npz", x=normal(3, 5, D))
    model = keras.saving.load_model("model.keras")
    keras.Model({"x": model.input}, model.output).save("by_name.keras")
    for data in ("model.keras --data x.npy", "by_name.keras --data x.npz"):
        page = f"{data.split()[0]}.html"
        main(f"report {data} --labels labels.txt --tokens texts.txt --output {page}".split())
        assert capsys.readouterr().out == f"The report is in {page}.\n"
        html = pathlib.Path(page).read_text()
        assert '"texts":["a","b","c","d","e","f"' in html
        assert '"labels":["sport","space","sport"]' in html


def test_custom_parts_are_imported_first(folder, monkeypatch, capsys):
    source = "import keras\n@keras.saving.register_keras_serializable('own')\ndef same(x): return x"
    (folder / "own_parts.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    same = importlib.import_module("own_parts").same
    keras.Sequential([keras.Input((D,)), keras.layers.Activation(same), moe()]).save("model.keras")
    monkeypatch.delitem(sys.modules, "own_parts")
    monkeypatch.delitem(keras.saving.get_custom_objects(), "own>same")
    main(["inspect", "model.keras", "--import", "own_parts"])
    assert f"2 of {E}" in capsys.readouterr().out


def write_config_with(num_experts):
    """Write the model with another number of experts in its config."""
    old, new = (b'"num_experts": %d' % number for number in (E, num_experts))
    with zipfile.ZipFile("model.keras") as model, zipfile.ZipFile("m.keras", "w") as other:
        for name in model.namelist():
            text = model.read(name)
            other.writestr(name, text.replace(old, new) if name == "config.json" else text)


def write(name, content):
    return lambda: pathlib.Path(name).write_bytes(content)


def nothing():
    """The files are good, or missing."""


DATA = "report model.keras --data"
WRONG = {
    "a missing model": (nothing, "inspect m.keras", "'m.keras'"),
    "other experts": (lambda: write_config_with(7), "inspect m.keras", "Save it again"),
    "other sizes": (lambda: np.save("d.npy", normal(3, 5, D + 1)), f"{DATA} d.npy", "(3, 5, 9)"),
    "few labels": (write("l.txt", b"a\nb\n"), f"{DATA} x.npy --labels l.txt", "2 entries"),
    "a page over the data": (nothing, f"{DATA} x.npy --output ./x.npy", "would replace it"),
    "a module that ends the process": (
        write("ends.py", b"raise SystemExit(3)"),
        "inspect model.keras --import ends",
        "'ends'",
    ),
}


@pytest.mark.parametrize("prepare, arguments, words", WRONG.values(), ids=WRONG)
def test_whatever_is_wrong_is_one_line(prepare, arguments, words, folder, capsys, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    prepare()
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert words in printed.err
    # Whatever is cut, the way out is there.
    assert printed.err.endswith(("see the traceback.\n", "lists the arguments.\n"))
    assert sorted(os.listdir()) == before, "something was left behind"
    assert len(np.load("x.npy")) == 3


def test_a_traceback_is_shown_if_wanted(folder):
    keras.Sequential([keras.Input((D,)), keras.layers.Dense(1)]).save("dense.keras")
    with pytest.raises(ValueError, match="must have a `MixtureOfExperts` layer"):
        main(["inspect", "dense.keras", "--debug"])


def test_a_full_disk_leaves_the_old_page(folder, monkeypatch):
    pathlib.Path("page.html").write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    before = sorted(os.listdir())
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        main(f"{DATA} x.npy --output page.html --debug".split())
    assert pathlib.Path("page.html").read_text() == "old"
    assert sorted(os.listdir()) == before
