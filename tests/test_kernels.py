"""The grouped kernels of GPUs and TPUs, interpreted on a CPU, against a loop in float64."""

import contextlib
import math
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from backends import BACKEND, assert_close

if BACKEND != "jax":
    pytest.skip("kernels of JAX", allow_module_level=True)

import jax
import jax.numpy as jnp
import keras

from keras_moe.activations import quick_gelu
from keras_moe.backend.jax_kernels import elementwise, gpu, tpu, tpu_tiles
from keras_moe.backend.jax_kernels.elementwise import apply_in_kernel, runs_in_kernels
from keras_moe.backend.jax_kernels.tpu_tiles import Chip, Tiles
from keras_moe.ops.grouped.steps import Products, feed_forward_step

DTYPES = ("float32", "bfloat16", "float16")
# Of the largest entry: inputs are rounded before the oracle sees them, results once.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
# Tiles so small that few rows and narrow axes need many of them, with strips, borders, chunks, and
# an axis of 20 or 24 that is cut into tiles of 8 or 16.
SMALL = Tiles(16, depth=8, columns=16, strip=8, border=4, depth_chunk=4, column_chunk=8)
# The depth in one tile, as the kernels have it wherever it fits.
DEEP = Tiles(16, depth=20, columns=16, strip=8, border=4, depth_chunk=20, column_chunk=8)
CHIPS = (Chip(16 * 2**20, 2), Chip(64 * 2**20, 1), Chip(64 * 2**20, 2))
# Each example compiles a program: to shrink one that fails would take minutes.
FEW = hypothesis.settings(max_examples=5, phases=[hypothesis.Phase.generate])


@st.composite
def cases(draw, module):
    """Sizes of groups, some empty or longer than a tile, the number of all rows, and axes."""
    sizes = draw(st.lists(st.sampled_from((0, 0, 1, 5, 8, 16, 40, 140)), min_size=1, max_size=5))
    num_rows = max(sum(sizes) + draw(st.sampled_from((0, 1, 21))), 1)
    dtypes, axes = st.sampled_from(DTYPES[:2]), (st.just(20), st.sampled_from((16, 24)))
    if module is gpu:
        # Narrower than a tile, not a multiple of any, just above one, exactly one.
        dtypes, axes = st.sampled_from(DTYPES), [st.sampled_from((1, 3, 5, 48, 128, 130))] * 2
    return (sizes, num_rows), *map(draw, (*axes, dtypes, dtypes))


def floats(seed, shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def padded(seed, layout, width, dtype):
    """Rows of which those after the last group are NaN and infinite."""
    sizes, num_rows = layout
    values = floats(seed, (num_rows, width), dtype)
    return values.at[sum(sizes) :].set(jnp.where(jnp.arange(width) % 2, jnp.inf, jnp.nan))


def exact(tensor):
    return np.asarray(jnp.asarray(tensor, "float32"), "float64")


def spans(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends)]


def product(rows, kernel, bias, sizes):
    """The product of all rows of groups with one kernel, in float64."""
    rows, kernel, bias = exact(rows), exact(jnp.asarray(kernel, rows.dtype)), exact(bias)
    return np.concatenate([rows[s] @ kernel[e] + bias[e] for e, s in enumerate(spans(sizes))])


def two_of_three(first, second, extra):
    """Two kernels and one extra, three outputs."""
    return first * jax.nn.sigmoid(second), extra - second, jnp.maximum(first, extra)


def check_products(module, layout, depth, width, dtype, kernel_dtype, transposed, with_bias):
    sizes, num_rows = layout
    live, num_groups = sum(sizes), len(sizes)
    rows, extra = padded(0, layout, depth, dtype), padded(1, layout, width, dtype)
    kernels = [floats(seed, (num_groups, depth, width), kernel_dtype) for seed in (2, 3)]
    biases = [floats(seed, (num_groups, width), kernel_dtype) for seed in (4, 5)]

    @jax.jit
    def compute(rows, kernels, biases, sizes, extra):
        return module.grouped_products(
            rows,
            [jnp.swapaxes(kernel, 1, 2) for kernel in kernels] if transposed else kernels,
            biases if with_bias else (),
            sizes,
            transposed=transposed,
            finish=two_of_three,
            extras=(extra,),
            interpret=True,
        )

    results = compute(rows, kernels, biases, jnp.asarray(sizes, "int32"), extra)
    biases = [with_bias * exact(bias) for bias in biases]
    first, second = (product(rows, *pair, sizes) for pair in zip(kernels, biases))
    other = exact(extra)[:live]
    expected = first / (1 + np.exp(-second)), other - second, np.maximum(first, other)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected):
        assert result.shape == (num_rows, width) and result.dtype == dtype
        assert_close(exact(result)[:live], wanted, tolerance=TOLERANCE[dtype])


