"""Whatever is wrong, a command ends in one line and code 2, and leaves nothing half-written."""

import json
import os
import pathlib
import pickle
import sys
import zipfile

import keras
import numpy as np
import pytest
from layer_checks import D, moe, normal

from keras_moe.__main__ import main
from keras_moe._internal import files

LENGTH = 5


@keras.saving.register_keras_serializable("unknown")
class Unknown(keras.layers.Layer):
    def call(self, inputs):
        return inputs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    inputs = keras.Input((LENGTH, D), name="x")
    keras.Model(inputs, moe(name="moe")(inputs)).save(folder / "model.keras")
    keras.Sequential([keras.Input((D,)), keras.layers.Dense(1)]).save(folder / "dense.keras")
    keras.Sequential([keras.Input((D,)), Unknown(), moe()]).save(folder / "unknown.keras")
    return folder


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """The models and good files, in the working directory."""
    for model in saved.iterdir():
        (tmp_path / model.name).write_bytes(model.read_bytes())
    np.save(tmp_path / "x.npy", normal(3, LENGTH, D))
    (tmp_path / "three.txt").write_text("a b c d e\n" * 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def array(value, **kwargs):
    return lambda path: np.save(path, value, **kwargs)


def content(value):
    return lambda path: path.write_bytes(value)


def named(ending, save):
    """A file that NumPy wrote under another ending."""

    def write(path):
        save(path.with_suffix(ending), np.ones((2, 2)))
        path.with_suffix(ending).rename(path)

    return write


def cut(name, share):
    def write(path):
        whole = pathlib.Path(name).read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])

    return write


def with_config(change):
    """Writes the model with a changed config."""

    def write(path):
        with zipfile.ZipFile("model.keras") as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                text = old.read(name)
                new.writestr(name, change(text) if name == "config.json" else text)

    return write


def more(size, number):
    def change(text):
        return json.dumps(_replaced(json.loads(text), size, number)).encode()

    return with_config(change)


def _replaced(value, size, number):
    if isinstance(value, dict):
        return {k: number if k == size else _replaced(v, size, number) for k, v in value.items()}
    return [_replaced(v, size, number) for v in value] if isinstance(value, list) else value


def archive(**entries):
    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            for name, text in entries.items():
                file.writestr(name.replace("_", "."), text)

    return write


def no_file(path):
    """Leave it out."""


OBJECTS = np.array([{"a": 1}, None, "x"], dtype=object)
LATIN = "gr\xfc\xdfe\n".encode("latin-1") * 3

# What is wrong: the argument's file, how to write it, and words of the line.
MODELS = {
    "missing": ("m.keras", no_file, "there is no file 'm.keras'"),
    "empty": ("m.keras", content(b""), "Keras's own format"),
    "text": ("m.keras", content(b"no model"), "Keras's own format"),
    "cut short": ("m.keras", cut("model.keras", 0.5), "Keras's own format"),
    "another archive": ("m.keras", archive(notes_txt="hello"), "config.json"),
    "config is no JSON": ("m.keras", archive(config_json="{"), "`model.save` wrote"),
    "config is no model": (
        "m.keras",
        archive(config_json="[]", metadata_json="{}"),
        "holds a list",
    ),
    "config is null": ("m.keras", archive(config_json="null"), "`model.save` wrote"),
    "an activation of no name": ("m.keras", more("activation", "foo"), "foo"),
    "an argument of no layer": (
        "m.keras",
        with_config(lambda text: text.replace(b'"hidden_dim"', b'"hiden_dim"')),
        "hidden_dim",
    ),
    "other widths": ("m.keras", more("hidden_dim", 7), "shape"),
    "config with a tail": ("m.keras", with_config(lambda text: text + b" x"), "`model.save` wrote"),
    "a billion experts": ("m.keras", more("num_experts", 10**9), "num_experts=1000000000"),
    "a wide expert": ("m.keras", more("hidden_dim", 10**12), "hidden_dim=1000000000000"),
    "endless experts": ("m.keras", more("num_experts", 1e300), "num_experts="),
    "other experts": ("m.keras", more("num_experts", 7), "Save it again"),
    "no experts": ("m.keras", more("num_experts", 0), "must be a positive integer"),
    "no MoE layer": ("dense.keras", no_file, "at least one `MixtureOfExperts` layer"),
}

