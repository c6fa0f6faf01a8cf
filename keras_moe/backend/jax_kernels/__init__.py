"""Grouped products as JAX primitives, which become Pallas kernels when they are lowered.

What is traced says only which products are asked for. The kernels of a platform are traced when
a program is lowered for it, so those of other platforms cost nothing. On a CPU they are
interpreted, for tests.
"""

import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from keras_moe.backend.jax_kernels.elementwise import apply_in_kernel, runs_in_kernels

_DTYPES = {"tpu": ("bfloat16", "float32"), "gpu": ("bfloat16", "float16", "float32")}


def supports(platform, dtype):
    """Whether there are kernels for a platform and a dtype of rows."""
    if dtype not in _DTYPES.get(platform, ()):
        return False
    return platform != "gpu" or _has_triton()


def grouped_products(platform, rows, kernels, biases, sizes, then, extras=(), transposed=False):
    """`then` of each product of all rows with the kernels of their experts, and of the extras.

    Args:
        platform: "tpu" or "gpu", whose kernels are used.
        rows: (R, D) grouped by expert.
        kernels: list of arrays (E, D, H), or (E, H, D) if `transposed`, of any float dtype.
        biases: as many arrays (E, H), or none.
        sizes: (E,) int32 sizes of the groups.
        then: elementwise function of the products and the extras, which returns a tuple. It is
            computed in float32 inside the kernel, if all of its operations can be.
        extras: arrays (R, H).
        transposed: whether to multiply by the transposed kernels.

    Returns:
        What `then` returns: a tuple of arrays (R, H), of which rows behind the last group may be
        anything.
    """
    num_inputs = len(kernels) + len(extras)
    finish = functools.partial(apply_in_kernel, then) if runs_in_kernels(then, num_inputs) else None
    products = _bind_products(
        (rows, sizes, *kernels, *biases, *(extras if finish else ())),
        platform=platform,
        num_kernels=len(kernels),
        num_biases=len(biases),
        finish=finish,
        num_outputs=_num_outputs(finish, num_inputs) if finish else len(kernels),
        transposed=transposed,
    )
    return tuple(products) if finish else then(*products, *extras)


def remakes_factors(platform):
    """Whether `grouped_kernel_gradients` takes a function for its left factor.

    A TPU kernel reads each left factor about once. One of a GPU reads it for every tile of the
    other axis, so there the function would be computed many times.
    """
    return platform == "tpu"


def grouped_kernel_gradients(platform, lefts, right, sizes, kernel, bias, remake=None):
    """The gradient of a kernel (E, D, H), and that of a bias (E, H) or None.

    Args:
        platform: "tpu" or "gpu", whose kernels are used.
        lefts: tuple of arrays (R, D): what was multiplied, or what `remake` makes it from.
        right: (R, H) the gradient of the products.
        sizes: (E,) int32 sizes of the groups.
        kernel: (E, D, H), for its dtype.
        bias: (E, H), for its dtype, or None.
        remake: elementwise function of the `lefts`, or None. It is computed in float32 inside the
            kernel, if all of its operations can be.
    """
    if remake is not None:
        function, remake = remake, None
        if runs_in_kernels(lambda *tiles: (function(*tiles),), len(lefts)):
            remake = functools.partial(_remake_in_kernel, function)
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


def _remake_in_kernel(function, *tiles):
    return apply_in_kernel(lambda *tiles: (function(*tiles),), *tiles)[0]


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
    primitive.def_impl(
        lambda *operands, **parameters: jax.jit(
            lambda *operands: primitive.bind(*operands, **parameters)
        )(*operands)
    )

    def lower(lowered_for, context, *operands, platform, **parameters):
        if lowered_for == "cpu":
            rule = functools.partial(implementation, platform=platform, interpret=True)
        elif lowered_for == platform:
            rule = functools.partial(implementation, platform=platform, interpret=False)
        else:
            # A program for several platforms lowers each branch for all of them, though it runs on
            # its own only.
            rule = functools.partial(_zeros, shapes)
        lowering = mlir.lower_fun(rule, multiple_results=True)
        return lowering(context, *operands, **parameters)

    for platform in ("cpu", "tpu", "cuda", "rocm"):
        lowered_for = "gpu" if platform in ("cuda", "rocm") else platform
        rule = functools.partial(lower, lowered_for)
        mlir.register_lowering(primitive, rule, platform=platform)
    return functools.partial(_bind, primitive)


def _zeros(shapes, *operands, **parameters):
    return [jnp.zeros(each.shape, each.dtype) for each in shapes(*operands, **parameters)]


def _shapes_of_products(rows, sizes, kernel, *others, num_outputs, transposed, **parameters):
    width = kernel.shape[1] if transposed else kernel.shape[2]
    return [jax.core.ShapedArray((rows.shape[0], width), rows.dtype)] * num_outputs


def _products(rows, sizes, *others, platform, num_kernels, num_biases, finish, **parameters):
    kernels, others = others[:num_kernels], others[num_kernels:]
    biases, extras = others[:num_biases], others[num_biases:]
    return _kernels_of(platform).grouped_products(
        rows,
        kernels,
        biases,
        sizes,
        finish=finish,
        extras=extras,
        transposed=parameters["transposed"],
        interpret=parameters["interpret"],
    )


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


_bind_products = _primitive("grouped_products", _shapes_of_products, _products)
_bind_gradients = _primitive("grouped_kernel_gradients", _shapes_of_gradients, _gradients)


def _kernels_of(platform):
    return importlib.import_module(f"{__name__}.{platform}")


@functools.cache
def _has_triton():
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def _num_outputs(function, num_inputs):
    tile = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    return len(jax.eval_shape(function, *[tile] * num_inputs))
