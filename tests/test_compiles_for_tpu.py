"""A training step of the layer compiles for TPUs that are not there.

Every chip meets two cases of `benchmarks.ahead_matrix`; together they meet every shape and every
combination of dtype, gate and capacity.
"""

import keras
import pytest

from benchmarks import ahead_matrix, chips

TPUS = [name for name, chip in chips.CHIPS.items() if chip.platform == "tpu"]

pytestmark = [
    pytest.mark.usefixtures("programs_not_kept"),
    pytest.mark.skipif(keras.backend.backend() != "jax", reason="compiled with JAX"),
    pytest.mark.skipif(chips.missing("v5e") is not None, reason="libtpu is not installed"),
]


@pytest.mark.parametrize(
    "chip, case",
    [
        pytest.param(chip, case, id=f"{chip} {case}")
        for number, chip in enumerate(TPUS)
        for case in ahead_matrix.covering(number)[:2]
    ],
)
def test_a_training_step_compiles(chip, case):
    ahead_matrix.compile_case(case, chips.sharding(chip))