FILES = {
    "pickled data": ("--data", "d.npy", array(OBJECTS, allow_pickle=True), "pickled objects"),
    "a pickle": ("--data", "d.npy", content(pickle.dumps([1, 2])), "pickled objects"),
    "missing data": ("--data", "d.npy", no_file, "there is no file 'd.npy'"),
    "empty data": ("--data", "d.npy", content(b""), "numpy.save"),
    "truncated data": ("--data", "d.npy", cut("x.npy", 0.5), "numpy.save"),
    "truncated header": ("--data", "d.npy", cut("x.npy", 0.05), "numpy.save"),
    "text as data": ("--data", "d.npy", content(b"1 2 3"), "numpy.save"),
    "data of another kind": ("--data", "d.txt", content(b"1 2 3"), ".npy or .npz"),
    "empty archive": ("--data", "d.npz", content(b""), "numpy.save"),
    "no archive": ("--data", "d.npz", content(b"PK\x03\x04 cut"), "numpy.save"),
    "an array named an archive": ("--data", "d.npz", named(".npy", np.save), "rename"),
    "an archive named an array": ("--data", "d.npy", named(".npz", np.savez), "rename"),
    "scalar": ("--data", "d.npy", array(np.float32(1)), "what the model takes"),
    "rank 1": ("--data", "d.npy", array(np.ones(3, "float32")), "what the model takes"),
    "rank 2": ("--data", "d.npy", array(np.ones((3, D), "float32")), "what the model takes"),
    "rank 4": ("--data", "d.npy", array(np.ones((3, 1, 5, D), "float32")), "the model takes"),
    "features": ("--data", "d.npy", array(np.ones((3, 5, D + 1), "float32")), "the model takes"),
    "no documents": ("--data", "d.npy", array(np.ones((0, 5, D), "float32")), "one document"),
    "strings as data": ("--data", "d.npy", array(np.full((3, 5, D), "a")), "numbers"),
    "other names": ("--data", "d.npz", lambda p: np.savez(p, y=normal(3, 5, D)), "by the names"),
    "few labels": ("--labels", "l.txt", content(b"a\nb\n"), "2 entries for 3 documents"),
    "many labels": ("--labels", "l.npy", array(np.arange(4)), "4 entries for 3 documents"),
    "no labels": ("--labels", "l.txt", content(b""), "0 entries for 3 documents"),
    "scalar labels": ("--labels", "l.npy", array(np.int32(1)), "Received"),
    "labels of no token": ("--labels", "l.npy", array(np.ones((3, 4), "int32")), "one label"),
    "labels in latin-1": ("--labels", "l.txt", content(LATIN), "UTF-8"),
    "pickled labels": ("--labels", "l.npy", array(OBJECTS, allow_pickle=True), "pickled objects"),
    "labels of no layer": ("--labels", "l.npz", lambda p: np.savez(p, a=[1, 2, 3]), "MoE layers"),
    "labels that are no whole numbers": ("--labels", "l.npy", array(np.ones(3)), "integers or"),
    "missing labels": ("--labels", "l.txt", no_file, "there is no file 'l.txt'"),
    "few tokens": ("--tokens", "t.txt", content(b"a\n"), "1 entries for 3 documents"),
    "no tokens": ("--tokens", "t.txt", content(b""), "0 entries for 3 documents"),
    "scalar tokens": ("--tokens", "t.npy", array(np.int32(1)), "Received"),
    "binary tokens": ("--tokens", "t.txt", content(bytes(range(128, 256))), "UTF-8"),
    "a token for each document": ("--tokens", "t.npy", array(np.arange(3)), "Received"),
}


