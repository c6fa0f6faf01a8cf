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


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Processors that lack the instructions multiply slowly, and test the same."""
    if not torch_integers.multiplies_integers():
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.long() @ b.long()).int())
        monkeypatch.setattr(torch_integers, "multiplies_integers", lambda: True)


def integers(*shape):
    return np.random.default_rng(0).integers(-127, 128, shape).astype("int8")


def with_extremes(rows):
    """The first rows become zero, very large, very small, and small but for one entry."""
    rows[:4] *= np.array([[0], [1e33], [1e-36], [1e-9]], "float32")
    rows[3, 0] = 1
    return rows


def error_of(rows):
    """The largest error of a number of each row, (R, 1): a unit is no subnormal number."""
    largest = np.abs(rows).max(1, keepdims=True).astype("float64")
    return 2.0**-22 * largest + 2 * np.finfo("float32").tiny


def in_groups(rows, sizes):
    rows = torch.from_numpy(rows)
    return rows, rows.split(sizes)


def products_in_digits(rows, sizes, kernels):
    digits = torch_integers.in_digits(*in_groups(rows, sizes))
    parts = map(torch.from_numpy, kernels)
    return np.concatenate([to_numpy(each.multiply(part)) for each, part in zip(digits, parts)])


@pytest.mark.parametrize(("depth", "width"), [(D, H), (1, H), (D, 1), (2, 2), (1, 1)])
def test_few_rows_times_integers(depth, width):
    rows = with_extremes(normal(sum(SIZES), depth))
    kernels = integers(len(SIZES), depth, width)
    parts = np.split(rows.astype("float64"), np.cumsum(SIZES)[:-1])
    expected = np.concatenate([part @ kernel for part, kernel in zip(parts, kernels)])
    errors = np.abs(products_in_digits(rows, SIZES, kernels) - expected)
    assert np.all(errors <= 127 * depth * error_of(rows))


def test_the_longest_sums_of_the_largest_integers_are_exact():
    depth = torch_integers.LONGEST_SUM
    rows, kernel = np.ones((1, depth), "float32"), np.full((1, depth, H), 127, "int8")
    assert_close(products_in_digits(rows, [1], kernel), np.full((1, H), 127.0 * depth))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(value):
    rows, kernels = normal(3, D), integers(1, D, H)
    exact = products_in_digits(rows, [3], kernels)
    rows[1, 4] = value
    actual = products_in_digits(rows, [3], kernels)
    assert not np.isfinite(actual[1]).any()
    np.testing.assert_array_equal(actual[[0, 2]], exact[[0, 2]])


@pytest.mark.parametrize("entries", [1, 9 * D, 2**19])
@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_become_floats_in_blocks(entries, transposed, monkeypatch):
    monkeypatch.setattr(torch_integers, "CPU_BLOCK", entries)
    kernel, rows = integers(D, H), normal(6, H if transposed else D)
    output = torch.empty(6, D if transposed else H)
    torch_integers.product(torch.from_numpy(rows), torch.from_numpy(kernel), transposed, output)
    assert_close(to_numpy(output), rows @ (kernel.T if transposed else kernel))


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_layer_gives_the_same_with_digits_and_without(dtype, monkeypatch):
    bank = layers.FeedForwardExperts(E, H)
    layer = layers.MixtureOfExperts(bank, routers.TopKRouter(E), dtype=dtype)
    layer.build((None, D))
    bank.up_bias.assign(normal(E, H))
    bank.quantize("int8")
    tokens = torch.from_numpy(normal(40, D))  # some experts have few of them
    multiplied = []
    multiply = torch_integers.Digits.multiply

    def counted(digits, kernel):
        multiplied.append(digits)
        return multiply(digits, kernel)

    monkeypatch.setattr(torch_integers.Digits, "multiply", counted)
    in_digits = to_numpy(layer(tokens))
    assert 0 < len(multiplied) < 2 * E
    monkeypatch.setattr(torch_integers, "multiplies_integers", lambda: False)
    multiplied.clear()
    in_floats = to_numpy(layer(tokens))
    assert not multiplied and in_digits.dtype == in_floats.dtype
    assert_close(in_digits, in_floats, tolerance=1e-5 if dtype == "float32" else 0.02)
