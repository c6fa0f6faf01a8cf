"""What may stand beside or in place of stacked kernels: low-rank corrections and integers."""

import keras
import numpy as np
from keras import ops

from keras_moe._internal.initializers import EachExpert
from keras_moe._internal.validation import check_positive_integer
from keras_moe.ops.feed_forward import LowRank
from keras_moe.ops.grouped.records import Quantized


def check_can_enable_lora(layer, rank):
    """Raise unless a layer is built and has no LoRA yet."""
    check_positive_integer("rank", rank)
    if not layer.built:
        raise ValueError(
            "LoRA needs a built layer. Received: "
            f"`{layer.name}`, not yet built. Call the model once, or `build`, before."
        )
    if layer.lora_enabled:
        raise ValueError(
            "LoRA can be enabled once for a layer. Received: "
            f"rank={rank} for `{layer.name}`, which has rank {layer.lora_rank}. Save and load the "
            "layer without it to begin anew."
        )


def add_factors(layer, name, stream, kernel_shape, rank, a_initializer, b_initializer):
    """The variables A (..., D, r) and B (..., r, H) for a kernel (..., D, H), in float32."""
    *experts, fan_in, fan_out = kernel_shape

    def each(initializer):
        initializer = keras.initializers.get(initializer)
        return EachExpert(initializer, stream, range(experts[0])) if experts else initializer

    a, b = (
        layer.add_weight(
            name=f"{name}_lora_{letter}",
            shape=(*experts, *shape),
            initializer=each(initializer),
            dtype="float32",
            autocast=False,
        )
        for letter, shape, initializer in (
            ("a", (fan_in, rank), a_initializer),
            ("b", (rank, fan_out), b_initializer),
        )
    )
    return a, b


def low_rank(factors, scale):
    """A `LowRank` of pairs of variables."""
    downs, ups = zip(*factors)
    tensors = ops.convert_to_tensor
    return LowRank(list(map(tensors, downs)), list(map(tensors, ups)), scale)


def merged(kernel, factors, scale):
    """The kernel with its correction added, an array in the dtype of the kernel."""
    kernel = ops.convert_to_numpy(kernel)
    a, b = (ops.convert_to_numpy(factor) for factor in factors)
    # One expert at a time: the sum is float32.
    parts = [part + scale * (left @ right) for part, left, right in zip(kernel, a, b)]
    return np.stack(parts).astype(kernel.dtype)


def quantize_to_int8(kernel):
    """A stack of kernels (E, D, H) as `Quantized`, one scale for each expert and output."""
    parts = [_quantize_one(part) for part in np.asarray(kernel, "float32")]
    values, scales = zip(*parts)
    return Quantized(np.stack(values), np.stack(scales))


def _quantize_one(kernel):
    scale = np.maximum(np.abs(kernel).max(0, keepdims=True), 1e-7) / 127
    return np.rint(kernel / scale).astype("int8"), scale.astype("float32")
