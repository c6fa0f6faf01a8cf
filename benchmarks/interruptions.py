"""Disturbs studies and examples and runs the same command again: is the result the same?

    KERAS_BACKEND=torch python benchmarks/interruptions.py
    KERAS_BACKEND=torch python benchmarks/interruptions.py --programs study/language_model --kills 5

Runs each program undisturbed, then with each disturbance. After it, the same command must end with
the result of the undisturbed run, bit for bit, times left out. A study that stops because of the
disturbance must say why in one line. Prints tries and failures of each program and disturbance.

Full disks and read-only folders are mounted, which only root on Linux can do; others skip them.
"""

import argparse
import ast
import json
import os
import pathlib
import random
import re
import runpy
import subprocess
import sys
import tempfile
import time

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
import datasets
print(hashlib.sha256(repr(datasets.load_pairs("bible_es_en", "data")).encode()).hexdigest())
"""
# What depends on how fast the machine is.
TIMES = {"ms_per_step", "fastest_ms_per_step", "seconds"}
TIMES_PRINTED = re.compile(r"\d+m?s(/(step|epoch))?")
# Lines of a shell, in which "$@" is the program. A mounted folder keeps what it held.
IN_MOUNT = """
mkdir out && mount -t tmpfs tmpfs out && mount -o remount,{} out
"$@"; code=$?
mount -o remount,rw,size=100m out; cp -r out kept; umount out; cp -r kept/. out; exit $code"""
UNDISTURBED = 'exec "$@"'
# A study works on as if nothing was.
HARMLESS = {
    "no HOME": 'unset HOME; exec "$@"',
    "LC_ALL=C": 'unset LANG LC_CTYPE; export LC_ALL=C; exec "$@"',
    "closed output": 'exec "$@" >&-',
}


def disturbances(options, seconds):
    """By name: lines of a shell, one for each try."""
    draw = random.Random(options.seed)
    # Nothing is written while a program imports, and kills are to meet it at work.
    kills = [draw.uniform(seconds / 2, seconds) for _ in range(options.kills)]
    interrupts = [draw.uniform(0, seconds) for _ in range(options.interrupts)]
    root = hasattr(os, "geteuid") and os.geteuid() == 0 and sys.platform == "linux"
    return {
        "SIGKILL": [f'timeout -s KILL {moment:.2f} "$@"' for moment in kills],
        "SIGINT": [f'timeout --preserve-status -s INT {moment:.2f} "$@"' for moment in interrupts],
        # Too small for the weights, and for all that is kept.
        "full disk": [IN_MOUNT.format(f"size={size}k") for size in (64, 400) if root],
        "read-only": [IN_MOUNT.format("ro")] if root else [],
        "two at once": ['"$@" & "$@" && { wait $!; exit 0; }; wait $!'],
        "reader gone": ['{ "$@"; echo $? > code; } | head -n 1; exit $(cat code)'],
        **{name: [line] for name, line in HARMLESS.items()},
    }


def run(command, folder, shell=UNDISTURBED):
    """How a command ended in a folder: its exit code, its output, and its errors."""
    return subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "out")},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=1200,
    )


def result(name, folder, ended):
    """What a run found, without times: a study's in its files, the others' on its output."""
    if name.startswith("data/"):
        return ended.stdout.splitlines()[-1]  # pip and TFDS print more
    if not name.startswith("study/"):
        return TIMES_PRINTED.sub("", ended.stdout)
    files = sorted((folder / "out").rglob("results.json"))
    return [without_times(json.loads(path.read_text(encoding="utf-8"))) for path in files]


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def wrong_after(name, command, folder, shell, expected):
    """What is wrong after a disturbance and the same command again, or None."""
    ended = run(command, folder, shell)
    if name.startswith("study/") and ended.returncode and "-s KILL" not in shell:
        said = re.findall("^error: ", ended.stderr, flags=re.MULTILINE)
        early = ended.returncode in (2, 130) and shell not in HARMLESS.values()
        if not early or len(said) != 1 or "Traceback" in ended.stderr:
            return f"no clear end, exit code {ended.returncode}: {ended.stderr[-300:]}"
    ended = run(command, folder)
    if ended.returncode:
        return f"exit code {ended.returncode}: {ended.stderr[-600:]}"
    found = result(name, folder, ended)
    return None if found == expected else f"another result: {found}, expected {expected}"


def disturb(name, command, options):
    """Tries and failures by disturbance."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        ended = run(command, pathlib.Path(folder))
        seconds = time.monotonic() - begin
        ended.check_returncode()
        expected = result(name, pathlib.Path(folder), ended)
    counts = {}
    for disturbance, tries in disturbances(options, seconds).items():
        failures = 0
        for shell in tries:
            with tempfile.TemporaryDirectory(prefix="für alle ") as folder:
                wrong = wrong_after(name, command, pathlib.Path(folder), shell, expected)
            if wrong:
                failures += 1
                print(f"{name}, {disturbance}: {wrong}", flush=True)
        counts[disturbance] = f"{len(tries)} ({failures})"
    return counts


def commands(scratch, data_dir):
    """The command of each program by name; what is no study is written to a folder."""
    data = ["--data-dir", data_dir] if data_dir else []
    found = {
        f"study/{name}": [
            *(ROOT / "studies" / f"{name}.py", "--smoke", "--output", "out"), *arguments, *data
        ]
        for name, arguments in STUDIES.items()
    }  # fmt: skip
    texts = {"data/bible_es_en": DATA}
    small = runpy.run_path(str(ROOT / "tests" / "test_examples.py"))["in_smoke_size"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        # Most examples draw again in each run.
        seeded = "import keras\nkeras.utils.set_random_seed(0)\n"
        text = ast.unparse(small(path)).replace("import keras\n", seeded, 1)
        texts[f"example/{path.stem}"] = text
    for name, text in texts.items():
        script = scratch / f"{name.replace('/', '-')}.py"
        script.write_text(text, encoding="utf-8")
        found[name] = [script]
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", nargs="+", metavar="PROGRAM", help="default: all")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of each program")
    parser.add_argument("--interrupts", type=int, default=3, help="SIGINTs of each program")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--data-dir", type=pathlib.Path, help="of the data, which must be there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        available = commands(pathlib.Path(scratch), options.data_dir)
        for name in options.programs or available:
            counts = disturb(name, available[name], options)
            print(f"{name}, tries (failures):", counts, flush=True)


if __name__ == "__main__":
    main()
