"""Does a training step of the layer compile, whatever the chip, the shape and the options?"""

import argparse
import itertools
from typing import NamedTuple

import keras

from benchmarks import chips, step_ahead

# T, D, H, E, K: odd widths, widths that no tile divides, a wide network, fewer rows than experts.
SHAPES = (
    (1, 16, 24, 4, 2),
    (7, 3, 5, 2, 1),
    (33, 48, 96, 8, 2),
    (100, 130, 70, 5, 3),
    (257, 384, 1000, 16, 2),
    (16, 1024, 4096, 64, 2),
    (1000, 200, 14336, 3, 1),
)
VARIANTS = tuple(itertools.product(("float32", "mixed_bfloat16"), (False, True), (None, 1.25)))


class Case(NamedTuple):
    shape: tuple
    policy: str
    gated: bool
    capacity_factor: float | None

    def __str__(self):
        sizes = " ".join(f"{axis}={size}" for axis, size in zip("TDHEK", self.shape))
        gated = " gated" if self.gated else ""
        return f"{sizes} {self.policy}{gated} capacity_factor={self.capacity_factor}"


CASES = tuple(Case(shape, *variant) for shape in SHAPES for variant in VARIANTS)


def covering(number):
    """Three cases for the chip of this number.

    Five chips meet each shape twice, the first one three times, and all variants.
    """
    return [
        Case(SHAPES[place % len(SHAPES)], *VARIANTS[3 * place % len(VARIANTS)])
        for place in range(3 * number, 3 * number + 3)
    ]


def compile_case(case, sharding):
    """Compile the step of a case; the compiler's error is raised."""
    num_tokens, features, hidden, num_experts, top_k = case.shape
    options = argparse.Namespace(
        tokens=[num_tokens],
        features=features,
        hidden=hidden,
        top_k=top_k,
        gated=case.gated,
        activation="silu" if case.gated else "gelu",
        capacity_factor=case.capacity_factor,
    )
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(case.policy)
    try:
        step_ahead.compile_step(lambda: step_ahead.mixture(num_experts, options), options, sharding)
    finally:
        keras.config.set_dtype_policy(before)


def run(chip):
    """Compile all cases for a chip, say which fail and why, and return the rows of those."""
    sharding, failed = chips.sharding(chip), []
    for case in CASES:
        try:
            compile_case(case, sharding)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            failed.append({"name": str(case), "failed": reason})
            print(f"{chip}: {case} fails: {reason}", flush=True)
    print(f"{chip}: {len(CASES) - len(failed)} of {len(CASES)} steps compile", flush=True)
    return failed
