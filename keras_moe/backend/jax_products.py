"""The two bilinear functions of grouped products, as JAX primitives.

    product(rows (R, D), kernels (E, D, H), sizes (E,)) -> (R, H)     each group by its kernel
    outer(left (R, D), right (R, H), sizes (E,)) -> (E, D, H)         for each group left^T right

Lowering for a platform inserts its kernels; tests on a CPU interpret them.
"""

import functools
import importlib
import warnings

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_moe.backend import padded
from keras_moe.backend.base import is_any_derivative, refuse_second_derivative

_DTYPES = {"tpu": ("bfloat16", "float32"), "gpu": ("bfloat16", "float16", "float32")}


def product(rows, kernels, sizes, transposed=False, platform="cpu"):
    if _is_supported(platform, rows) and kernels.bits is None:
        kernels = kernels.values
        return _product.bind(rows, kernels, sizes, transposed=transposed, platform=platform)
    return padded.product(rows, kernels, sizes, transposed, platform)


def outer(left, right, sizes, dtype, platform="cpu"):
    if _is_supported(platform, left):
        return _outer.bind(left, right, sizes, dtype=jnp.dtype(dtype), platform=platform)
    return padded.outer(left, right, sizes, dtype, platform)


def _is_supported(platform, rows):
    """Return True if the platform has kernels for this dtype and number of rows."""
    # The number of rows is a symbol in a program that is exported for batches of any size.
    is_known = isinstance(rows.shape[0], int)
    # Kernels have no derivatives.
    return is_known and rows.dtype.name in _DTYPES.get(platform, ()) and not is_any_derivative()


def _primitive(name, shape):
    """Create a primitive, lowered to the function `name` of the platform's module."""
    primitive = Primitive(f"grouped_{name}")

    def lower(lowered_for, context, *operands, platform, **parameters):
        several = len(context.module_context.platforms) > 1
        if context.avals_in[0].shape[0] == 0 or (several and platform != lowered_for):
            # Without rows there is nothing to compute. A program for several platforms lowers each
            # branch for all of them, though it runs on its own only.
            def rule(*operands):
                aval = shape(*operands, **parameters)
                return jnp.zeros(aval.shape, aval.dtype)
        elif lowered_for in (platform, "cpu"):

            def rule(*operands):
                kernels = importlib.import_module(f"keras_moe.backend.jax_{platform}")
                interpret = lowered_for == "cpu"
                return getattr(kernels, name)(*operands, **parameters, interpret=interpret)
        else:
            raise NotImplementedError(
                f"A program that is traced for {platform!r} must be compiled for it, or for a CPU, "
                f"which interprets it. Received: a program that is compiled for {lowered_for!r}. "
                "Leave out `keras_moe.ops.platform`, or name the platform that it runs on."
            )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
                return mlir.lower_fun(rule, multiple_results=False)(context, *operands)
        except (ImportError, RuntimeError, ValueError):
            # JAX has no Triton any more, or does not know or serve the GPU.
            if platform != "gpu" or lowered_for not in ("gpu", "cpu"):
                raise
            rule = functools.partial(_PADDED[name], **parameters)
            return mlir.lower_fun(rule, multiple_results=False)(context, *operands)

    def compile_and_run(*operands, **parameters):
        with jax.disable_jit(False):
            return jax.jit(functools.partial(primitive.bind, **parameters))(*operands)

    def one_by_one(operands, axes, **parameters):
        size = next(each.shape[axis] for each, axis in zip(operands, axes) if axis is not None)
        stacked = [batching.bdim_at_front(*each, size) for each in zip(operands, axes)]
        return lax.map(lambda each: primitive.bind(*each, **parameters), tuple(stacked)), 0

    primitive.def_impl(compile_and_run)
    primitive.def_abstract_eval(lambda *operands, platform, **rest: shape(*operands, **rest))
    for target in ("cpu", "tpu", "cuda", "rocm"):
        rule = functools.partial(lower, "gpu" if target in ("cuda", "rocm") else target)
        mlir.register_lowering(primitive, rule, platform=target)
    batching.primitive_batchers[primitive] = one_by_one
    ad.primitive_jvps[primitive] = refuse_second_derivative
    return primitive


def _shape_of_product(rows, kernels, sizes, *, transposed):
    width = kernels.shape[1 if transposed else 2]
    return jax.core.ShapedArray((rows.shape[0], width), rows.dtype)


def _shape_of_outer(left, right, sizes, *, dtype):
    return jax.core.ShapedArray((sizes.shape[0], left.shape[1], right.shape[1]), dtype)


def _padded_product(rows, kernels, sizes, transposed):
    kernels = kernels.astype(rows.dtype)
    return padded.product_of_tiles(rows, lambda gather: gather(kernels), sizes, transposed)


_PADDED = {"product": _padded_product, "outer": padded.outer}
_product = _primitive("product", _shape_of_product)
_outer = _primitive("outer", _shape_of_outer)
