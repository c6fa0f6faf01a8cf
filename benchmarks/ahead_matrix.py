"""Does a training step of the layer compile, whatever the chip, the shape and the options?"""

import argparse
import itertools

import keras

from benchmarks import chips, contestants

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
# A policy, whether gated, a capacity factor.
VARIANTS = tuple(itertools.product(("float32", "mixed_bfloat16"), (False, True), (None, 1.25)))


def covering(number):
    """Three cases for the chip of this number: a shape and a variant each.

    Five chips meet each shape twice, the first one three times, and all variants.
    """
    return [
        (SHAPES[place % len(SHAPES)], *VARIANTS[3 * place % len(VARIANTS)])
        for place in range(3 * number, 3 * number + 3)
    ]


def compile_case(case, sharding):
    """Compile the step of a case; the compiler's error is raised."""
    (num_tokens, features, hidden, num_experts, top_k), policy, gated, capacity_factor = case
    options = argparse.Namespace(
        tokens=[num_tokens],
        features=features,
        hidden=hidden,
        top_k=top_k,
        gated=gated,
        activation="silu" if gated else "gelu",
    )

    def build():
        router = contestants.skewed_router(num_experts, options)
        return contestants.mixture_of(router, options, capacity_factor=capacity_factor)

    keras.config.set_dtype_policy(policy)
    chips.compile_step(build, options, sharding)
