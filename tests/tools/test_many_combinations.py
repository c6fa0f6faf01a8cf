"""Thousands of random combinations, from a seed that is new in each run.

`COMBINATIONS_SEED` repeats a run, `COMBINATIONS_TIMES` makes it longer. A failure prints its seed.
"""

import os
import random

import pytest
from test_combinations import KINDS, run_draws

SEED = int(os.environ.get("COMBINATIONS_SEED") or random.SystemRandom().randrange(2**32))
# As many times as in the tests of the package.
TIMES = int(os.environ.get("COMBINATIONS_TIMES", 10))


@pytest.mark.parametrize("kind", KINDS)
def test_many_drawn_combinations(kind):
    print(f"COMBINATIONS_SEED={SEED}")
    run_draws(kind, SEED, TIMES)
