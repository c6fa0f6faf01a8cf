"""Rotary positions: attention depends on the distance of query and key alone.

Axes: B batch, L length, N heads, F features of a head.
"""

from keras import ops


def rotate(features, positions):
    """Turn pairs of features by angles that grow with the position.

    Feature i and feature i + F/2 are a pair, turned by `position * 10000 ** (-2 i / F)`. The dot
    product of two rotated vectors depends on the difference of their positions alone.

    Args:
        features: (B, L, N, F) float tensor, F even.
        positions: (L,) int tensor.

    Returns:
        (B, L, N, F) of the dtype of `features`; the angles are computed in float32.

    Reference: Su et al. 2021 (arXiv:2104.09864), eq. 34, with the pairs in halves.
    """
    half = features.shape[-1] // 2
    speeds = 10000.0 ** (-ops.arange(half, dtype="float32") / half)
    angles = ops.expand_dims(ops.cast(positions, "float32"), -1) * speeds
    cosine, sine = (ops.expand_dims(f(angles), 1) for f in (ops.cos, ops.sin))
    first, second = ops.split(ops.cast(features, "float32"), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return ops.cast(ops.concatenate(turned, axis=-1), features.dtype)