def the_line(capsys, *arguments):
    """The only line on standard error of a command that ends with code 2."""
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.endswith("\n")
    assert printed.err.count("\n") == 1, printed.err
    assert "Received" in printed.err and "Traceback" not in printed.err
    # Whatever is cut, the fix is there.
    assert printed.err.endswith(("see the traceback.\n", "lists the arguments.\n"))
    assert sorted(os.listdir()) == before, "something was left behind"
    return printed.err


@pytest.mark.parametrize("command", ["inspect", "report"])
@pytest.mark.parametrize("name, write, words", MODELS.values(), ids=MODELS)
def test_a_wrong_model_is_one_line(name, write, words, command, folder, capsys):
    write(folder / name)
    data = ["--data", "x.npy"] if command == "report" else []
    assert words in the_line(capsys, command, name, *data)


@pytest.mark.parametrize("option, name, write, words", FILES.values(), ids=FILES)
def test_a_wrong_file_is_one_line(option, name, write, words, folder, capsys):
    pytest.importorskip("matplotlib")
    write(folder / name)
    files_ = {"--data": "x.npy", option: name}
    line = the_line(capsys, "report", "model.keras", *(a for pair in files_.items() for a in pair))
    assert words in line


def test_a_package_that_is_missing_is_named(folder, capsys, monkeypatch):
    loaded = [name for name in sys.modules if name.startswith("keras_moe.visualization")]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main(["report", "model.keras", "--data", "x.npy"])
    assert capsys.readouterr().err == (
        "error: ImportError: Plots need matplotlib, which is not installed. "
        "Run `pip install matplotlib`. Pass --debug to see the traceback.\n"
    )


BAD_PLACES = ["no/such/page.html", ".", "x.npy/page.html", "n" * 300, "a\0b", "pipe"]


@pytest.mark.parametrize("output", BAD_PLACES)
def test_a_place_that_is_none_for_a_page_is_one_line(output, folder, capsys):
    os.mkfifo("pipe")
    line = the_line(capsys, "report", "model.keras", "--data", "x.npy", "--output", output)
    assert repr(output) in line


@pytest.mark.parametrize("output", ["model.keras", "x.npy", "./x.npy"])
def test_a_page_does_not_replace_what_is_read(output, folder, capsys):
    before = (folder / output).read_bytes()
    line = the_line(capsys, "report", "model.keras", "--data", "x.npy", "--output", output)
    assert "would replace it" in line
    assert (folder / output).read_bytes() == before


def test_unknown_classes_are_named_with_the_way_out(folder, capsys, monkeypatch):
    monkeypatch.delitem(keras.saving.get_custom_objects(), "unknown>Unknown")
    monkeypatch.delattr(f"{__name__}.Unknown")
    line = the_line(capsys, "inspect", "unknown.keras")
    assert "class 'Unknown'" in line and "`--import module`" in line


def test_a_module_that_cannot_be_imported_is_one_line(folder, capsys):
    line = the_line(capsys, "inspect", "model.keras", "--import", "no_such_module")
    assert "'no_such_module'" in line


def test_a_module_that_ends_the_process_is_one_line(folder, capsys, monkeypatch):
    (folder / "ends.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(folder)
    # The folder of compiled modules is Python's own, and no output of the command.
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    line = the_line(capsys, "inspect", "model.keras", "--import", "ends")
    assert "'ends'" in line


@pytest.mark.parametrize("arguments", [[], ["look"], ["inspect"], ["report", "model.keras"]])
def test_wrong_arguments_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_argument_of_another_name_is_answered_by_the_help_of_the_command(folder, capsys):
    with pytest.raises(SystemExit):
        main(["report", "model.keras", "--data", "x.npy", "--path", "page.html"])
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --path page.html. "
        "`python -m keras_moe report --help` lists the arguments.\n"
    )


def test_a_traceback_is_shown_if_wanted(folder):
    with pytest.raises(ValueError, match="at least one `MixtureOfExperts` layer"):
        main(["inspect", "dense.keras", "--debug"])


def test_a_full_disk_leaves_the_old_page(folder, monkeypatch):
    page = folder / "page.html"
    page.write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    before = sorted(os.listdir())
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(page, "new")
    assert page.read_text() == "old"
    assert sorted(os.listdir()) == before
