"""Thousands of random combinations, from a seed that is new in each run.

`COMBINATIONS_SEED` repeats a run, `COMBINATIONS_TIMES` makes it longer. A failure prints the
program that repeats it.
"""

import math
import os
import random

import pytest
from backends import BACKEND, ROOT, run_python
from test_combinations import EIGHT_DEVICES

SEED = int(os.environ.get("COMBINATIONS_SEED") or random.SystemRandom().randrange(2**32))
# As many times as in the tests of the package.
TIMES = int(os.environ.get("COMBINATIONS_TIMES", 10))
# How many of these in a process. It keeps what it has compiled, in mappings of memory, of which
# Linux allows it 65,530: TensorFlow ran out of them between 300 and 600 draws.
TIMES_OF_PROCESS = {"torch": 1, "tensorflow": 4, "jax": 9}[BACKEND]


@pytest.mark.parametrize("part", range(math.ceil(TIMES / TIMES_OF_PROCESS)))
def test_many_drawn_combinations(part):
    settings = {"COMBINATIONS_SEED": str(SEED + part), "COMBINATIONS_TIMES": str(TIMES_OF_PROCESS)}
    print(f"COMBINATIONS_SEED={SEED}")
    files = (ROOT / "tests" / name for name in ("test_combinations.py", "test_pairs.py"))
    run_python("-m", "pytest", "-q", *files, **settings)


@pytest.mark.backends("jax")  # Keras splits weights there only
def test_drawn_mixtures_on_eight_devices():
    files = (ROOT / "tests" / name for name in ("tools/drawn_on_eight_devices.py", "test_pairs.py"))
    settings = {"COMBINATIONS_SEED": str(SEED), "COMBINATIONS_TIMES": str(TIMES)}
    print(f"COMBINATIONS_SEED={SEED}")
    run_python("-m", "pytest", "-q", *files, XLA_FLAGS=EIGHT_DEVICES, **settings)
