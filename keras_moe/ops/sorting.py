"""Sorting of assignments by expert, sizes that may not be known while tracing, and dtypes."""

from fractions import Fraction

import keras
from keras import ops

from keras_moe.backend import backend


def as_dtype(tensor, dtype):
    """The tensor in a dtype; as it is if it has this one, since an idle cast costs a call, too."""
    have, want = map(keras.backend.standardize_dtype, (tensor.dtype, dtype))
    return tensor if have == want else ops.cast(tensor, want)


def at_least(least, size):
    """The larger of two sizes; an integer stays one, so that shapes stay known."""
    return max(least, size) if isinstance(size, int) else backend.larger_size(least, size)


def ceil_divide(size, divisor):
    """The quotient of two sizes, rounded up. Not `-(-size // divisor)`: ONNX rounds it to zero."""
    return (size + divisor - 1) // divisor


def position_in_expert(expert, num_experts, order=None):
    """How many entries of the same expert precede each entry (N,) int32.

    `order` (N,) is a permutation in which the entries are counted, or None.
    """
    if order is not None:
        return put(position_in_expert(ops.take(expert, order), num_experts), order)
    _, rank = backend.order_and_rank(expert, num_experts)
    sizes = ops.segment_sum(ops.ones_like(expert), expert, num_experts)
    return rank - ops.take(ops.cumsum(sizes) - sizes, expert)


def put(values, places, size=None):
    """Zeros (size,), by default (N,), with `values[i]` of (N,) written to `places[i]` of (N,)."""
    # `torch.vmap` writes only into what depends on its inputs.
    dtype = values.dtype
    zeros = ops.zeros_like(places, dtype) if size is None else ops.zeros((size,), dtype)
    # Not `ops.scatter`, which on PyTorch adds one value after the other in Python.
    return ops.scatter_update(zeros, ops.expand_dims(places, 1), values)


def slots_of_expert(num_tokens, num_experts, top_k, capacity_factor):
    """Slots of an expert: `ceil(factor * T * K / E)`, at least 1 and at most T * K.

    The factor is read to three decimals or the nearest simple fraction. An integer, or an int32
    tensor where the number of tokens is one.
    """
    # In integers: a compiled quotient in float32 may end just above a whole number.
    factor = min(Fraction(float(capacity_factor)).limit_denominator(1000), num_experts)
    share = Fraction(factor) * top_k / num_experts
    # The whole parts separately: the product of all tokens with the numerator may exceed 32 bits.
    whole, rest = num_tokens // share.denominator, num_tokens % share.denominator
    rows = whole * share.numerator + ceil_divide(rest * share.numerator, share.denominator)
    return at_least(1, rows)
