"""JAX primitives."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax.sharding import PartitionSpec

from keras_moe.backend import jax_kernels
from keras_moe.backend.base import Backend

PLAIN_VALUES = (bool, int, float, str)


class JaxBackend(Backend):
    def compiles_static_shapes(self):
        return True

    def current_platform(self):
        return jax.default_backend()

    def on_its_platform(self, functions, *operands):
        return jax.lax.platform_dependent(
            *operands,
            tpu=functions["tpu"],
            cuda=functions["gpu"],
            rocm=functions["gpu"],
            default=functions["cpu"],
        )

    def compile_once(self, function):
        # Outside `jit` JAX would compile each loop in it again at every call.
        return jax.jit(function, static_argnums=0)

    def trace_once(self, function):
        # JAX traces the backward pass of a conditional's branch twice.
        return jax.jit(function, inline=True)

    def as_one_program(self, function):
        # JAX would compile each operation alone, for each shape: some hundred programs at the first
        # call of a layer. Each plain value has a program of its own.

        @functools.partial(jax.jit, static_argnums=(0, 1))
        def program(structure, values, arrays):
            arrays = iter(arrays)
            leaves = [next(arrays) if value is None else value[1] for value in values]
            args, kwargs = jax.tree.unflatten(structure, leaves)
            return function(*args, **kwargs)

        @functools.wraps(function)
        def called(*args, **kwargs):
            leaves, structure = jax.tree.flatten((args, kwargs))
            is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
            arrays = [leaf for leaf, is_one in zip(leaves, is_array) if is_one]
            others = [leaf for leaf, is_one in zip(leaves, is_array) if not is_one]
            # Tracers are those of a program or a gradient already; scalars may be sizes.
            is_traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
            has_scalar = any(
                isinstance(each, jax.Array) and not each.ndim for each in (*args, *kwargs.values())
            )
            if is_traced or has_scalar or any(type(each) not in PLAIN_VALUES for each in others):
                return function(*args, **kwargs)
            # With its type: True equals 1.
            values = (None if is_one else (type(x), x) for is_one, x in zip(is_array, leaves))
            return program(structure, tuple(values), arrays)

        return called

    def differentiable(self, forward, backward, inputs, context):
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

    def vjp(self, function, inputs):
        return jax.vjp(function, *inputs)

    def gather_rows(self, tensor, indices):
        if tensor.shape[0] == 0:
            # There is no valid index, but a loop that never runs is traced all the same.
            return jnp.zeros((*indices.shape, *tensor.shape[1:]), tensor.dtype)
        # Without the promise XLA clamps and masks every row.
        return tensor.at[indices].get(mode="promise_in_bounds")

    def sort(self, integers):
        return jax.lax.sort(integers)

    def has_grouped_products(self, platform, dtype, widths):
        return jax_kernels.supports(platform, dtype)

    grouped_products = staticmethod(jax_kernels.grouped_products)
    grouped_kernel_gradients = staticmethod(jax_kernels.grouped_kernel_gradients)

    def remakes_factors(self, platform):
        # A TPU kernel reads each left factor about once. One of a GPU reads it for every tile of
        # the other axis, and would compute the function as often.
        return platform == "tpu"

    def slice_at(self, tensor, start, shape):
        return jax.lax.dynamic_slice(tensor, start, shape)

    def scan(self, step, carry, xs):
        return jax.lax.scan(step, carry, xs)

    def batched_product(self, left, right):
        return jnp.matmul(left, right, preferred_element_type=jnp.float32)

    def token_shards(self):
        distribution = keras.distribution.distribution()
        if distribution is None or distribution.device_mesh.devices.size == 1:
            return None
        axes = getattr(distribution, "token_axes", (distribution.batch_dim_name,))
        return Shards(distribution.device_mesh.backend_mesh, tuple(axes))

    def mesh_axis(self, variable):
        mesh = keras.distribution.distribution().device_mesh.backend_mesh
        layout = getattr(variable, "_layout", None)
        if layout is None or layout.device_mesh.backend_mesh != mesh:
            raise ValueError(
                "The distribution must be set before a layer is built: it decides where weights "
                f"are. Received: {variable.path!r}, made "
                f"{'before' if layout is None else 'under another one'}. Call "
                "`keras.distribution.set_distribution(...)` first, then make the model or load it."
            )
        return layout.axes[0]

    def on_each_device(self, shards, function, arguments, axes):
        mapped = jax.shard_map(
            function,
            mesh=shards.mesh,
            in_specs=tuple(map(PartitionSpec, axes)),
            out_specs=PartitionSpec(shards.axes),
            # Loops begin with zeros, which are the same everywhere, and continue with what is not.
            check_vma=False,
        )
        return mapped(*arguments)

    def gather_shards(self, tensor, axis):
        return jax.lax.all_gather(tensor, axis, tiled=True)

    def sum_and_scatter(self, tensor, axis):
        return jax.lax.psum_scatter(tensor, axis, tiled=True)

    def sum_over_axis(self, tensor, axis):
        return jax.lax.psum(tensor, axis)

    def max_over_axis(self, tensor, axis):
        return jax.lax.pmax(tensor, axis)

    def place_on_axis(self, axis):
        return jax.lax.axis_index(axis)

    def exchange(self, tensor, axis):
        return jax.lax.all_to_all(tensor, axis, split_axis=0, concat_axis=0, tiled=True)


class Shards(NamedTuple):
    """The axes of a mesh that tokens are spread over, in this order.

    Hashable, so that what is compiled for one mesh serves again.
    """

    mesh: Any
    axes: tuple

    @property
    def number(self):
        """How many parts the batch is split into."""
        return math.prod(map(self.along, self.axes))

    @property
    def platform(self):
        """That of the devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    def along(self, axis):
        """How many devices there are along an axis."""
        return self.mesh.shape[axis]
