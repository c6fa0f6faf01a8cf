"""Grouped products on JAX: kernels on TPUs, elsewhere padded tiles."""

import functools

import jax
from jax import lax

from keras_moe.backend import padded
from keras_moe.backend.base import is_any_derivative, named_platform, refuse_second_derivative

_DTYPES = ("bfloat16", "float32")  # of the kernels


def product(rows, kernels, sizes, transposed=False, platform="cpu"):
    if _is_supported(platform, rows) and kernels.bits is None:
        return _by_kernel("product", rows, kernels.values, sizes, transposed=transposed)
    return padded.product(rows, kernels, sizes, transposed, platform)


def outer(left, right, sizes, dtype, platform="cpu"):
    if _is_supported(platform, left):
        return _by_kernel("outer", left, right, sizes, dtype=dtype)
    return padded.outer(left, right, sizes, dtype, platform)


def _is_supported(platform, rows):
    """Return True if kernels multiply this dtype and number of rows."""
    # The number of rows is a symbol in a program that is exported for batches of any size.
    is_known = isinstance(rows.shape[0], int) and rows.shape[0] > 0
    # Kernels have no derivatives.
    is_called = platform == "tpu" and is_known and not is_any_derivative()
    return is_called and rows.dtype.name in _DTYPES


def _by_kernel(name, *operands, **options):
    """Call a function of `jax_tpu`, or the padded one in a program for other platforms."""
    from keras_moe.backend import jax_tpu

    on_tpu = functools.partial(getattr(jax_tpu, name), **options)
    by_platform = {"tpu": on_tpu, "default": functools.partial(_PADDED[name], **options)}
    if named_platform() == "tpu":  # A CPU may run what is traced for a TPU.
        by_platform["cpu"] = functools.partial(on_tpu, interpret=True)

    @jax.custom_jvp
    @jax.custom_batching.sequential_vmap
    def function(*operands):
        return lax.platform_dependent(*operands, **by_platform)

    function.defjvp(refuse_second_derivative)
    return function(*operands)


def _padded_product(rows, kernels, sizes, transposed):
    kernels = kernels.astype(rows.dtype)
    return padded.product_of_tiles(rows, lambda gather: gather(kernels), sizes, transposed)


_PADDED = {"product": _padded_product, "outer": padded.outer}
