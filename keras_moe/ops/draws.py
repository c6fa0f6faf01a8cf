"""Draws: random numbers cheap enough to have one for each feature of each token.

Compiled by XLA, each is a hash of a key that is drawn and of its place. The generators of Keras are
many times slower there. Generators of this kind: Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3".
"""

import math
import random

import keras
from keras import ops

from keras_moe.backend import backend


def seeded_generator():
    """A `keras.random.SeedGenerator` with a new seed, set by `keras.utils.set_random_seed`.

    Without it, PyTorch's dropout draws from the process's generator, which no model saves.
    """
    return keras.random.SeedGenerator(random.randrange(1, 10**9))


def uniform(shape, seed):
    """Float32 numbers (R, C) between 0 and 1, both excluded; the seed is a `SeedGenerator`."""
    if backend.needs_static_shapes():
        return _hashed(shape, seed)
    return keras.random.uniform(shape, minval=2.0**-24, dtype="float32", seed=seed)


def normal(shape, seed):
    """Float32 numbers (R, C) of the normal distribution with mean 0 and deviation 1."""
    if backend.needs_static_shapes():
        return math.sqrt(2) * ops.erfinv(2 * _hashed(shape, seed) - 1)
    return keras.random.normal(shape, dtype="float32", seed=seed)


def dropout(inputs, rate, seed):
    """Inputs (..., C), each set to 0 with the probability `rate`, or scaled by 1 / (1 - rate)."""
    if not backend.needs_static_shapes():
        return keras.random.dropout(inputs, rate, seed=seed)
    rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
    numbers = ops.arange(ops.shape(rows)[0], dtype="int32")
    return ops.reshape(drop(rows, rate, numbers, key(seed)), ops.shape(inputs))


def drop(rows, rate, numbers, key):
    """`dropout` of rows (n, C), by a key and a number of each row: see `hashed`."""
    kept = hashed(numbers, rows.shape[1], key) >= rate
    return ops.where(kept, rows / (1 - rate), ops.zeros((), rows.dtype))


def key(seed):
    """A key (2,) int32 for `hashed`; the seed is a `SeedGenerator`."""
    return keras.random.randint((2,), 0, 2**31 - 1, seed=seed)


def _hashed(shape, seed):
    return hashed(ops.arange(shape[0], dtype="int32"), shape[1], key(seed))


def hashed(rows, columns, key):
    """Float32 numbers (n, columns) between 0 and 1, both excluded, for numbers of rows (n,)."""
    place = ops.expand_dims(rows, 1) * columns + ops.arange(columns, dtype="int32")
    bits = _mix(_mix(place + key[0]) + key[1])
    # 23 bits and a half: each number is exact in float32, and none is 0 or 1.
    return (ops.cast(ops.bitwise_and(bits, 2**23 - 1), "float32") + 0.5) / 2**23


def _mix(bits):
    """A permutation of the int32 numbers that maps neighbours to unrelated values.

    The last step of MurmurHash3, with its constants. Products wrap around.
    """
    bits = ops.bitwise_xor(bits, _shifted(bits, 16)) * (0x85EBCA6B - 2**32)
    bits = ops.bitwise_xor(bits, _shifted(bits, 13)) * (0xC2B2AE35 - 2**32)
    return ops.bitwise_xor(bits, _shifted(bits, 16))


def _shifted(bits, number):
    """Logical shift to the right: zeros come in from the left, for negative numbers too."""
    return ops.bitwise_and(ops.right_shift(bits, number), 2 ** (32 - number) - 1)
