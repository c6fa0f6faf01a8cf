"""The grouped kernels of GPUs, interpreted on a CPU, against a loop over groups in float64."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from backends import BACKEND, assert_close

if BACKEND != "jax":
    pytest.skip("kernels of JAX", allow_module_level=True)

import jax
import jax.numpy as jnp

from keras_moe.backend.jax_kernels import elementwise, gpu

DTYPES = ("float32", "bfloat16", "float16")
# Of the largest entry: inputs are rounded before the oracle sees them, results once.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
# Narrower than a tile, not a multiple of any, just above one, exactly one.
AXES = st.sampled_from((1, 3, 5, 48, 128, 130))
# Each example compiles a program: to shrink one that fails would take minutes.
FEW = hypothesis.settings(max_examples=5, phases=[hypothesis.Phase.generate])


@st.composite
def groups(draw):
    """Sizes of groups, some empty or longer than a tile, and the number of all rows."""
    sizes = draw(st.lists(st.sampled_from((0, 0, 1, 7, 16, 70, 140)), min_size=1, max_size=5))
    padding = draw(st.sampled_from((0, 1, 37)))
    return sizes, max(sum(sizes) + padding, 1)


def array(seed, shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def padded(seed, sizes, rows, width, dtype):
    """Rows of which those behind the last group are NaN and infinite."""
    values = array(seed, (rows, width), dtype)
    behind = jnp.arange(rows)[:, None] >= sum(sizes)
    return jnp.where(behind, jnp.where(jnp.arange(width) % 2, jnp.inf, jnp.nan), values)


def exact(tensor):
    return np.asarray(jnp.asarray(tensor, "float32"), "float64")


def spans(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends)]


def products(rows, kernel, bias, sizes):
    """What one kernel gives for all rows of groups, in float64."""
    rows, kernel, bias = exact(rows), exact(jnp.asarray(kernel, rows.dtype)), exact(bias)
    return np.concatenate([rows[s] @ kernel[e] + bias[e] for e, s in enumerate(spans(sizes))])


def finish(first, second, extra):
    """Two kernels, one extra, three outputs."""
    return first * jax.nn.sigmoid(second), extra - second, jnp.maximum(first, extra)


def run(function, *arrays):
    return jax.jit(lambda *arrays: function(*arrays, interpret=True))(*arrays)


def check_products(sizes, rows, depth, width, dtype, kernel_dtype, transposed, with_bias):
    experts = len(sizes)
    inputs = padded(0, sizes, rows, depth, dtype)
    extra = padded(1, sizes, rows, width, dtype)
    kernels = [array(seed, (experts, depth, width), kernel_dtype) for seed in (2, 3)]
    biases = [array(seed, (experts, width), kernel_dtype) for seed in (4, 5)]

    def compute(rows, kernels, biases, extra, sizes, **options):
        kernels = [jnp.swapaxes(k, 1, 2) if transposed else k for k in kernels]
        return gpu.grouped_products(
            rows,
            kernels,
            biases if with_bias else (),
            sizes,
            transposed=transposed,
            finish=finish,
            extras=(extra,),
            **options,
        )

    actual = run(compute, inputs, kernels, biases, extra, jnp.asarray(sizes, "int32"))
    live = sum(sizes)
    biases = [with_bias * exact(bias) for bias in biases]
    first, second = (products(inputs, k, b, sizes) for k, b in zip(kernels, biases))
    other = exact(extra)[:live]
    expected = (first / (1 + np.exp(-second)), other - second, np.maximum(first, other))
    assert len(actual) == len(expected)
    for result, wanted in zip(actual, expected):
        assert result.shape == (rows, width) and result.dtype == dtype
        assert_close(exact(result)[:live], wanted, tolerance=TOLERANCE[dtype])


def check_gradient(sizes, rows, depth, width, dtype, out_dtype, with_bias):
    left = padded(0, sizes, rows, depth, dtype)
    right = padded(1, sizes, rows, width, dtype)

    def compute(left, right, sizes, **options):
        return gpu.grouped_kernel_gradient(
            left, right, sizes, dtype=out_dtype, with_bias=with_bias, **options
        )

    kernel, bias = run(compute, left, right, jnp.asarray(sizes, "int32"))
    left, right = exact(left), exact(right)
    expected = np.stack([left[s].T @ right[s] for s in spans(sizes)])
    assert kernel.dtype == out_dtype
    assert_close(exact(kernel), expected, tolerance=TOLERANCE[out_dtype])
    assert not np.any(exact(kernel)[np.equal(sizes, 0)])
    if not with_bias:
        assert bias is None
        return
    expected = np.stack([np.sum(right[s], axis=0) for s in spans(sizes)])
    assert bias.dtype == out_dtype
    assert_close(exact(bias), expected, tolerance=TOLERANCE[out_dtype])


@FEW
@hypothesis.given(
    groups(),
    AXES,
    AXES,
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
)
def test_products(groups, depth, width, dtype, kernel_dtype, transposed, with_bias):
    check_products(*groups, depth, width, dtype, kernel_dtype, transposed, with_bias)


@FEW
@hypothesis.given(
    groups(), AXES, AXES, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans()
)
def test_kernel_gradient(groups, depth, width, dtype, out_dtype, with_bias):
    check_gradient(*groups, depth, width, dtype, out_dtype, with_bias)


# Several tiles in every direction and all rows in one group; no rows at all; the smallest problem.
@pytest.mark.parametrize(
    "sizes, rows, depth, width",
    [((3, 0, 270, 0), 280, 70, 150), ((0, 0), 5, 5, 3), ((1,), 1, 1, 1)],
)
def test_extremes(sizes, rows, depth, width):
    check_products(sizes, rows, depth, width, "bfloat16", "float32", True, True)
    check_gradient(sizes, rows, depth, width, "float32", "float32", True)


def test_products_alone():
    """Without anything to finish, in full float32 precision."""
    sizes, rows, kernel = (70, 9), array(0, (80, 300), "float32"), array(1, (2, 300, 5), "float32")

    def compute(rows, kernel, sizes, **options):
        return gpu.grouped_products(rows, [kernel], (), sizes, **options)

    inputs = rows, kernel, jnp.asarray(sizes, "int32")
    (actual,) = run(compute, *inputs)
    assert_close(actual[:79], products(rows, kernel, jnp.zeros((2, 5)), sizes), tolerance=1e-6)
    # Nothing is written where a tile overruns its group: another program may have been faster.
    assert np.all(np.isnan(actual[79]))
    # CPUs multiply float32 as it is, whatever they are told. GPUs do not.
    assert "HIGHEST" in str(jax.make_jaxpr(compute)(*inputs))


@pytest.mark.parametrize(
    "rows, tile, experts", [(1, 16, 3), (50, 16, 3), (64, 16, 1), (65, 32, 40)]
)
def test_visits_cover_every_row_once(rows, tile, experts):
    rng = np.random.default_rng(rows + experts)
    # One row in each group needs the most tiles.
    most = np.zeros(experts, int)
    most[: min(rows, experts)] = 1
    most[0] += rows - np.sum(most)
    for sizes in (most, rng.multinomial(rows, np.ones(experts) / experts), np.zeros(experts, int)):
        seen = np.full(rows, -1)
        for group, first, end in zip(*gpu._visits(jnp.asarray(sizes, "int32"), rows, tile)):
            covered = np.arange(first, min(first + tile, end))
            assert np.all(seen[covered] == -1)
            seen[covered] = group
        expected = np.repeat(np.arange(experts), sizes)
        np.testing.assert_array_equal(
            seen, np.pad(expected, (0, rows - sum(sizes)), constant_values=-1)
        )


@pytest.mark.parametrize("rows, columns", [(5, 3), (16, 2), (37, 4)])
def test_every_program_has_its_own_tile(rows, columns):
    places = jax.vmap(lambda program: gpu._place(program, rows, columns))(
        jnp.arange(rows * columns)
    )
    expected = {(row, column) for row in range(rows) for column in range(columns)}
    assert set(zip(*np.asarray(places).tolist())) == expected


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
