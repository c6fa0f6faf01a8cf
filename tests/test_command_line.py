"""The command line, on saved models."""

import importlib
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from layer_checks import D, E, moe, normal

from keras_moe import inspection
from keras_moe.__main__ import main
from keras_moe.callbacks import ExpertMonitor

ENGINE = "tiles" if keras.backend.backend() == "jax" else "slices"


@pytest.fixture
def saved(tmp_path):
    model = keras.Sequential([keras.Input((5, D)), moe(name="moe"), keras.layers.Dense(2)])
    model.save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


def test_inspect_prints_layers_sizes_and_costs(saved, capsys):
    main(["inspect", str(saved)])
    printed = capsys.readouterr().out.splitlines()
    router, expert, head = D * E, 2 * D * 16 + 16 + D, 2 * D + 2
    layer, active = router + E * expert, router + 2 * expert
    model = keras.saving.load_model(saved)
    counters = model.count_params() - layer - head
    assert printed[0].endswith(
        f": {layer + head + counters:,} parameters, {active + head + counters:,} of them active "
        "for a token"
    )
    assert printed[3].split() == [
        *("moe", "2", "of", str(E), f"{layer:,}", f"{active:,}", f"{2 * active:,}", "-", "-"),
        *(ENGINE, "(cpu)"),
    ]
    assert printed[-1].startswith("No counts are here: experts are counted in training")


def test_inspect_prints_counters(saved, capsys):
    model = keras.saving.load_model(saved)
    model.layers[0].expert_counts.assign([6, 2, 0, 0])
    model.save(saved)
    main(["inspect", str(saved)])
    assert capsys.readouterr().out.splitlines()[-1].split()[-6:-2] == ["3.00", "x", "fair", "2"]


def test_report_writes_a_page(saved, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    np.save(tmp_path / "x.npy", normal(3, 5, D))
    (tmp_path / "labels.txt").write_text("sport\nspace\nsport\n")
    (tmp_path / "texts.txt").write_text("a b c d e\nf g h i j\nk l m n o\n")
    page = tmp_path / "page.html"
    files = ["--labels", "labels.txt", "--tokens", "texts.txt", "--output", "page.html"]
    files = [name if name.startswith("--") else str(tmp_path / name) for name in files]
    main(["report", str(saved), "--data", str(tmp_path / "x.npy"), *files])
    assert capsys.readouterr().out == f"The report is in {page}.\n"
    html = page.read_text()
    assert '"texts":["a","b","c","d","e","f"' in html
    assert '"labels":["sport","space","sport"]' in html


def test_arrays_by_name_are_read(tmp_path):
    pytest.importorskip("matplotlib")
    left, right = keras.Input((D,), name="left"), keras.Input((D,), name="right")
    outputs = moe()(keras.layers.Add()([left, right]))
    keras.Model({"left": left, "right": right}, outputs).save(tmp_path / "model.keras")
    np.savez(tmp_path / "x.npz", left=normal(2, D), right=normal(2, D))
    model, data, page = (str(tmp_path / name) for name in ("model.keras", "x.npz", "page.html"))
    main(["report", model, "--data", data, "--output", page])
    assert "2 documents, 2 tokens routed" in (tmp_path / "page.html").read_text()


def test_a_missing_file_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "no_such.keras"])
    assert "there is no file 'no_such.keras'" in capsys.readouterr().err


def test_a_file_that_is_no_model_is_told(tmp_path, capsys):
    path = tmp_path / "notes.keras"
    path.write_text("no model")
    with pytest.raises(SystemExit):
        main(["inspect", str(path)])
    assert "error: argument model: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.backends("torch")
def test_layers_of_the_users_own_are_imported_first(tmp_path, monkeypatch):
    source = (
        "import keras\n"
        "@keras.saving.register_keras_serializable('own')\n"
        "class Own(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return x\n"
    )
    (tmp_path / "own_layers.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_layers").Own()
    keras.Sequential([keras.Input((D,)), own, moe()]).save(tmp_path / "model.keras")
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "keras_moe", "inspect", "model.keras", "--import", "own_layers"],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"2 of {E}" in done.stdout


def test_a_summary_counts_what_was_trained():
    model = keras.Sequential([keras.Input((D,)), moe(name="moe"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(normal(8, D), normal(8, 1), verbose=0)
    assert sum(inspection.summarize(model)[0].counts) == 16
    model.fit(normal(8, D), normal(8, 1), verbose=0, callbacks=[ExpertMonitor()])
    assert sum(inspection.summarize(model)[0].counts) == 16, "of the epoch alone"
