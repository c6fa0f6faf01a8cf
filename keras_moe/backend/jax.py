"""JAX primitives."""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_moe.backend import jax_kernels, jax_sharding
from keras_moe.backend.base import Backend

PLAIN_VALUES = (bool, int, float, str)


class JaxBackend(Backend):
    def compiles_static_shapes(self):
        return True

    def current_platform(self):
        return jax.default_backend()

    def on_its_platform(self, function, *operands):
        run_on = {name: functools.partial(function, name) for name in ("cpu", "gpu", "tpu")}
        return jax.lax.platform_dependent(
            *operands,
            tpu=run_on["tpu"],
            cuda=run_on["gpu"],
            rocm=run_on["gpu"],
            default=run_on["cpu"],
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

    def differentiable(self, forward, backward, inputs, context, plain=None):
        plain = plain or (lambda inputs, context: forward(inputs, context, keep=False)[0])

        def plain_gradient(inputs, context, upstream):
            _, pullback = jax.vjp(lambda inputs: plain(inputs, context), inputs)
            return pullback(upstream)[0]

        @jax.custom_vjp
        def function(inputs, context):
            return forward(inputs, context, keep=False)[0]

        def function_forward(inputs, context):
            output, saved = forward(*jax.lax.stop_gradient((inputs, context)), keep=True)
            return _derived_from(plain, output, inputs, context), (inputs, context, saved)

        def function_backward(residuals, upstream):
            gradient = backward(*jax.lax.stop_gradient((*residuals, upstream)))
            inputs, context, _ = residuals
            return _derived_from(plain_gradient, gradient, inputs, context, upstream), None

        function.defvjp(function_forward, function_backward)
        return function(inputs, context)

    def vjp(self, function, inputs):
        return jax.vjp(function, *inputs)

    def gather_rows(self, tensor, indices):
        if tensor.shape[0] == 0:
            # There is no valid index, but a loop that never runs is traced all the same.
            return jnp.zeros((*indices.shape, *tensor.shape[1:]), tensor.dtype)
        # Otherwise the program would ask of each index whether it is negative, and of each row
        # whether it exists.
        return tensor.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)

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
        # By default a program would ask of each index whether it is negative.
        return jax.lax.dynamic_slice(tensor, start, shape, allow_negative_indices=False)

    def update_at(self, tensor, start, part):
        return jax.lax.dynamic_update_slice(tensor, part, start, allow_negative_indices=False)

    def scan(self, step, carry, xs):
        return jax.lax.scan(step, carry, xs)

    def batched_product(self, left, right):
        return jnp.matmul(left, right, preferred_element_type=jnp.float32)

    token_shards = staticmethod(jax_sharding.token_shards)
    mesh_axis = staticmethod(jax_sharding.mesh_axis)


def _derived_from(plain, values, *operands):
    """`values`, which are `plain(*operands)` and have the derivatives of that.

    A primitive: the rule of a `custom_jvp` gets lost where JAX splits the body of a loop.
    """
    values, structure = jax.tree.flatten(values)
    operands, structure_of_operands = jax.tree.flatten(operands)

    def flat(*operands):
        return jax.tree.leaves(plain(*jax.tree.unflatten(structure_of_operands, operands)))

    derived = _derived.bind(*values, *operands, plain=flat, number=len(values))
    return jax.tree.unflatten(structure, derived)


def _derivative(arguments, tangents, plain, number):
    operands, tangents = arguments[number:], tangents[number:]
    moving = [place for place, each in enumerate(tangents) if not isinstance(each, ad.Zero)]

    def of_moving(*some):
        varied = dict(zip(moving, some))
        return plain(*(varied.get(place, each) for place, each in enumerate(operands)))

    some, tangents = [operands[place] for place in moving], [tangents[place] for place in moving]
    values = _derived.bind(*arguments, plain=plain, number=number)
    return values, jax.jvp(of_moving, some, tangents)[1]


def _batched(arguments, axes, plain, number):
    size = next(each.shape[axis] for each, axis in zip(arguments, axes) if axis is not None)
    arguments = [batching.bdim_at_front(*each, size) for each in zip(arguments, axes)]
    return _derived.bind(*arguments, plain=jax.vmap(plain), number=number), [0] * number


def _values(*arguments, plain, number):
    return arguments[:number]


_derived = Primitive("derived")
_derived.multiple_results = True
_derived.def_impl(_values)
_derived.def_abstract_eval(_values)
mlir.register_lowering(_derived, mlir.lower_fun(_values))
ad.primitive_jvps[_derived] = _derivative
batching.primitive_batchers[_derived] = _batched
