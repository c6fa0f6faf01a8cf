"""Initializers of weights: their values checked, and for several weights each its own numbers."""

import keras
import numpy as np
from keras import ops

from keras_moe._internal.tensor_checks import check_is_number


def reseeded(initializer, *keys):
    """The initializer, seeded by its seed and integer keys, so that equal shapes differ.

    A Keras initializer gives the same values each time it is called.
    """
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return initializer
    seed = int(np.random.SeedSequence([seed, *keys]).generate_state(1)[0] >> 1)
    return type(initializer).from_config({**initializer.get_config(), "seed": seed})


def initial(initializer, shape, dtype=None):
    """The values of an initializer. Keras does not see to it on all backends that they fit."""
    value = initializer(shape, dtype=dtype)
    check_is_number("initializer(shape, dtype)", value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            "An initializer must return a tensor of the shape that it is given. Received: the "
            f"shape {tuple(value.shape)} for {tuple(shape)}. Make all of it, for example by "
            "`keras.ops.zeros(shape, dtype)`."
        )
    return value


class Checked(keras.initializers.Initializer):
    """An initializer whose values are checked.

    A class, because Keras compiles the initializers of large weights that are split over devices,
    and it cannot compile plain functions.
    """

    def __init__(self, initializer):
        self.initializer = initializer

    def __call__(self, shape, dtype=None):
        return initial(self.initializer, shape, dtype)


class EachExpert(keras.initializers.Initializer):
    """Initializes a stacked kernel expert by expert.

    On a shape (E, D, H) Keras would count E as part of the fan and start 1/sqrt(E) too small. And
    an initializer repeats its values at each call, so each expert and each kernel ("stream") gets
    a seed of its own.

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
            initial(reseeded(self.initializer, self.stream, expert), shape[1:], dtype)
            for expert in self.experts
        ]
        return ops.stack(experts)
