"""Sizes: integers where shapes are known, tensors where they are not."""

from keras import ops

from keras_moe.backend import backend


def at_least(least, size):
    """The larger of two sizes; an integer stays one, so that shapes stay known."""
    return max(least, size) if isinstance(size, int) else backend.larger_size(least, size)


def at_most(most, size):
    """The smaller of two sizes; integers stay one."""
    both_known = isinstance(most, int) and isinstance(size, int)
    return min(most, size) if both_known else ops.minimum(most, size)
