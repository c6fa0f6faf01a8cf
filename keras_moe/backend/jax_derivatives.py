"""Functions with a custom backward pass and derivatives of any order, on JAX.

`jax.custom_vjp` refuses forward mode. Here the tangent is a primitive: its evaluation
differentiates a reference, and its transpose is the given backward pass.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def differentiable(forward, backward, inputs, context, reference=None):
    """See `Backend.differentiable`."""
    reference = reference or (lambda inputs, context: forward(inputs, context, save=False)[0])
    context = jax.lax.stop_gradient(context)
    # JAX traces the backward pass of a conditional's branch twice.
    backward = jax.jit(backward, inline=True)

    # The context is an argument: the rule may run in another trace than this one.
    @jax.custom_jvp
    def function(inputs, context):
        return forward(inputs, context, save=False)[0]

    @function.defjvp
    def derivative(primals, tangents):
        (inputs, context), (tangent, _) = primals, tangents
        output, saved = forward(*jax.lax.stop_gradient(primals), save=True)
        output = _derived_from(reference, output, inputs, context)
        return output, _tangent(backward, reference, output, inputs, context, saved, tangent)

    return function(inputs, context)


def _tangent(backward, reference, output, inputs, context, saved, tangent):
    primals, structure = jax.tree.flatten((inputs, context, saved))
    tangents, structure_of_tangents = jax.tree.flatten(tangent)

    def compute(*operands):
        inputs, context, _ = jax.tree.unflatten(structure, operands[: len(primals)])
        tangent = jax.tree.unflatten(structure_of_tangents, operands[len(primals) :])
        return jax.jvp(lambda inputs: reference(inputs, context), (inputs,), (tangent,))[1]

    def reference_gradient(inputs, context, upstream):
        _, pullback = jax.vjp(lambda inputs: reference(inputs, context), inputs)
        return pullback(upstream)[0]

    def transpose(upstream, *operands):
        residuals = jax.tree.unflatten(structure, operands[: len(primals)])
        gradient = backward(*jax.lax.stop_gradient((*residuals, upstream)))
        inputs, context, _ = residuals
        return jax.tree.leaves(
            _derived_from(reference_gradient, gradient, inputs, context, upstream)
        )

    shape = jax.core.ShapedArray(output.shape, output.dtype)
    return _tangent_p.bind(
        *primals, *tangents, compute=compute, transpose=transpose, number=len(primals), shape=shape
    )


def _evaluate(*operands, compute, **parameters):
    return compute(*operands)


def _transposed(upstream, *operands, transpose, number, **parameters):
    if isinstance(upstream, ad.Zero):
        return [None] * len(operands)
    return [None] * number + transpose(upstream, *operands)


def _second(operands, tangents, compute, **parameters):
    value = _tangent_p.bind(*operands, compute=compute, **parameters)
    return value, _jvp(compute, operands, tangents)


def _jvp(function, operands, tangents):
    """Return the jvp of a function of arrays; some tangents may be symbolic zeros."""
    moving = [place for place, each in enumerate(tangents) if not isinstance(each, ad.Zero)]

    def of_moving(*some):
        varied = dict(zip(moving, some))
        return function(*(varied.get(place, each) for place, each in enumerate(operands)))

    some, tangents = [operands[place] for place in moving], [tangents[place] for place in moving]
    return jax.jvp(of_moving, some, tangents)[1]


def _batched_tangent(operands, axes, compute, **parameters):
    return jax.vmap(compute, axes)(*operands), 0


_tangent_p = Primitive("tangent")
_tangent_p.def_impl(_evaluate)
_tangent_p.def_abstract_eval(lambda *operands, shape, **parameters: shape)
mlir.register_lowering(_tangent_p, mlir.lower_fun(_evaluate, multiple_results=False))
ad.primitive_transposes[_tangent_p] = _transposed
ad.primitive_jvps[_tangent_p] = _second
batching.primitive_batchers[_tangent_p] = _batched_tangent


def _derived_from(reference, values, *operands):
    """Return `values`, equal to `reference(*operands)`, with the derivatives of the reference.

    This is a primitive, because JAX loses the rule of a `custom_jvp` when it splits a loop body.
    """
    values, structure = jax.tree.flatten(values)
    operands, structure_of_operands = jax.tree.flatten(operands)

    def flat(*operands):
        return jax.tree.leaves(reference(*jax.tree.unflatten(structure_of_operands, operands)))

    derived = _derived_p.bind(*values, *operands, function=flat, number=len(values))
    return jax.tree.unflatten(structure, derived)


def _derivative(arguments, tangents, function, number):
    values = _derived_p.bind(*arguments, function=function, number=number)
    return values, _jvp(function, arguments[number:], tangents[number:])


def _batched_values(arguments, axes, function, number):
    size = next(each.shape[axis] for each, axis in zip(arguments, axes) if axis is not None)
    arguments = [batching.bdim_at_front(*each, size) for each in zip(arguments, axes)]
    return _derived_p.bind(*arguments, function=jax.vmap(function), number=number), [0] * number


def _values(*arguments, function, number):
    return arguments[:number]


_derived_p = Primitive("derived")
_derived_p.multiple_results = True
_derived_p.def_impl(_values)
_derived_p.def_abstract_eval(_values)
mlir.register_lowering(_derived_p, mlir.lower_fun(_values))
ad.primitive_jvps[_derived_p] = _derivative
batching.primitive_batchers[_derived_p] = _batched_values
