"""Functions in kernels: which run there, and replacements of missing operations."""

import math
import re

import numpy as np
import pytest
from backends import BACKEND, assert_close

if BACKEND != "jax":
    pytest.skip("kernels of JAX", allow_module_level=True)

import jax
import jax.numpy as jnp
import keras

from keras_moe.activations import quick_gelu
from keras_moe.backend.jax_kernels.elementwise import apply_in_kernel, runs_in_kernels
from keras_moe.ops.grouped.steps import Products, feed_forward_step

PLATFORMS = pytest.mark.parametrize("platform", ["gpu", "tpu"])


def replaced(platform, function):
    return lambda x: apply_in_kernel(platform, lambda x: (function(x),), x)[0]


@PLATFORMS
def test_error_functions_are_exact_where_others_cancel(platform):
    x = np.linspace(-6, 6, 2001, dtype="float32")
    erf, erfc = np.vectorize(math.erf)(x), np.vectorize(math.erfc)(x)
    assert_close(replaced(platform, jax.lax.erf)(x), erf, 1, 4e-7)
    np.testing.assert_allclose(replaced(platform, jax.lax.erfc)(x), erfc, rtol=8e-6)
    gelu = replaced(platform, lambda x: jax.nn.gelu(x, approximate=False))(x)
    assert_close(gelu, x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2, 1, 2e-6)
    tiny = np.float32(1e-20)
    assert_close(
        replaced(platform, jax.lax.erf)(tiny) / tiny, 2 / math.sqrt(math.pi), tolerance=1e-6
    )


@PLATFORMS
def test_expm1_is_exact_near_zero_and_far_from_it(platform):
    x = np.float32([-90, -3, -1, -0.3, -1e-6, 0, 1e-20, 1e-4, 0.99, 1, 20, 80])
    np.testing.assert_allclose(
        replaced(platform, jnp.expm1)(x), np.expm1(x.astype("float64")), rtol=1e-5
    )


def test_exponentials_of_a_gpu_are_exact_to_a_part_of_their_argument():
    x = np.linspace(-80, 80, 2001, dtype="float32")
    exact = np.exp(x.astype("float64"))
    np.testing.assert_allclose(replaced("gpu", jnp.exp)(x), exact, rtol=1e-5)
    np.testing.assert_allclose(replaced("gpu", jax.nn.sigmoid)(x), exact / (1 + exact), rtol=1e-5)
    ends = np.float32([-np.inf, -200, 200, np.inf])
    np.testing.assert_array_equal(replaced("gpu", jnp.exp)(ends), [0, 0, np.inf, np.inf])
    np.testing.assert_array_equal(replaced("gpu", jax.nn.sigmoid)(ends), [0, 0, 1, 1])


@PLATFORMS
@pytest.mark.parametrize(
    "function",
    [
        jax.nn.relu,
        jax.nn.relu6,
        jax.lax.erf,
        jax.lax.erfc,
        jax.lax.exp,
        jax.lax.expm1,
        jax.lax.logistic,
        jax.lax.sign,
        lambda x: jnp.minimum(1.0, x),
        lambda x: jnp.maximum(x, 1.0),
    ],
)
def test_nan_is_not_lost(function, platform):
    nan = jnp.float32(jnp.nan)
    assert jnp.isnan(replaced(platform, function)(nan))
    # On a CPU these keep NaN, but not on Triton.
    assert not re.search(
        r"= (max|min|clamp) ", str(jax.make_jaxpr(replaced(platform, function))(nan))
    )


ACTIVATIONS = ("relu", "gelu", "silu", "elu", "selu", "tanh", "sigmoid", "mish", "softplus")


@PLATFORMS
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_keras_and_their_gradients_run_in_kernels(name, platform):
    activation = keras.activations.get(name)

    def both(x, upstream):
        value, pullback = jax.vjp(activation, x)
        return value, *pullback(upstream)

    assert runs_in_kernels(both, 2)
    x, upstream = np.random.default_rng(0).normal(size=(2, 8, 128)).astype("float32")
    for result, expected in zip(apply_in_kernel(platform, both, x, upstream), both(x, upstream)):
        assert_close(result, expected, tolerance=2e-6)


def test_what_is_not_elementwise_runs_outside():
    table = jnp.arange(3.0)
    for function in (
        lambda x: (jax.nn.softmax(x),),
        lambda x: (x.T,),
        lambda x: (jnp.sum(x),),
        lambda x: (jnp.cumsum(x, axis=0),),
        lambda x: (x + jnp.arange(128.0),),
        lambda x: (x + table[1],),
        lambda x: (jax.lax.erf_inv(x),),
        lambda x: (1.0,),
    ):
        assert not runs_in_kernels(function, 1)
    assert runs_in_kernels(lambda x: (x * jnp.float32(2.0),), 1)


def test_the_gate_of_gpt_oss_and_its_gradient_run_in_kernels():
    functions = []

    def multiply(rows, numbers, then):
        functions.append((then, len(numbers)))
        return then(*[rows] * len(numbers))

    def pull(gradient, number, then, *extras):
        functions.append((then, 1 + len(extras)))
        return then(gradient, *extras)

    step = feed_forward_step(quick_gelu, (8, 8, 8), clip=7.0, up_shift=1.0)
    products, rows = Products(multiply, pull), jnp.ones((4, 8))
    _, saved = step.forward(rows, products, True)
    step.backward(rows, products, saved, rows)
    assert len(functions) == 5
    assert all(runs_in_kernels(*each) for each in functions)
