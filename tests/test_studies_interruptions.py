"""How studies end early: in one line, with whole files, and with a folder that nobody else has."""

import ast
import fcntl
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("tensorflow_datasets")

pytestmark = pytest.mark.backends("torch")

STUDIES = pathlib.Path(__file__).parents[1] / "studies"
sys.path.insert(0, str(STUDIES))

import output_folder  # noqa: E402
import whole_files  # noqa: E402
from datasets import catalogue  # noqa: E402

PROGRAMS = [path for path in sorted(STUDIES.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_study_imports_its_end_first_and_claims_its_folder(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.names[0].name for node in tree.body if isinstance(node, ast.Import)]
    assert next(name for name in names if name not in sys.stdlib_module_names) == "clean_exit"
    called = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "claim(options.output)" in called


ENDS = {
    "raise KeyboardInterrupt": (130, "error: interrupted. The same command, given again,"),
    "raise OSError(28, 'made up')": (2, "error: The disk is full. Free some space."),
    "raise RuntimeError('made up: No space left on device')": (2, "error: The disk is full."),
    "os.close(reader); os.write(writer, b'.')": (2, "error: Nobody reads the output any longer."),
    "raise ValueError('A rule. Received: this. A fix.')": (2, "error: A rule. Received: this."),
    "print('to a closed output'); sys.stdout.flush()": (0, ""),
}


@pytest.mark.parametrize("code", ENDS)
def test_a_study_ends_in_one_line(code):
    program = f"import os, sys, clean_exit; reader, writer = os.pipe(); {code}"
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(STUDIES.parent), str(STUDIES)])},
        stderr=subprocess.PIPE,
        text=True,
    )
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert (ended.returncode, len(said)) == (ENDS[code][0], bool(ENDS[code][1])), ended.stderr
    assert "".join(said).startswith(ENDS[code][1]) and "Traceback" not in ended.stderr


def test_a_mistake_keeps_its_traceback():
    ended = subprocess.run(
        [sys.executable, "-c", "import clean_exit; {}['key']"],
        env={**os.environ, "PYTHONPATH": str(STUDIES)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1 and "Traceback" in ended.stderr


def test_files_of_a_set_are_replaced_together(tmp_path):
    paths = [tmp_path / "new" / name for name in ("model.keras", "words.json")]
    with whole_files.whole(*paths) as parts:
        for part, path in zip(parts, paths):
            assert part.suffix == path.suffix
            part.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_files.whole(*paths) as parts:
        parts[0].write_text("half")
        raise KeyboardInterrupt
    assert [path.read_text() for path in paths] == ["old", "old"]
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)


def test_a_folder_that_another_run_has_or_that_is_none_is_refused(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(OSError, match="One run at a time has a folder. Received: --output"):
        output_folder.claim(tmp_path)
    os.close(handle)
    output_folder.claim(tmp_path)
    output_folder.claim(tmp_path)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="can be written to. Received: --output .*Pass another"):
            output_folder.claim(folder)


@pytest.mark.parametrize("other_was_faster", [True, False])
def test_data_that_another_run_prepares_meanwhile_are_taken(other_was_faster):
    class Builder:
        def download_and_prepare(self):
            raise OSError("Directory not empty")

        def is_prepared(self):
            return other_was_faster

    if other_was_faster:
        assert isinstance(catalogue.prepared(Builder), Builder)
    else:
        with pytest.raises(OSError, match="not empty"):
            catalogue.prepared(Builder)
