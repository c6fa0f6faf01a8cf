"""Disturbs studies and examples and runs the same command again: is the result the same?

    KERAS_BACKEND=torch python benchmarks/interruptions.py
    KERAS_BACKEND=torch python benchmarks/interruptions.py --programs study/language_model --kills 5

Runs each program undisturbed, then with each disturbance. After it, the same command must end with
the result of the undisturbed run, bit for bit, times left out. A program that stops because of the
disturbance must say why in one line. Prints tries and failures of each program and disturbance.

Full disks and read-only folders are mounted, which only root on Linux can do; others skip them.
"""

import argparse
import contextlib
import importlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import disturbed  # noqa: E402

# What takes seconds to import, for `disturbed.fork`.
SLOW = (
    "tensorflow tensorflow_datasets keras_moe.tuner keras_tuner matplotlib.figure sentencepiece "
    "sacrebleu sklearn.decomposition sklearn.datasets sklearn.linear_model scipy.sparse"
)
# In KiB: too small for the weights, and for all that is kept.
DISKS = (64, 400)


def killed(program, folder, moment):
    process = disturbed.fork(program, folder)
    time.sleep(moment)
    os.kill(process, signal.SIGKILL)
    if disturbed.end_fork(process, folder).code != -signal.SIGKILL:
        # It was faster than the undisturbed run, and had ended.
        return killed(program, folder, moment / 2)


def stopped_by_key(program, folder, moment):
    """Ctrl-C, at any moment of a real process: in its imports, too."""
    process = disturbed.start(program, folder)
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    ended = disturbed.end(process, folder)
    if ended.code not in (0, 130, -signal.SIGINT):
        return f"exit code {ended.code}"
    if program.is_study and ended.code and not ended.in_one_line:
        return "no clear end"


@contextlib.contextmanager
def mounted(folder, options):
    """A file system of its own in the folder, which has what it held afterwards."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", folder], check=True)
    try:
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
        yield
        subprocess.run(["mount", "-o", "remount,rw,size=100m", folder], check=True)
        kept = folder.with_name("kept")
        shutil.copytree(folder, kept)
    finally:
        subprocess.run(["umount", folder], check=True)
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    shutil.rmtree(kept)


def full_disk(program, folder, kilobytes):
    return _in_mount(program, folder, f"size={kilobytes}k")


def read_only(program, folder, _):
    return _in_mount(program, folder, "ro")


def _in_mount(program, folder, options):
    inside = folder / ("out" if program.is_study else "temporary")
    inside.mkdir()
    with mounted(inside, options):
        ended = disturbed.end(disturbed.start(program, folder, TMPDIR=str(inside)), folder)
    return unclear(program, ended)


def two_at_once(program, folder, _):
    processes = [disturbed.start(program, folder) for _ in range(2)]
    ends = [disturbed.end(process, folder) for process in processes]
    if all(ended.code for ended in ends):
        return "both failed"
    return next(filter(None, (unclear(program, ended) for ended in ends)), None)


def without_home(program, folder, _):
    return whole_run(program, folder, unset=["HOME"])


def plain_locale(program, folder, _):
    return whole_run(program, folder, unset=["LANG", "LC_CTYPE"], LC_ALL="C")


def closed_output(program, folder, _):
    ended = whole_run(program, folder, shell='exec "$@" >&-')
    return ended if program.is_study else unclear(program, ended)


def reader_gone(program, folder, _):
    shell = '{ "$@"; echo $? > code; } | head -n 1; exit $(cat code)'
    return unclear(program, disturbed.end(disturbed.start(program, folder, shell), folder))


def whole_run(program, folder, **how):
    """How a run ended that nothing should disturb."""
    return disturbed.end(disturbed.start(program, folder, **how), folder)


def unclear(program, ended):
    """What is wrong with an end that may be early. Examples end with Python's own traceback."""
    if program.is_study and ended.code and not ended.in_one_line:
        return f"no clear end, exit code {ended.code}: {ended.error[-300:]}"


def disturbances(options, draw, seconds):
    """By name: the function, and an argument for each try."""

    def moments(number, longest):
        return [draw.uniform(0, longest) for _ in range(number)]

    root = hasattr(os, "geteuid") and os.geteuid() == 0 and sys.platform == "linux"
    return {
        "SIGKILL": (killed, moments(options.kills, seconds)),
        "SIGINT": (stopped_by_key, moments(options.interrupts, 2 * seconds + 5)),
        "full disk": (full_disk, DISKS if root else ()),
        "read-only": (read_only, [None] if root else ()),
        "two at once": (two_at_once, [None]),
        "no HOME": (without_home, [None]),
        "LC_ALL=C": (plain_locale, [None]),
        "closed output": (closed_output, [None]),
        "reader gone": (reader_gone, [None]),
    }


def disturb(program, scratch, options):
    """Tries and failures by disturbance."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        ended, seconds = disturbed.run(program, pathlib.Path(folder))
        if ended.code:
            raise RuntimeError(f"{program.name} fails undisturbed:\n{ended.error[-2000:]}")
        expected = program.result(pathlib.Path(folder), ended)
    print(f"{program.name}: {seconds:.1f} s undisturbed", flush=True)
    counts = {}
    table = disturbances(options, random.Random(options.seed), seconds)
    for name in options.disturbances or table:
        function, tries = table[name]
        failures = 0
        for argument in tries:
            with tempfile.TemporaryDirectory(prefix="für alle ", dir=scratch) as folder:
                wrong = attempt(function, argument, program, pathlib.Path(folder), expected)
            if wrong:
                failures += 1
                print(f"  {name}, {argument}: {wrong}", flush=True)
        counts[name] = (len(tries), failures)
        print(f"  {name}: {len(tries)} tries, {failures} failures", flush=True)
    return counts


def attempt(function, argument, program, folder, expected):
    """What is wrong after a disturbance and the same command again, or None.

    A disturbance hands back what was wrong, or the end of a run that has to be whole itself.
    """
    ended = function(program, folder, argument)
    if isinstance(ended, str):
        return ended
    if ended is None:
        ended, _ = disturbed.run(program, folder)
    if ended.code:
        return f"exit code {ended.code}: {ended.error[-600:]}"
    found = program.result(folder, ended)
    return None if found == expected else f"another result: {found}, expected {expected}"


def main(arguments=None):
    names = [f"study/{name}" for name in disturbed.STUDIES]
    names += ["data/bible_es_en"]
    names += [f"example/{name}" for name in disturbed.EXAMPLES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", nargs="+", choices=names, default=names, metavar="PROGRAM")
    parser.add_argument("--disturbances", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of each program")
    parser.add_argument("--interrupts", type=int, default=3, help="SIGINTs of each program")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--data-dir", type=pathlib.Path, help="of the data, which must be there")
    options = parser.parse_args(arguments)
    for name in SLOW.split():
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as scratch:
        programs = [
            disturbed.Program(name, pathlib.Path(scratch), options.data_dir)
            for name in options.programs
        ]
        counts = {program.name: disturb(program, scratch, options) for program in programs}
    header = list(next(iter(counts.values())))
    print("\n| tries (failures) |", " | ".join(header), "|")
    print("|", " | ".join(["---"] * (1 + len(header))), "|")
    for name, row in counts.items():
        cells = [f"{tries} ({failures})" for tries, failures in row.values()]
        print("|", " | ".join([f"`{name}`", *cells]), "|")
    return counts


if __name__ == "__main__":
    main()
