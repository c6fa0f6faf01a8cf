"""The grouped kernels of TPUs, interpreted on a CPU, against a loop over groups in float64."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from backends import BACKEND, assert_close

if BACKEND != "jax":
    pytest.skip("kernels of JAX", allow_module_level=True)

pytest.importorskip("jax.experimental.pallas.tpu")

import jax
import jax.numpy as jnp

from keras_moe.backend.jax_kernels import tpu, tpu_tiles
from keras_moe.backend.jax_kernels.tpu_tiles import Chip, Tiles

DTYPES = ("float32", "bfloat16")
# Of the largest entry: inputs are rounded before the oracle sees them, results once.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}
# Tiles so small that few rows and narrow axes need many of them, with strips, borders, chunks, and
# an axis of 20 or 24 that is cut into tiles of 8 or 16.
SMALL = Tiles(16, depth=8, columns=16, strip=8, border=4, depth_chunk=4, column_chunk=8)
# The depth in one tile, as the kernels have it wherever it fits.
DEEP = Tiles(16, depth=20, columns=16, strip=8, border=4, depth_chunk=20, column_chunk=8)
# Each example compiles a program: to shrink one that fails would take minutes.
FEW = hypothesis.settings(max_examples=5, phases=[hypothesis.Phase.generate])
CHIPS = (Chip(16 * 2**20, 2), Chip(64 * 2**20, 1), Chip(64 * 2**20, 2))


@st.composite
def layouts(draw):
    """Sizes of groups, some empty or longer than a tile, and the number of all rows."""
    sizes = draw(st.lists(st.sampled_from((0, 0, 1, 5, 8, 16, 40)), min_size=1, max_size=5))
    padding = draw(st.sampled_from((0, 1, 21)))
    return sizes, max(sum(sizes) + padding, 1)


def floats(seed, shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def padded(seed, layout, width, dtype):
    """Rows of which those behind the last group are NaN and infinite."""
    sizes, num_rows = layout
    values = floats(seed, (num_rows, width), dtype)
    return values.at[sum(sizes) :].set(jnp.where(jnp.arange(width) % 2, jnp.inf, jnp.nan))


def exact(tensor):
    return np.asarray(jnp.asarray(tensor, "float32"), "float64")


def groups(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends)]


def two_of_three(first, second, extra):
    """Two kernels and one extra, three outputs."""
    return first * jax.nn.sigmoid(second), extra - second, jnp.maximum(first, extra)


def check_products(layout, depth, width, dtype, kernel_dtype, transposed, with_bias):
    sizes, num_rows = layout
    live, num_groups = sum(sizes), len(sizes)
    rows, extra = padded(0, layout, depth, dtype), padded(1, layout, width, dtype)
    kernels = [floats(seed, (num_groups, depth, width), kernel_dtype) for seed in (2, 3)]
    biases = [floats(seed, (num_groups, width), kernel_dtype) for seed in (4, 5)]

    @jax.jit
    def compute(rows, kernels, biases, sizes, extra):
        return tpu.grouped_products(
            rows,
            [jnp.swapaxes(kernel, 1, 2) for kernel in kernels] if transposed else kernels,
            biases if with_bias else (),
            sizes,
            transposed=transposed,
            finish=two_of_three,
            extras=(extra,),
            interpret=True,
        )

    def product(kernel, bias):
        kernel, bias = exact(jnp.asarray(kernel, dtype)), with_bias * exact(bias)
        parts = [exact(rows)[group] @ kernel[e] + bias[e] for e, group in enumerate(groups(sizes))]
        return np.concatenate(parts)

    results = compute(rows, kernels, biases, jnp.asarray(sizes, "int32"), extra)
    first, second = map(product, kernels, biases)
    other = exact(extra)[:live]
    expected = first / (1 + np.exp(-second)), other - second, np.maximum(first, other)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected):
        assert result.shape == (num_rows, width) and result.dtype == dtype
        assert_close(exact(result)[:live], wanted, tolerance=TOLERANCE[dtype])


def check_gradient(layout, depth, width, dtype, result_dtype, with_bias):
    sizes = layout[0]
    left, right = padded(0, layout, depth, dtype), padded(1, layout, width, dtype)

    @jax.jit
    def compute(left, right, sizes):
        return tpu.grouped_kernel_gradient(
            left, right, sizes, dtype=result_dtype, with_bias=with_bias, interpret=True
        )

    results = compute(left, right, jnp.asarray(sizes, "int32"))
    left, right = exact(left), exact(right)
    expected = [
        np.stack([left[group].T @ right[group] for group in groups(sizes)]),
        np.stack([np.sum(right[group], axis=0) for group in groups(sizes)]),
    ]
    if not with_bias:
        assert results[1] is None
        results, expected = results[:1], expected[:1]
    for result, wanted in zip(results, expected):
        assert result.dtype == result_dtype
        assert not np.any(exact(result)[np.equal(sizes, 0)])
        assert_close(exact(result), wanted, tolerance=TOLERANCE[result_dtype])


@FEW
@hypothesis.given(
    layout=layouts(),
    tiles=st.sampled_from((SMALL, DEEP)),
    width=st.sampled_from((16, 24)),
    dtype=st.sampled_from(DTYPES),
    kernel_dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    with_bias=st.booleans(),
)
def test_products_of_many_tiles(layout, tiles, width, dtype, kernel_dtype, transposed, with_bias):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "product_tiles", lambda *_, **__: tiles)
        check_products(layout, 20, width, dtype, kernel_dtype, transposed, with_bias)


@FEW
@hypothesis.given(
    layout=layouts(),
    width=st.sampled_from((16, 24)),
    dtype=st.sampled_from(DTYPES),
    result_dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
)
def test_gradient_of_many_tiles(layout, width, dtype, result_dtype, with_bias):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "gradient_tiles", lambda *_, **__: SMALL)
        check_gradient(layout, 20, width, dtype, result_dtype, with_bias)


# One row, no row served, groups that begin and end inside of tiles.
LAYOUTS = (([1], 1), ([0, 0], 5), ([0, 300, 1, 0, 260], 600))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tiles_of_a_chip(layout):
    check_products(layout, 5, 130, "float32", "bfloat16", transposed=False, with_bias=True)
    check_gradient(layout, 3, 130, "bfloat16", "float32", with_bias=True)


def test_products_themselves():
    sizes = jnp.asarray([2, 3], "int32")
    rows, kernel = floats(0, (5, 4), "float32"), floats(1, (2, 4, 6), "float32")
    [result] = tpu.grouped_products(rows, [kernel], (), sizes, interpret=True)
    expected = np.concatenate(
        [exact(rows)[:2] @ exact(kernel)[0], exact(rows)[2:] @ exact(kernel)[1]]
    )
    assert_close(result, expected)


def test_float32_is_multiplied_in_full_precision():
    """A CPU has no other precision, so what is traced must tell."""
    rows, sizes = floats(0, (5, 4), "float32"), jnp.asarray([2, 3], "int32")
    for function in (
        lambda: tpu.grouped_products(rows, [floats(1, (2, 4, 6), "bfloat16")], (), sizes),
        lambda: tpu.grouped_kernel_gradient(rows, rows, sizes, dtype="bfloat16"),
    ):
        assert "precision=(Precision.HIGHEST" in str(jax.make_jaxpr(function)())


def test_dtypes():
    assert [name for name in (*DTYPES, "float16") if tpu.supports(name)] == list(DTYPES)


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
def test_tiles(shape, row_bytes, other_bytes, num_kernels, num_planes, num_groups, chip):
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