def check_gradient(module, layout, depth, width, dtype, result_dtype, with_bias):
    sizes = layout[0]
    left, right = padded(0, layout, depth, dtype), padded(1, layout, width, dtype)

    @jax.jit
    def compute(left, right, sizes):
        return module.grouped_kernel_gradient(
            left, right, sizes, dtype=result_dtype, with_bias=with_bias, interpret=True
        )

    results = compute(left, right, jnp.asarray(sizes, "int32"))
    left, right = exact(left), exact(right)
    expected = [np.stack([left[s].T @ right[s] for s in spans(sizes)])]
    if with_bias:
        expected.append(np.stack([np.sum(right[s], axis=0) for s in spans(sizes)]))
    else:
        assert results[1] is None
    for result, wanted in zip(results, expected):
        assert result.dtype == result_dtype
        assert not np.any(exact(result)[np.equal(sizes, 0)])
        assert_close(exact(result), wanted, tolerance=TOLERANCE[result_dtype])


@contextlib.contextmanager
def tiles(module, deep):
    with pytest.MonkeyPatch.context() as patch:
        if module is tpu:
            patch.setattr(tpu, "product_tiles", lambda *_, **__: DEEP if deep else SMALL)
            patch.setattr(tpu, "gradient_tiles", lambda *_, **__: SMALL)
        yield


MODULES = pytest.mark.parametrize("module", [gpu, tpu], ids=["gpu", "tpu"])


@MODULES
@FEW
@hypothesis.given(data=st.data(), transposed=..., with_bias=..., deep=...)
def test_products(module, data, transposed: bool, with_bias: bool, deep: bool):
    with tiles(module, deep):
        check_products(module, *data.draw(cases(module)), transposed, with_bias)


@MODULES
@FEW
@hypothesis.given(data=st.data(), with_bias=...)
def test_kernel_gradient(module, data, with_bias: bool):
    with tiles(module, deep=False):
        check_gradient(module, *data.draw(cases(module)), with_bias)


# One row; no row served; groups that begin and end in tiles, several in each direction.
@pytest.mark.parametrize("layout", [([1], 1), ([0, 0], 5), ([0, 300, 1, 0, 260], 600)], ids=str)
@MODULES
def test_extremes(module, layout):
    """With the tiles of a chip."""
    products = ("bfloat16", "float32", True) if module is gpu else ("float32", "bfloat16", False)
    check_products(module, layout, 5, 130, *products, with_bias=True)
    check_gradient(module, layout, 70, 130, "bfloat16", "float32", with_bias=True)


@MODULES
def test_products_alone_in_full_precision(module):
    rows, kernel, sizes = (
        floats(0, (80, 300), "float32"),
        floats(1, (2, 300, 5), "float32"),
        [70, 9],
    )

    def compute(rows, kernel, sizes):
        return module.grouped_products(rows, [kernel], (), sizes, interpret=True)

    inputs = rows, kernel, jnp.asarray(sizes, "int32")
    [actual] = jax.jit(compute)(*inputs)
    assert_close(actual[:79], product(rows, kernel, jnp.zeros((2, 5)), sizes), tolerance=1e-6)
    if module is gpu:
        # Nothing is written where a tile overruns its group: another program may have been faster.
        assert np.all(np.isnan(actual[79]))

    # CPUs multiply float32 as it is, whatever they are told. Others do not.
    def gradient(rows, kernel, sizes):
        return module.grouped_kernel_gradient(rows, rows, sizes, dtype="bfloat16")

    for function in (compute, gradient):
        assert "HIGHEST" in str(jax.make_jaxpr(function)(*inputs))


def test_tiles_fit_into_the_shared_memory_of_small_gpus():
    sizes = (1, 100, 20000)
    for shape in [(r, d, h, e) for r in sizes for d in sizes for h in sizes for e in (1, 8, 300)]:
        for dtype in map(jnp.dtype, DTYPES):
            tile = gpu._gradient_tile(shape, dtype)
            stage = tile.depth * (tile.rows + tile.columns) * dtype.itemsize
            assert tile.stages * stage <= 96 * 1024
            for stored in map(jnp.dtype, ("float64", *DTYPES)):
                for kernels in (1, 2, 3):
                    tile = gpu._product_tile(shape, dtype, stored, kernels, 1)
                    part = tile.depth * tile.columns * kernels
                    stage = tile.depth * tile.rows * dtype.itemsize + part * stored.itemsize
                    # Converted kernels are one tile more.
                    converted = part * dtype.itemsize * (stored != dtype)
                    assert tile.stages * stage + converted <= 96 * 1024


