"""Choices and counts as sums over one-hot rows, which a compiler never stores.

The gradient of such a choice is a product, where that of a gather is a scatter.
"""

from keras import ops


def take_columns(matrix, columns):
    """Entries (T, K) of a matrix (T, E) at integer columns (T, K); 0 where none has that number."""
    return ops.sum(
        ops.where(_one_hot(columns, matrix.shape[1]), ops.expand_dims(matrix, 1), 0.0), axis=-1
    )


def count_integers(integers, number):
    """How often each of 0, 1, ..., `number` - 1 is in a vector of integers, (number,) int32."""
    return ops.sum(ops.cast(_one_hot(integers, number), "int32"), axis=0)


def _one_hot(integers, number):
    return ops.expand_dims(ops.cast(integers, "int32"), -1) == ops.arange(number, dtype="int32")
