"""Products with int8 kernels on PyTorch: of rows in digits, and of kernels in blocks."""

import numpy as np
import pytest
from backends import BACKEND, assert_close, to_numpy
from layer_checks import normal

from keras_moe import layers, routers

if BACKEND != "torch":
    pytest.skip("products of PyTorch", allow_module_level=True)

import torch

from keras_moe.backend import torch_integers

D, H, E = 70, 33, 5
SIZES = [1, 16, 2]

needs_instructions = pytest.mark.skipif(
    not torch_integers.multiplies_integers(), reason="needs VNNI instructions"
)


def integers(*shape):
    return np.random.default_rng(0).integers(-127, 128, shape).astype("int8")


def with_extremes(rows):
    """The first rows become zero, very large, very small, and small but for one entry."""
    rows[:4] *= np.array([[0], [1e33], [1e-20], [1e-9]], "float32")
    rows[3, 0] = 1
    return rows


def products_of_few(rows, sizes, kernels):
    parts = map(torch.from_numpy, kernels)
    return to_numpy(torch_integers.multiply_few(torch.from_numpy(rows), sizes, parts, H))


def test_digits_are_those_of_the_rows():
    rows = with_extremes(normal(9, D))
    digits, unit = map(to_numpy, torch_integers.to_digits(torch.from_numpy(rows)))
    values = digits.reshape(D, 9, 4).astype("float64") @ np.array(torch_integers.PLACES) * unit.T
    assert np.all(np.abs(values.T - rows) <= 2.0**-22 * np.abs(rows).max(1, keepdims=True))


@needs_instructions
def test_few_rows_times_integers():
    rows, kernels = with_extremes(normal(sum(SIZES), D)), integers(len(SIZES), D, H)
    parts = np.split(rows.astype("float64"), np.cumsum(SIZES)[:-1])
    expected = np.concatenate([part @ kernel for part, kernel in zip(parts, kernels)])
    errors = np.abs(products_of_few(rows, SIZES, kernels) - expected)
    assert np.all(errors <= 1e-6 * np.abs(expected).max(1, keepdims=True))


@needs_instructions
def test_the_longest_sums_of_the_largest_integers_are_exact():
    depth = torch_integers.LONGEST_SUM
    rows, kernel = np.ones((1, depth), "float32"), np.full((1, depth, H), 127, "int8")
    assert_close(products_of_few(rows, [1], kernel), np.full((1, H), 127.0 * depth))


@needs_instructions
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(value):
    rows, kernels = normal(3, D), integers(1, D, H)
    exact = products_of_few(rows, [3], kernels)
    rows[1, 4] = value
    actual = products_of_few(rows, [3], kernels)
    assert not np.isfinite(actual[1]).any()
    np.testing.assert_array_equal(actual[[0, 2]], exact[[0, 2]])


@needs_instructions
def test_many_or_long_rows_are_not_few():
    rows, most = torch.zeros(40, D), torch_integers.MOST_ROWS
    assert torch_integers.are_few(rows, [1, most])
    assert not torch_integers.are_few(rows, [1, most + 1])
    assert not torch_integers.are_few(torch.zeros(2, torch_integers.LONGEST_SUM + 1), [2])


@pytest.mark.parametrize("entries", [1, 9 * D, 2**19])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_kernels_become_floats_in_blocks(entries, transposed, layout, monkeypatch):
    monkeypatch.setattr(torch_integers, "CPU_BLOCK", entries)
    kernel = integers(D, H)
    rows = normal(6, H if transposed else D)
    stored = torch.from_numpy(np.array(kernel, order="F" if layout == "columns" else "C"))
    assert stored.is_contiguous() == (layout == "rows")
    output = torch.empty(6, D if transposed else H)
    torch_integers.multiply(torch.from_numpy(rows), stored, transposed, output)
    assert_close(to_numpy(output), rows @ (kernel.T if transposed else kernel))


@needs_instructions
def test_a_bank_stores_kernels_as_few_rows_read_them():
    bank = layers.FeedForwardExperts(E, H)
    bank.build((None, D))
    bank.quantize("int8")
    assert bank.up_kernel.shape == (E, D, H)
    assert bank.up_kernel.value[0].mT.is_contiguous()


@needs_instructions
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_rows_in_digits_and_kernels_in_floats_give_the_same(dtype, monkeypatch):
    bank = layers.FeedForwardExperts(E, H)
    layer = layers.MixtureOfExperts(bank, routers.TopKRouter(E), dtype=dtype)
    layer.build((None, D))
    bank.up_bias.assign(normal(E, H))
    bank.quantize("int8")
    tokens = torch.from_numpy(normal(8, D))
    in_digits = to_numpy(layer(tokens))
    monkeypatch.setattr(torch_integers, "MOST_ROWS", 0)
    in_floats = to_numpy(layer(tokens))
    assert in_digits.dtype == in_floats.dtype
    assert_close(in_digits, in_floats, tolerance=1e-5 if dtype == "float32" else 0.02)
