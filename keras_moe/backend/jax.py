"""JAX primitives."""

import functools

import jax
import jax.numpy as jnp

from keras_moe.backend import jax_derivatives, jax_sharding
from keras_moe.backend.base import (
    StaticBackend,
    is_any_derivative,
    named_platform,
    refuse_second_derivative,
)

PLAIN_VALUES = (bool, int, float, str)
TPU_DTYPES = ("bfloat16", "float32")  # of kernels


class JaxBackend(StaticBackend):
    devices = jax_sharding.JaxDevices()
    sort = staticmethod(jax.lax.sort)

    def needs_static_shapes(self):
        return True

    def platform_of(self, tensor):
        # Not by `jax.lax.platform_dependent`, which traces the program of each platform.
        device = jax.config.jax_default_device
        device = jax.devices(device)[0] if isinstance(device, str) else device
        return named_platform() or getattr(device, "platform", None) or jax.default_backend()

    def run(self, network, problem, platform=None):
        platform = platform or self.platform_of(problem.tokens)
        return run_compiled(super().run, network, platform, is_any_derivative(), problem)

    def jit_when_eager(self, function):
        # JAX would compile each operation alone, for each shape: some hundred programs at the first
        # call of a layer. Each plain value has its own program.

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
            # With its type: True equals 1.
            values = [None if isinstance(x, jax.Array) else (type(x), x) for x in leaves]
            # Tracers are compiled with the rest of their program; scalars may be sizes.
            is_traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
            given = (*args, *kwargs.values())
            has_scalar = any(isinstance(each, jax.Array) and not each.ndim for each in given)
            if is_traced or has_scalar or any(v and v[0] not in PLAIN_VALUES for v in values):
                return function(*args, **kwargs)
            return program(structure, tuple(values), arrays)

        return called

    differentiable = staticmethod(jax_derivatives.differentiable)

    def vjp(self, function, inputs):
        _, pullback, others = jax.vjp(function, *inputs, has_aux=True)
        return others, pullback

    def product(self, rows, kernels, sizes, transposed=False, platform="cpu"):
        if _has_tpu_kernels(platform, rows) and kernels.bits is None:
            return _on_tpu("product", rows, kernels.values, sizes, transposed=transposed)
        return super().product(rows, kernels, sizes, transposed, platform)

    def outer(self, left, right, sizes, dtype, platform="cpu"):
        if _has_tpu_kernels(platform, left):
            return _on_tpu("outer", left, right, sizes, dtype=dtype)
        return super().outer(left, right, sizes, dtype, platform)

    def gather_rows(self, tensor, indices):
        if tensor.shape[0] == 0:
            # There is no valid index, but a loop that never runs is traced all the same.
            return jnp.zeros((*indices.shape, *tensor.shape[1:]), tensor.dtype)
        # By default a program would check each index, and each row for existing.
        return tensor.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)

    def add_at(self, tensor, indices, rows):
        return tensor.at[indices].add(rows, mode="promise_in_bounds", wrap_negative_indices=False)

    def product_over_rows(self, left, right):
        # XLA on CPUs would multiply a matrix that is not transposed in memory, which is slower.
        left = jax.lax.optimization_barrier(jnp.swapaxes(left, -1, -2))
        return jnp.matmul(left, right, preferred_element_type="float32")

    def scan(self, step, carry, xs):
        return jax.lax.scan(step, carry, xs)


# Outside `jit` JAX would compile each loop again at every call.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def run_compiled(run, network, platform, any_derivative, problem):
    """`Backend.run` as a program, one for each platform, and for `any_derivative`."""
    return run(network, problem, platform)


def _has_tpu_kernels(platform, rows):
    """Return True if kernels for TPUs multiply this dtype and number of rows."""
    # The number of rows is a symbol in a program that is exported for batches of any size.
    is_known = isinstance(rows.shape[0], int) and rows.shape[0] > 0
    # Kernels have no derivatives.
    is_called = platform == "tpu" and is_known and not is_any_derivative()
    return is_called and rows.dtype.name in TPU_DTYPES


def _on_tpu(name, *operands, **options):
    """Call a function of `jax_tpu`."""
    from keras_moe.backend import jax_tpu

    function = functools.partial(getattr(jax_tpu, name), **options)
    # A CPU may run what is traced for a TPU.
    by_platform = {"tpu": function, "cpu": functools.partial(function, interpret=True)}
    function = jax.custom_jvp(functools.partial(jax.lax.platform_dependent, **by_platform))
    function.defjvp(refuse_second_derivative)
    return function(*operands)
