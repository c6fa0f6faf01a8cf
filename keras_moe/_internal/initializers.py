"""One initializer for several weights: each its own stream of numbers."""

import keras
import numpy as np
from keras import ops


def reseeded(initializer, *keys):
    """The initializer, seeded by its seed and integer keys, so that equal shapes differ.

    A Keras initializer gives the same values each time it is called.
    """
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return initializer
    seed = int(np.random.SeedSequence([seed, *keys]).generate_state(1)[0] >> 1)
    return type(initializer).from_config({**initializer.get_config(), "seed": seed})


class EachExpert(keras.initializers.Initializer):
    """Initializes a stacked kernel expert by expert.

    On a shape (E, D, H) Keras would count E as part of the fan and start 1/sqrt(E) too small. And
    an initializer repeats its values at each call, so each expert and each kernel ("stream") gets
    a seed of its own. Keras compiles the initializers of large kernels that are split over devices,
    and it cannot compile plain functions.

    Args:
        initializer: `keras.initializers.Initializer` of one expert's kernel.
        stream: integer, another one for each kernel.
        experts: the numbers of the experts that the kernel holds, a range.
    """

    def __init__(self, initializer, stream, experts):
        self.initializer = initializer
        self.stream = stream
        self.experts = experts

    def __call__(self, shape, dtype=None):
        experts = [
            reseeded(self.initializer, self.stream, expert)(shape[1:], dtype=dtype)
            for expert in self.experts
        ]
        return ops.stack(experts)
