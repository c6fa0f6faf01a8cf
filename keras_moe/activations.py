"""Activations of experts that Keras does not have."""

from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.serialization import register


@register
def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, the approximation of GELU that gpt-oss has in its gates.

    Args:
        x: Float tensor.

    Returns:
        Tensor of the shape and dtype of `x`.

    Reference: Hendrycks and Gimpel 2016 (arXiv:1606.08415), section 2.
    """
    x = ops.convert_to_tensor(x)
    return x * ops.sigmoid(1.702 * x)


__all__ = ["quick_gelu"]
__dir__ = __all__.copy
