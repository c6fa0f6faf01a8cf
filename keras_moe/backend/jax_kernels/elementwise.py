"""Which functions can run inside a kernel, on the tiles that it has just computed."""

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

# What the compilers of Pallas for TPU (Mosaic) and for GPU (Triton) both take in float32.
_TAKEN = frozenset(
    """
    abs add add_any and broadcast_in_dim ceil convert_element_type cos div eq exp exp2 expm1
    floor ge gt integer_pow le log log1p logistic lt max min mul ne neg not or pow rsqrt select_n
    sign sin sqrt square stop_gradient sub tan tanh
    """.split()
)
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_TILE = jax.ShapeDtypeStruct((8, 128), jnp.float32)


def runs_in_kernels(function, num_inputs):
    """Whether a function of tiles is elementwise and made of operations that kernels take."""
    traced = jax.make_jaxpr(function)(*[_TILE] * num_inputs)
    return _is_taken(traced) and all(out.shape == _TILE.shape for out in traced.out_avals)


def apply_in_kernel(function, *tiles):
    """`function(*tiles)` inside a kernel, with what its compiler lacks made of what it has."""
    return _evaluate(jax.make_jaxpr(function)(*tiles), tiles)


def _is_taken(traced):
    return all(
        jnp.shape(constant) == () and not isinstance(constant, jax.core.Tracer)
        for constant in traced.consts
    ) and all(map(_is_equation_taken, traced.jaxpr.eqns))


def _is_equation_taken(equation):
    name = equation.primitive.name
    if name in _CALLS:
        return _is_taken(equation.params[_CALLS[name]])
    if name == "broadcast_in_dim" and equation.invars[0].aval.shape != ():
        return False
    shapes = {atom.aval.shape for atom in (*equation.invars, *equation.outvars)}
    return name in (_TAKEN | set(_REPLACED)) and shapes <= {(), _TILE.shape}


def _evaluate(traced, inputs):
    values = dict(zip(traced.jaxpr.constvars, map(_as_number, traced.consts)))
    values.update(zip(traced.jaxpr.invars, inputs))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in traced.jaxpr.eqns:
        name, operands = equation.primitive.name, list(map(read, equation.invars))
        if name in _CALLS:
            outputs = _evaluate(equation.params[_CALLS[name]], operands)
        elif name in _REPLACED:
            outputs = [_REPLACED[name](*operands)]
        else:
            outputs = equation.primitive.bind(*operands, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs))
    return tuple(map(read, traced.jaxpr.outvars))


def _as_number(constant):
    # Kernels take no arrays from outside, but numbers.
    return constant.item()


# log(erfc(x) exp(x^2) / t) as a polynomial of t = 1 / (1 + x / 2), fitted to x >= 0. In float32
# erfc comes out within 4e-7.
_ERFC = (
    -1.2655122,
    1.0000245,
    0.37407739,
    0.096900571,
    -0.18679171,
    0.2801485,
    -1.1371715,
    1.4903126,
    -0.82304955,
    0.17106147,
)


def _erfc(x):
    size = jnp.abs(x)
    t = 1.0 / (1.0 + 0.5 * size)
    polynomial = jnp.zeros_like(t)
    for coefficient in reversed(_ERFC):
        polynomial = polynomial * t + coefficient
    tail = t * jnp.exp(polynomial - size * size)
    return jnp.where(x < 0, 2.0 - tail, tail)


def _erf(x):
    return 1.0 - _erfc(x)


def _copy(x):
    return x


_REPLACED = {"copy": _copy, "erf": _erf, "erfc": _erfc}
