"""Fresh processes: with other variables, and with compilations and memory that can be observed."""

import contextlib
import gc
import os
import pathlib
import tempfile

import numpy as np

from benchmarks.measure import in_fresh_process

# With these glibc keeps freed memory for later use, in huge pages.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def in_observed_process(function, options, *arguments):
    """`function(options, *arguments, dump)`.

    `dump` is where XLA writes a file for each module it compiles. JAX reads none from its cache.
    Freed memory goes back to the system at once: what the process holds is what is in use.
    """
    with tempfile.TemporaryDirectory() as dump:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_hlo_as_text"
        limits = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "131072")
        variables = {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "0", **limits}
        with environment(variables):
            return in_fresh_process(function, options, *arguments, dump)


@contextlib.contextmanager
def environment(variables):
    """Set environment variables, which processes read when they start."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def compilations(dump):
    """How many programs XLA has compiled."""
    return len(list(pathlib.Path(dump).glob("*before_optimizations.txt")))


def resident_mb(field="VmRSS"):
    """Megabytes of the process in memory, or with "VmHWM" the most there were, on Linux."""
    gc.collect()
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1]) / 1e6
    raise OSError(f"no {field}")


def growth_kb(resident, calls):
    """Growth in 1,000 calls: a line through megabytes in memory, one after each `calls` calls."""
    return 1e3 * float(np.polyfit(np.arange(len(resident)) * calls / 1e3, resident, 1)[0])
