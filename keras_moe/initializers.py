"""One initializer for several weights: each its own stream of numbers."""

import numpy as np


def reseeded(initializer, *keys):
    """The initializer, seeded by its seed and integer keys, so that equal shapes differ.

    A Keras initializer gives the same values each time it is called.
    """
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return initializer
    seed = int(np.random.SeedSequence([seed, *keys]).generate_state(1)[0] >> 1)
    return type(initializer).from_config({**initializer.get_config(), "seed": seed})
