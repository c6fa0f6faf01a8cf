"""What may stand beside or in place of stacked kernels: low-rank corrections and integers."""

import keras
import numpy as np
from keras import ops

from keras_moe.ops.feed_forward import LowRank
from keras_moe.ops.grouped.records import Packed, Quantized


def low_rank(factors, scale):
    """A `LowRank` of pairs of variables."""
    downs, ups = zip(*factors)
    tensors = ops.convert_to_tensor
    return LowRank(list(map(tensors, downs)), list(map(tensors, ups)), scale)


def quantized(kernel, mode, block_size=None):
    """A stack of kernels (E, D, H) in integers, arrays: `Quantized` of "int8", `Packed` of "int4".

    One expert at a time. Each has one scale for each output, with "int4" for each `block_size` rows
    of it, as those of Keras's `Dense` have; None: for all rows.
    """
    kernel = np.asarray(kernel, "float32")
    if mode == "int8":
        return Quantized(*map(np.stack, zip(*map(_to_int8, kernel))))
    parts = zip(*(_to_int4(each, block_size) for each in kernel))
    values, scale, zero = map(np.stack, parts)
    return Packed(values, scale, zero, groups_of_rows(kernel.shape[1], block_size))


def groups_of_rows(num_rows, block_size):
    """The number of the group of each row, int32; None is one group."""
    return np.arange(num_rows, dtype="int32") // (block_size or num_rows)


def _to_int8(kernel):
    scale = np.maximum(np.abs(kernel).max(0, keepdims=True), 1e-7) / 127
    return np.rint(kernel / scale).astype("int8"), scale.astype("float32")


def _to_int4(kernel, block_size):
    if block_size is None:
        scale = np.maximum(np.abs(kernel).max(0, keepdims=True), 1e-7) / 7
        values, zero = np.rint(kernel / scale).astype("int8"), np.zeros(scale.shape, "int8")
    else:
        values, scale, zero = map(
            ops.convert_to_numpy,
            keras.quantizers.abs_max_quantize_grouped_with_zero_point(
                kernel, block_size=block_size, to_numpy=True
            ),
        )
    packed, _, _ = keras.quantizers.pack_int4(values, axis=-1)
    return ops.convert_to_numpy(packed), scale.astype("float32"), zero
