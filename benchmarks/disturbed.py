"""Studies and examples in their small sizes, and downloads, as processes that can be disturbed."""

import ast
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import time
import traceback
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = {
    "text_classification": ["--epochs", "3", "--experts", "4"],
    "language_model": ["--experts", "4"],
    "moe_vs_dense": ["--experts", "4", "--tasks", "language_model", "classification"],
    "translation": ["--beams", "2", "--epochs", "4"],
    "translation_causes": ["--changes", "none", "--seeds", "0"],
    "sparsity": ["--models", "dense", "8 experts", "--seeds", "0"],
    "upcycling": ["--seeds", "0"],
    "pruning": ["--experts", "4", "--draws", "1"],
    "compare_routers": ["--seeds", "1", "--routers", "top_k", "--balancing", "nothing"],
    "hyperparameter_tuning": ["--epochs", "1", "--seeds", "1", "--trials", "3"],
}
# Downloads data with pip, prepares and reads them. All stands in the folder where it runs.
DATA = f"""
import hashlib, sys
sys.path.insert(0, {str(ROOT / "studies")!r})
from datasets import pairs
print(hashlib.sha256(repr(pairs.load("{{name}}", "data")).encode()).hexdigest())
"""
# One chooses JAX by itself, which is too late in a process that has imported another backend.
EXAMPLES = sorted(
    path.stem
    for path in (ROOT / "examples").glob("*.py")
    if path.stem != "many_devices" or os.environ.get("KERAS_BACKEND") == "jax"
)
# What depends on how fast the machine is.
TIMES = {"ms_per_step", "fastest_ms_per_step", "seconds", "pieces_per_second"}
TIMES_PRINTED = re.compile(r"\d+m?s(/(step|epoch))?")
SECONDS = 600


class Ended(NamedTuple):
    code: int
    out: str
    error: str

    @property
    def in_one_line(self):
        """Whether it said in one line of its own why it ended."""
        said = [line for line in self.error.splitlines() if line.startswith("error: ")]
        return self.code in (2, 130) and len(said) == 1 and "Traceback" not in self.error


class Program:
    """A study or an example in its small size, or a download.

    Args:
        name: `study/` or `example/` and the name of its file, or `data/` and that of the data.
        scratch: folder for the file of what is no study.
        data_dir: folder of the data of studies, or None.
    """

    def __init__(self, name, scratch, data_dir):
        kind, stem = name.split("/")
        self.name, self.kind, self.is_study = name, kind, kind == "study"
        self._arguments = []
        if self.is_study:
            self.script = ROOT / "studies" / f"{stem}.py"
            self._arguments += ["--smoke", *STUDIES[stem]]
            self._arguments += ["--data-dir", str(data_dir)] if data_dir else []
        else:
            self.script = scratch / f"{kind}-{stem}.py"
            self.script.write_text(self._text(stem), encoding="utf-8")

    def _text(self, stem):
        if self.kind == "data":
            return DATA.format(name=stem)
        small = runpy.run_path(str(ROOT / "tests" / "test_examples.py"))["in_smoke_size"]
        text = ast.unparse(small(ROOT / "examples" / f"{stem}.py"))
        # Most examples draw anew in each run.
        return text.replace("import keras\n", "import keras\nkeras.utils.set_random_seed(0)\n", 1)

    def arguments(self, folder):
        """Of the command that works in a folder; an example writes temporary files there alone."""
        return [*self._arguments, *(["--output", str(folder / "out")] if self.is_study else [])]

    def result(self, folder, ended):
        """What a run found, without times: a study's in its files, the others' on its output."""
        if self.kind == "data":
            return ended.out.splitlines()[-1]
        if not self.is_study:
            return TIMES_PRINTED.sub("", ended.out)
        files = sorted((folder / "out").rglob("results.json"))
        return [_without_times(json.loads(path.read_text(encoding="utf-8"))) for path in files]


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def start(program, folder, shell='exec "$@"', unset=(), **environment):
    """The program's process in a folder; the shell runs it as `"$@"`."""
    command = [sys.executable, program.script, *program.arguments(folder)]
    keep = {name: value for name, value in os.environ.items() if name not in unset}
    (folder / "log").write_text("")
    # Two at once write to one log, each behind what the other has written.
    with open(folder / "log", "a") as log:
        return subprocess.Popen(
            ["sh", "-c", shell, "sh", *command],
            cwd=folder,
            env={**keep, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **environment},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


def end(process, folder):
    out, _ = process.communicate(timeout=SECONDS)
    return Ended(process.returncode, out, (folder / "log").read_text(errors="replace"))


def fork(program, folder):
    """The id of a process that runs the program without its imports, which this one has done.

    Nothing is written while a program imports, and kills are to meet it at work.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(folder / "log", "w") as log, open(folder / "output", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(folder)
        os.environ["TMPDIR"] = str(folder)
        sys.argv = [str(program.script), *program.arguments(folder)]
        sys.path.insert(0, str(program.script.parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_fork(process, folder):
    _, status = os.waitpid(process, 0)
    texts = [(folder / name).read_text(errors="replace") for name in ("output", "log")]
    return Ended(os.waitstatus_to_exitcode(status), *texts)


def run(program, folder):
    """A whole run, and the seconds it took."""
    begin = time.monotonic()
    ended = end_fork(fork(program, folder), folder)
    return ended, time.monotonic() - begin
