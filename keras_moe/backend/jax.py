"""JAX primitives."""

import jax
import jax.numpy as jnp


def compiles_static_shapes():
    """JAX fixes every shape, traced or not."""
    return True


def differentiable(forward, backward, inputs, context):
    """The output of `forward`, whose gradient for `inputs` is computed by `backward`.

    `forward(inputs, context, keep)` returns `(output, saved)`; where `keep` is False, nobody needs
    what is saved. `backward(inputs, context, saved, gradient)` returns one gradient for each input.
    `context` holds integer tensors, which have no gradient.
    """

    @jax.custom_vjp
    def function(inputs, context):
        return forward(inputs, context, keep=False)[0]

    def function_forward(inputs, context):
        output, saved = forward(inputs, context, keep=True)
        return output, (inputs, context, saved)

    def function_backward(residuals, upstream):
        return tuple(backward(*residuals, upstream)), None

    function.defvjp(function_forward, function_backward)
    return function(tuple(inputs), tuple(context))


def compile_once(function):
    """The function, compiled for each first argument, which must be hashable, and for all shapes.

    Outside of `jit` JAX would compile each loop in it again at every call.
    """
    return jax.jit(function, static_argnums=0)


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


def block_dtype(dtype):
    """What blocks of rows of a `dtype` are computed in, a string.

    For products of narrow floats XLA on CPUs converts each operand to float32, and rounds each
    result. So all of a block is computed in float32 there, at least. The device is that of the
    process, as nothing tells for which one a function is traced.
    """
    on_cpu = jax.default_backend() == "cpu"
    return str(jnp.promote_types(dtype, jnp.float32) if on_cpu else jnp.dtype(dtype))


def slice_at(tensor, start, shape):
    """The part of `tensor` of a static `shape` that begins at the indices `start`."""
    return jax.lax.dynamic_slice(tensor, start, shape)


def scan(step, carry, xs):
    """`carry, y = step(carry, x)` along the first axis of `xs`: the last carry and all `y`."""
    return jax.lax.scan(step, carry, xs)


def sort(integers):
    """A vector of integers in ascending order."""
    return jax.lax.sort(integers)


def sum_over_replicas(values):
    """`values`: under `keras.distribution` arrays are global, and so are all sums over them."""
    return values
