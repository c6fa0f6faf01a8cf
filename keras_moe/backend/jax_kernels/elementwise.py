"""Elementwise functions in kernels, on the tiles that these have just computed."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

# Operations that the compilers of Pallas for TPUs (Mosaic) and GPUs (Triton) take in float32.
TAKEN = frozenset(
    """
    abs add add_any and atan2 broadcast_in_dim ceil convert_element_type cos div eq exp exp2 floor
    ge gt integer_pow is_finite le log log1p logistic lt mul ne neg nextafter not or pow rem rsqrt
    select_n sin sqrt square stop_gradient sub tan tanh xor
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
    """Whether a function of tiles is elementwise, and kernels take its operations."""
    traced = jax.make_jaxpr(function)(*[_TILE] * num_inputs)
    return _is_taken(traced) and all(out.shape == _TILE.shape for out in traced.out_avals)


def apply_in_kernel(platform, function, *tiles):
    """`function(*tiles)` inside a kernel, of operations that the compiler of its platform has."""
    return _evaluate(jax.make_jaxpr(function)(*tiles), tiles, _SUBSTITUTES[platform])


def num_outputs(function, num_inputs):
    """How many tiles a function of tiles returns."""
    return len(jax.eval_shape(function, *[_TILE] * num_inputs))


def unchanged(*tiles):
    """The tiles themselves."""
    return tiles


def split(operands, *counts):
    """Consecutive parts of the operands of a kernel, of the lengths `counts`, and the rest."""
    parts = []
    for count in counts:
        parts.append(operands[:count])
        operands = operands[count:]
    return *parts, operands


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
    return name in (TAKEN | set(_ALWAYS)) and shapes <= {(), _TILE.shape}


def _evaluate(traced, inputs, substitutes):
    values = dict(zip(traced.jaxpr.constvars, map(_as_number, traced.consts)))
    values.update(zip(traced.jaxpr.invars, inputs))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in traced.jaxpr.eqns:
        name, operands = equation.primitive.name, list(map(read, equation.invars))
        if name in _CALLS:
            outputs = _evaluate(equation.params[_CALLS[name]], operands, substitutes)
        elif name in substitutes:
            outputs = [substitutes[name](*operands)]
        else:
            outputs = equation.primitive.bind(*operands, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs))
    return tuple(map(read, traced.jaxpr.outvars))


def _as_number(constant):
    # Kernels take no arrays from outside, but numbers.
    return np.asarray(constant)[()]


def _erf(x):
    """The error function, to 4e-7 of its value: an odd rational function fitted to |x| < 3.95."""
    x = _clamp(-3.95, x, 3.95)
    square = x * x
    above = (2.02577072e-06, 0.000284672955, 0.00380802825, 0.0528750162, 0.191548861, 1.12837914)
    below = (3.782959e-05, 0.00117067092, 0.0150548397, 0.114558807, 0.503088436, 1.0)
    return _clamp(-1.0, x * _polynomial(above, square) / _polynomial(below, square), 1.0)


def _erfc(x, exp=jnp.exp):
    """Its complement, to 4e-6 + 1e-7 x^2 of its value, also where `1 - erf(x)` would be 0."""
    size = jnp.abs(x)
    t = 1.0 / (1.0 + 0.52 * size)
    # erfc(x) exp(x^2) / t as a polynomial of t, fitted to x >= 0.
    factors = (
        *(0.0965855943, -0.347020366, 0.310744190),
        *(0.0814755762, 0.273535972, 0.291207171, 0.293472980),
    )
    # The derivative has the same exponential, and compilers compute it once.
    tail = t * _polynomial(factors, t) * exp(-jnp.square(x))
    return jnp.where(x < 0, 2.0 - tail, tail)


def _expm1(x):
    half = jnp.tanh(0.5 * x)
    # Where both are near 0, their difference would be lost in the 1.
    return jnp.where(jnp.abs(x) < 1.0, 2.0 * half / (1.0 - half), jnp.exp(x) - 1.0)


def _polynomial(factors, x):
    return functools.reduce(lambda value, factor: value * x + factor, factors)


def _max(x, y):
    return jnp.where((x > y) | (x != x), x, y)


def _min(x, y):
    return jnp.where((x < y) | (x != x), x, y)


def _clamp(least, x, most):
    return _min(_max(x, least), most)


def _sign(x):
    return jnp.where(x > 0, 1.0, jnp.where(x < 0, -1.0, x))


def _exp_by_exp2(x):
    """The exponential, to 1e-7 (1 + |x|) of its value."""
    return jnp.exp2(x * 1.44269504)


def _logistic(x):
    return 1.0 / (1.0 + _exp_by_exp2(-x))


# Operations that one of the compilers lacks.
_ALWAYS: dict[str, Callable] = {
    "copy": lambda x: x,
    "erf": _erf,
    "erfc": _erfc,
    "expm1": _expm1,
    "sign": _sign,
    # Triton's own return the other operand where one is NaN.
    "max": _max,
    "min": _min,
    "clamp": _clamp,
}

_SUBSTITUTES: dict[str, dict[str, Callable]] = {
    "tpu": _ALWAYS,
    # A GPU has an instruction for powers of 2; the exponential that Triton calls takes ten.
    "gpu": {
        **_ALWAYS,
        "exp": _exp_by_exp2,
        "logistic": _logistic,
        "erfc": functools.partial(_erfc, exp=_exp_by_exp2),
    },
}
