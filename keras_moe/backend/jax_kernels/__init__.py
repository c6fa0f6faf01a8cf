"""Grouped products as JAX primitives, which become Pallas kernels when they are lowered.

A trace says only which products are wanted. The kernels of a platform are traced when a program is
lowered for it, so those of other platforms cost nothing. On a CPU they are interpreted, for tests.
"""

import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from keras_moe.backend.jax_kernels.elementwise import (
    apply_in_kernel,
    num_outputs,
    runs_in_kernels,
    split,
    unchanged,
)

_DTYPES = {"tpu": ("bfloat16", "float32"), "gpu": ("bfloat16", "float16", "float32")}


def supports(platform, dtype):
    """Whether there are kernels for a platform and a dtype of rows."""
    if dtype not in _DTYPES.get(platform, ()):
        return False
    return platform != "gpu" or _has_triton()


@functools.cache
def _has_triton():
    """Whether JAX has Triton, and no GPU of this process is older than Triton takes (sm80)."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return False
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    capabilities = [getattr(device, "compute_capability", "") for device in gpus]
    # AMD's are names, not numbers.
    return all(float(each) >= 8.0 for each in capabilities if each.replace(".", "").isdigit())


def grouped_products(platform, rows, kernels, biases, sizes, then, extras=(), transposed=False):
    """See `Backend.grouped_products`."""
    num_inputs = len(kernels) + len(extras)
    finish = None
    if runs_in_kernels(then, num_inputs):
        finish = functools.partial(apply_in_kernel, platform, then)
    products = _bind_products(
        (rows, sizes, *kernels, *biases, *(extras if finish else ())),
        platform=platform,
        num_kernels=len(kernels),
        num_biases=len(biases),
        finish=finish or unchanged,
        num_outputs=num_outputs(finish, num_inputs) if finish else len(kernels),
        transposed=transposed,
    )
    return tuple(products) if finish else then(*products, *extras)


def grouped_kernel_gradients(platform, lefts, right, sizes, kernel, bias, remake=None):
    """See `Backend.grouped_kernel_gradients`."""
    if remake is not None:
        function, remake = remake, None
        if runs_in_kernels(lambda *tiles: (function(*tiles),), len(lefts)):
            remake = functools.partial(_remake_in_kernel, platform, function)
        else:
            lefts = (function(*lefts),)
    of_kernel, *of_bias = _bind_gradients(
        (right, sizes, *lefts),
        platform=platform,
        dtype=kernel.dtype,
        with_bias=bias is not None,
        remake=remake,
    )
    return of_kernel, of_bias[0].astype(bias.dtype) if of_bias else None


def _remake_in_kernel(platform, function, *tiles):
    return apply_in_kernel(platform, lambda *tiles: (function(*tiles),), *tiles)[0]


def _bind(primitive, operands, **parameters):
    # Under `vmap` the kernels run one after the other.
    @jax.custom_batching.sequential_vmap
    def run(*operands):
        return primitive.bind(*operands, **parameters)

    return run(*operands)


def _primitive(name, shapes, implementation):
    """A primitive that a program lowers to `implementation`, for the platform it is lowered for."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)
    primitive.def_impl(functools.partial(_compile_and_run, primitive))

    def lower(lowered_for, context, *operands, platform, **parameters):
        if context.avals_in[0].shape[0] == 0:  # Without rows there is no tile to compute.
            rule = functools.partial(_zeros, shapes)
        elif lowered_for == "cpu":
            rule = functools.partial(implementation, platform=platform, interpret=True)
        elif lowered_for == platform:
            rule = functools.partial(implementation, platform=platform, interpret=False)
        elif len(context.module_context.platforms) > 1:
            # A program for several platforms lowers each branch for all of them, though it runs on
            # its own only.
            rule = functools.partial(_zeros, shapes)
        else:
            raise NotImplementedError(
                f"A program that is traced for {platform!r} must be compiled for it, or for a CPU, "
                f"which interprets it. Received: a program that is compiled for {lowered_for!r}. "
                "Leave out `keras_moe.ops.platform`, or name the platform that it runs on."
            )
        lowering = mlir.lower_fun(rule, multiple_results=True)
        return lowering(context, *operands, **parameters)

    for platform in ("cpu", "tpu", "cuda", "rocm"):
        lowered_for = "gpu" if platform in ("cuda", "rocm") else platform
        rule = functools.partial(lower, lowered_for)
        mlir.register_lowering(primitive, rule, platform=platform)
    return functools.partial(_bind, primitive)


def _compile_and_run(primitive, *operands, **parameters):
    with jax.disable_jit(False):
        return jax.jit(functools.partial(primitive.bind, **parameters))(*operands)


def _zeros(shapes, *operands, **parameters):
    return [jnp.zeros(each.shape, each.dtype) for each in shapes(*operands, **parameters)]


def _shapes_of_products(rows, sizes, kernel, *others, num_outputs, transposed, **parameters):
    width = kernel.shape[1] if transposed else kernel.shape[2]
    return [jax.core.ShapedArray((rows.shape[0], width), rows.dtype)] * num_outputs


def _products(rows, sizes, *others, platform, num_kernels, num_biases, num_outputs, **parameters):
    kernels, biases, extras = split(others, num_kernels, num_biases)
    compute = _kernels_of(platform).grouped_products
    return compute(rows, kernels, biases, sizes, extras=extras, **parameters)


def _shapes_of_gradients(right, sizes, left, *lefts, dtype, with_bias, **parameters):
    kernel = (sizes.shape[0], left.shape[1], right.shape[1])
    shapes = [kernel, (kernel[0], kernel[2])] if with_bias else [kernel]
    return [jax.core.ShapedArray(shape, dtype) for shape in shapes]


def _gradients(right, sizes, *lefts, platform, remake, **parameters):
    if remake is not None:
        parameters["remake"] = remake
    left = lefts[0] if remake is None else lefts
    kernel, bias = _kernels_of(platform).grouped_kernel_gradient(left, right, sizes, **parameters)
    return [kernel] if bias is None else [kernel, bias.astype(kernel.dtype)]


def _kernels_of(platform):
    return importlib.import_module(f"{__name__}.{platform}")


_bind_products = _primitive("grouped_products", _shapes_of_products, _products)
_bind_gradients = _primitive("grouped_kernel_gradients", _shapes_of_gradients, _gradients)
