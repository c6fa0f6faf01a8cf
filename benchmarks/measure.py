"""Command lines, timing, progress, and results of the programs.

Implementations are timed alternately in one process, so that noise hits all alike.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import platform
import re
import sys
import time
from importlib import metadata

import keras
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
BACKEND = keras.backend.backend()
_PACKAGES = (
    *("keras", "tensorflow", "tensorflow-cpu", "jax", "torch", "keras-hub", "transformers"),
    *("libtpu", "jax-cuda13-plugin"),
)
_SMOKE = {"tokens": [32], "features": 8, "hidden": 16, "experts": [4], "rounds": 2, "tag": "-smoke"}


def parser(description, **defaults):
    """A parser with the options all programs have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="T")
    parser.add_argument("--features", type=int, default=256, help="D")
    parser.add_argument("--hidden", type=int, default=1024, help="H")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64], help="E")
    parser.add_argument("--top-k", type=int, default=2, help="K")
    parser.add_argument("--gated", action="store_true", help="gated experts and twin")
    parser.add_argument("--activation", default=None, help="default: gelu, or silu when gated")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--no-xla", action="store_true", help="TensorFlow graph without XLA")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tag", default="", help="ending of the name of the JSON file")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, only to see it run")
    parser.set_defaults(**defaults)
    return parser


def parse(parser, arguments, **smoke):
    """The options. `smoke` holds what `--smoke` changes besides the shared options."""
    if parser.parse_known_args(arguments)[0].smoke:
        parser.set_defaults(**{**_SMOKE, **smoke})
    options = parser.parse_args(arguments)
    options.activation = options.activation or ("silu" if options.gated else "gelu")
    options.xla = BACKEND != "torch" and not options.no_xla
    settle(options)
    return options


def settle(options):
    """Set the seed and the dtype policy of a process."""
    keras.utils.set_random_seed(0)
    mixed = options.dtype != "float32"
    keras.config.set_dtype_policy(f"mixed_{options.dtype}" if mixed else "float32")


def describe(options):
    return (
        f"{BACKEND}, D={options.features} H={options.hidden} K={options.top_k} "
        f"{options.dtype}{' gated' if options.gated else ''}"
        f"{' without XLA' if options.no_xla else ''}"
    )


def say(text, end="\n"):
    """Show what runs now, on standard error."""
    print(text, end=end, file=sys.stderr, flush=True)


def interleave(contestants, rounds, clock=time.perf_counter):
    """Milliseconds of each run of each contestant, after a warm-up run that is timed apart.

    Contestants are functions without arguments. Returns arrays (rounds,) by name, and the seconds
    of the first run, which compiles. `clock` is `time.process_time` where others use the machine.
    """
    times = {name: [] for name in contestants}
    say(f"{', '.join(contestants)}: first run", end="")
    for _ in range(1 + rounds):
        for name, run in contestants.items():
            times[name].append(milliseconds(run, clock))
            say(".", end="")
    say(f" {rounds} rounds")
    first = {name: values[0] / 1e3 for name, values in times.items()}
    return {name: np.array(values[1:]) for name, values in times.items()}, first


def summarise(times, first, baseline):
    """Rows of a table: median time, and median and quartiles of the ratio to the baseline."""
    rows = []
    for name, values in times.items():
        low, middle, high = np.quantile(values / times[baseline], [0.25, 0.5, 0.75])
        rows.append(
            {
                "name": name,
                "ms": round(float(np.median(values)), 3),
                "ratio": round(float(middle), 3),
                "ratio_low": round(float(low), 3),
                "ratio_high": round(float(high), 3),
                "first_run_s": round(first[name], 2),
            }
        )
    return rows


def publish(name, title, options, rows):
    """Print rows, and write them as `name` with the machine and the versions they were measured on.

    Rows are dicts that may lack keys.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for first, *others in lines:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:]))
        print(f"{first:{widths[0]}}", *cells, sep="  ")
    installed = {each.name: each.version for each in metadata.distributions()}
    record = {
        "machine": {
            "processor": _processor(),
            "device": _device(),
            "cores": os.cpu_count(),
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        },
        "backend": BACKEND,
        "versions": {
            "python": platform.python_version(),
            **{name: installed[name] for name in _PACKAGES if name in installed},
        },
        "options": vars(options),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{options.tag}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: benchmarks/results/{path.name}", flush=True)
    return rows


def in_fresh_process(function, options, *arguments):
    """`function(options, *arguments)`, all of which must be picklable."""
    say(" ".join(map(str, ["new process:", function.__name__, *arguments[:1]])))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, settle, [options]) as pool:
        return pool.submit(function, options, *arguments).result()


def milliseconds(run, clock=time.perf_counter):
    start = clock()
    run()
    return (clock() - start) * 1e3


def _text(value):
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:,.3f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _device():
    """The name of the card that the backend computes on; of a CPU only that it is one."""
    if BACKEND == "jax":
        import jax

        return jax.devices()[0].device_kind
    if BACKEND == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import tensorflow as tf

    cards = tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU")
    details = [tf.config.experimental.get_device_details(card) for card in cards[:1]]
    return details[0].get("device_name", cards[0].name) if cards else "cpu"


def _processor():
    try:
        names = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor()
