"""What may stand beside or in place of stacked kernels: low-rank corrections and integers."""

import numpy as np
from keras import ops

from keras_moe.ops.feed_forward import LowRank
from keras_moe.ops.grouped.records import Quantized


def low_rank(factors, scale):
    """A `LowRank` of pairs of variables."""
    downs, ups = zip(*factors)
    tensors = ops.convert_to_tensor
    return LowRank(list(map(tensors, downs)), list(map(tensors, ups)), scale)


def quantize_to_int8(kernel):
    """A stack of kernels (E, D, H) as `Quantized`, one scale for each expert and output."""
    parts = [_quantize_one(part) for part in np.asarray(kernel, "float32")]
    values, scales = zip(*parts)
    return Quantized(np.stack(values), np.stack(scales))


def _quantize_one(kernel):
    scale = np.maximum(np.abs(kernel).max(0, keepdims=True), 1e-7) / 127
    return np.rint(kernel / scale).astype("int8"), scale.astype("float32")
