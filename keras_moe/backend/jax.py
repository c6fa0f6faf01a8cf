"""JAX primitives."""

import functools

import jax
import jax.numpy as jnp

from keras_moe.backend import jax_kernels
from keras_moe.backend.one_hot import count_integers as count_integers
from keras_moe.backend.one_hot import take_columns as take_columns

PLAIN_VALUES = (bool, int, float, str)


def compiles_static_shapes():
    """JAX fixes every shape, traced or not."""
    return True


def current_platform():
    """The platform of JAX's default device: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def on_its_platform(function, *operands):
    """`function(platform, *operands)` for the platform that is lowered for.

    It is traced for all platforms, and compiled for one.
    """
    run_on = {name: functools.partial(function, name) for name in ("cpu", "gpu", "tpu")}
    return jax.lax.platform_dependent(
        *operands,
        tpu=run_on["tpu"],
        cuda=run_on["gpu"],
        rocm=run_on["gpu"],
        default=run_on["cpu"],
    )


def differentiable(forward, backward, inputs, context):
    """The output of `forward`, whose gradient for `inputs` is computed by `backward`.

    `forward(inputs, context, keep)` returns `(output, saved)`; where `keep` is False, there is no
    backward pass, and nothing need be saved. `backward(inputs, context, saved, gradient)` returns
    gradients in the structure of `inputs`. `inputs` and `context` are structures of tensors; those
    of `context` have no gradient.
    """

    @jax.custom_vjp
    def function(inputs, context):
        return forward(inputs, context, keep=False)[0]

    def function_forward(inputs, context):
        output, saved = forward(inputs, context, keep=True)
        return output, (inputs, context, saved)

    def function_backward(residuals, upstream):
        return backward(*residuals, upstream), None

    function.defvjp(function_forward, function_backward)
    return function(inputs, context)


def compile_once(function):
    """The function, compiled for each first argument, which must be hashable, and for all shapes.

    Outside of `jit` JAX would compile each loop in it again at every call.
    """
    return jax.jit(function, static_argnums=0)


def trace_once(function):
    """The function, whose trace is kept for arguments of equal shapes, and put in line.

    JAX traces the backward pass of a conditional's branch twice.
    """
    return jax.jit(function, inline=True)


def as_one_program(function):
    """The function, compiled as a whole where it is called with arrays and `PLAIN_VALUES`.

    JAX would compile each of its operations alone, for each shape: some hundred programs at the
    first call of a layer. Each plain value has a program of its own, so none should change from
    step to step. The function must depend on its arguments only, not on a scope or `floatx`. With
    tracers, of a program or of a gradient, it is just called, and with scalars, which may be sizes.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def program(structure, values, arrays):
        arrays = iter(arrays)
        leaves = [next(arrays) if value is None else value[1] for value in values]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return function(*args, **kwargs)

    @functools.wraps(function)
    def called(*args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        others = [leaf for leaf in leaves if not isinstance(leaf, jax.Array)]
        is_traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
        has_scalar = any(
            isinstance(value, jax.Array) and not value.ndim for value in (*args, *kwargs.values())
        )
        is_plain = all(type(value) in PLAIN_VALUES for value in others)
        if is_traced or has_scalar or not is_plain:
            return function(*args, **kwargs)
        # With its type: True equals 1.
        values = (None if isinstance(leaf, jax.Array) else (type(leaf), leaf) for leaf in leaves)
        return program(structure, tuple(values), arrays)

    return called


def vjp(function, inputs):
    """`function(*inputs)` and its pullback, for functions of tensors only."""
    return jax.vjp(function, *inputs)


def gather_rows(tensor, indices):
    """Rows of `tensor` (R, ...) at integer `indices` of any shape."""
    if tensor.shape[0] == 0:
        # There is no valid index, but a loop that never runs is traced all the same.
        return jnp.zeros((*indices.shape, *tensor.shape[1:]), tensor.dtype)
    # The callers promise valid indices: without the promise XLA clamps and masks every row.
    return tensor.at[indices].get(mode="promise_in_bounds")


def argmax(scores):
    """Where the largest of the last axis is, int32; the first of equals."""
    # Under XLA two plain reductions are several times as fast as one of pairs.
    best = jnp.max(scores, axis=-1, keepdims=True)
    number = scores.shape[-1]
    places = jnp.arange(number, dtype="int32")
    return jnp.min(jnp.where(scores >= best, places, number), axis=-1)


def has_grouped_products(platform, dtype, widths):
    """Whether there are Pallas kernels for the platform and the dtype; they take any widths."""
    return jax_kernels.supports(platform, dtype)


grouped_products = jax_kernels.grouped_products
grouped_kernel_gradients = jax_kernels.grouped_kernel_gradients
remakes_factors = jax_kernels.remakes_factors


def batched_product(left, right):
    """(N, D, H) float32, of (N, D, B) and (N, B, H) of any float dtype."""
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def slice_at(tensor, start, shape):
    """The part of `tensor` of a static `shape` that begins at the indices `start`."""
    return jax.lax.dynamic_slice(tensor, start, shape)


def scan(step, carry, xs):
    """`carry, y = step(carry, x)` along the first axis of `xs`: the last carry and all `y`."""
    return jax.lax.scan(step, carry, xs)


def lacks_stable_sort():
    """Whether equals are sorted in any order."""
    return False


def sort(integers):
    """A vector of integers in ascending order."""
    return jax.lax.sort(integers)


def sum_over_replicas(values):
    """`values`: under `keras.distribution` arrays are global, and so are all sums over them."""
    return values
