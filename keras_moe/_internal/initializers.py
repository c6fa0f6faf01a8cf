"""Initializers of kernels."""

import copy

import keras
import numpy as np
from keras import ops


def reseeded(initializer, *keys):
    """Return a copy whose seed is derived from its own and integer keys, so that kernels differ."""
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return initializer
    seed = int(np.random.SeedSequence([seed, *keys]).generate_state(1)[0] >> 1)
    config = initializer.get_config() if hasattr(initializer, "get_config") else {}
    if "seed" in config:
        return type(initializer).from_config({**config, "seed": seed})
    initializer = copy.copy(initializer)
    initializer.seed = seed
    return initializer


def mark_stack(variable):
    """Mark a variable whose first axis is experts, for `optimizers.Muon`, and return it."""
    variable.is_stack_of_experts = True
    return variable


class EachExpert(keras.initializers.Initializer):
    """Initializes a stacked kernel (E, D, H) of numbered experts one by one.

    Keras would count E as part of the fan, and start 1 / sqrt(E) too small. As an initializer
    repeats its values at each call, each expert and each kernel, or "stream", has its own seed.
    """

    def __init__(self, initializer, stream, experts):
        self.initializer, self.stream, self.experts = initializer, stream, experts

    def __call__(self, shape, dtype=None):
        each = (reseeded(self.initializer, self.stream, expert) for expert in self.experts)
        kernels = [initializer(shape[1:], dtype=dtype) for initializer in each]
        if any(np.shape(kernel) != tuple(shape[1:]) for kernel in kernels):  # Keras does not check
            raise ValueError(
                "`kernel_initializer` must return a tensor of the shape that it is given. "
                f"Received: shape {np.shape(kernels[0])} for {tuple(shape[1:])}"
            )
        return ops.stack(kernels)
