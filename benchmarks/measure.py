"""Timing side by side: contestants take turns in one process, so that noise hits all alike."""

import json
import os
import pathlib
import platform
import time
from importlib import metadata

import keras
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"


def interleave(contestants, rounds):
    """Milliseconds of each run of each contestant, after one warm-up run that is timed apart.

    Args:
        contestants: dict of names to functions without arguments.
        rounds: how often each one runs.

    Returns:
        Dict of names to arrays (rounds,) of milliseconds, and a dict of names to the seconds of
        the first run, which compiles.
    """
    first = {name: _milliseconds(run) / 1e3 for name, run in contestants.items()}
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].append(_milliseconds(run))
    return {name: np.array(values) for name, values in times.items()}, first


def summarise(times, first, baseline):
    """Rows of a table: median time, and median and quartiles of the ratio to the baseline."""
    rows = []
    for name, values in times.items():
        ratios = values / times[baseline]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        rows.append(
            {
                "name": name,
                "ms": round(float(np.median(values)), 2),
                "ratio": round(float(middle), 3),
                "ratio_quartiles": [round(float(low), 3), round(float(high), 3)],
                "first_run_s": round(first[name], 2),
            }
        )
    return rows


def print_table(rows, title):
    print(f"\n{title}")
    print(f"{'':28}{'median ms':>11}{'ratio':>8}{'quartiles':>16}{'first run s':>13}")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"{row['name']:28}{row['ms']:11.2f}{row['ratio']:8.3f}"
            f"{f'{low:.3f}-{high:.3f}':>16}{row['first_run_s']:13.2f}",
            flush=True,
        )


def write_json(name, setting, rows):
    """Write rows with the machine and the versions they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    backend = keras.backend.backend()
    package = {"tensorflow": "tensorflow-cpu", "jax": "jax", "torch": "torch"}[backend]
    record = {
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            backend: _version(package) or _version(backend),
        },
        "setting": setting,
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: benchmarks/results/{path.name}")


def _milliseconds(run):
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    except OSError:
        pass
    return platform.processor()