def test_kernels_are_converted_inside():
    """No array of a whole kernel but the ones that are given."""
    rows, kernel = jnp.ones((8, 16), "bfloat16"), jnp.ones((2, 16, 32), "float32")
    jaxpr = jax.make_jaxpr(gpu.grouped_products)(rows, [kernel], [], jnp.ones(2, "int32"))
    shapes = [variable.aval.shape for eqn in jaxpr.eqns for variable in eqn.outvars]
    assert (8, 32) in shapes and kernel.shape not in shapes


def test_operations_lower_to_triton():
    """Each of `elementwise.TAKEN`, and activations with their derivatives."""
    special = {
        "add_any": lambda x, y: jax.vjp(lambda x: x * y + jnp.sin(x), x)[1](y)[0],
        "and": lambda x, y: jnp.where((x > 0) & (y > 0), x, y),
        "broadcast_in_dim": lambda x, y: x + jnp.ones_like(y),
        "convert_element_type": lambda x, y: x.astype("bfloat16").astype("float32"),
        "integer_pow": lambda x, y: x**3 + y**-2,
        "not": lambda x, y: jnp.where(~(x > 0), x, y),
        "or": lambda x, y: jnp.where((x > 0) | (y > 0), x, y),
        "select_n": lambda x, y: jnp.where(x > 0, x, y),
        "stop_gradient": lambda x, y: jax.lax.stop_gradient(x),
        "xor": lambda x, y: jnp.where((x > 0) ^ (y > 0), x, y),
    }
    binary = set("add atan2 div eq ge gt le lt mul ne nextafter pow rem sub".split())

    def everything(x, y):
        results = [function(x, y) for function in special.values()]
        for name in elementwise.TAKEN - special.keys():
            results.append(getattr(jax.lax, name)(*(x, y)[: 1 + (name in binary)]))
        for name in ("gelu", "silu", "elu", "softplus", "mish", "relu6"):
            activation = getattr(jax.nn, name)
            results += elementwise.apply_in_kernel("gpu", derivative(activation), x, y)
        return tuple(result.astype("float32") for result in results)

    def derivative(activation):
        def both(x, y):
            value, pullback = jax.vjp(activation, x)
            return value, *pullback(y)

        return both

    def compute(rows, kernel, sizes):
        kernels = [kernel, kernel]
        return gpu.grouped_products(rows, kernels, (), sizes, finish=everything, transposed=True)

    jax.export.export(
        jax.jit(compute),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")],
    )(jnp.ones((8, 16)), jnp.ones((2, 16, 16)), jnp.ones(2, "int32"))


AXES = st.integers(1, 20_000)


@hypothesis.given(
    shape=st.tuples(AXES, AXES, AXES),
    row_bytes=st.sampled_from((2, 4)),
    other_bytes=st.sampled_from((2, 4)),
    num_kernels=st.integers(1, 2),
    num_planes=st.integers(1, 6),
    num_groups=st.integers(1, 256),
    chip=st.sampled_from(CHIPS),
)
def test_tiles_fit_into_the_memory_of_a_chip(
    shape, row_bytes, other_bytes, num_kernels, num_planes, num_groups, chip
):
    products = tpu_tiles.product_tiles(
        shape,
        row_bytes,
        other_bytes,
        num_kernels=num_kernels,
        num_planes=num_planes,
        num_groups=num_groups,
        chip=chip,
    )
    gradient = tpu_tiles.gradient_tiles(shape, row_bytes, other_bytes, num_lefts=1, chip=chip)
    for tiles, read in ((products, num_kernels * other_bytes), (gradient, row_bytes)):
        # What has two buffers fits into the memory of the chip.
        moved = tiles.rows * tiles.depth * row_bytes + tiles.depth * tiles.columns * read
        assert 2 * moved < chip.vmem
        assert tiles.rows % tiles.strip == 0 and tiles.strip % tiles.border == 0
        assert tiles.rows % 16 == 0 and tiles.rows < max(2 * shape[0], 32)
        for length, tile, chunk in (
            (shape[1], tiles.depth, tiles.depth_chunk),
            (shape[2], tiles.columns, tiles.column_chunk),
        ):
            assert tile == length or (tile % 128 == 0 and tile < length)
            assert tile % chunk == 0 and (chunk == tile or chunk % 128 == 0)


def test_large_tiles_move_little():
    """Of a usual layer on a chip of today, rows and kernels are read once, or nearly."""
    tiles = tpu_tiles.product_tiles(
        (16384, 1024, 4096), 2, 4, num_kernels=1, num_planes=2, num_groups=8, chip=CHIPS[1]
    )
    assert tiles.depth == 1024 and tiles.columns >= 2048 and tiles.rows >= 256


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
