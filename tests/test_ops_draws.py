"""Random numbers: their distributions, and that they have nothing to do with one another."""

import keras
import numpy as np
import pytest
from backends import BACKEND, FAST_MODE, compiled, on_each_backend, on_one_backend

from keras_moe.ops import draws

pytestmark = on_one_backend

MODE = "xla" if BACKEND == "tensorflow" else FAST_MODE
R, C = 500, 400


def draw(kind, seed, calls=1):
    generator = keras.random.SeedGenerator(seed)
    state = generator.state.value

    def function(state):
        with keras.StatelessScope([(generator.state, state)]):
            return [kind((R, C), generator) for _ in range(calls)]

    return compiled(function, MODE)(keras.ops.convert_to_numpy(state))


def correlation(one, other):
    return np.corrcoef(one.ravel(), other.ravel())[0, 1]


MEAN_AND_DEVIATION = {draws.uniform: (0.5, 12**-0.5), draws.normal: (0.0, 1.0)}
by_kind = pytest.mark.parametrize("kind", MEAN_AND_DEVIATION)


@on_each_backend
@by_kind
def test_draws_have_the_mean_and_deviation_of_their_distribution(kind):
    (values,) = draw(kind, 0)
    mean, deviation = MEAN_AND_DEVIATION[kind]
    error = 4 * deviation / np.sqrt(R * C)
    assert values.dtype == np.float32 and values.shape == (R, C)
    assert abs(values.mean() - mean) < error
    assert abs(values.std() - deviation) < error
    # Of each row and of each column as well, so that no token and no feature is favoured.
    for axis, size in ((0, R), (1, C)):
        spread = (values.mean(axis=axis) - mean).std() * np.sqrt(size) / deviation
        assert 0.85 < spread < 1.15


def test_uniform_draws_are_everywhere_between_0_and_1_alike():
    (values,) = draw(draws.uniform, 1)
    assert 0 < values.min() and values.max() < 1
    counts, _ = np.histogram(values, bins=100, range=(0, 1))
    # Chi-square of 99 degrees of freedom: 99 on average, with a deviation of 14.
    assert 99 - 56 < np.sum((counts - R * C / 100) ** 2) / (R * C / 100) < 99 + 56


def test_the_least_uniform_draw_has_a_logarithm(monkeypatch):
    def least(shape, minval=0.0, **kwargs):
        return keras.ops.full(shape, minval)

    monkeypatch.setattr(keras.random, "uniform", least)
    assert draws.uniform((1, 1), None) > 0


@by_kind
def test_draws_have_nothing_to_do_with_their_neighbours_nor_with_other_draws(kind):
    first, second = draw(kind, 2, calls=2)
    (other,) = draw(kind, 3)
    for one, another in (
        (first[:, 1:], first[:, :-1]),
        (first[1:], first[:-1]),
        (first, second),
        (first, other),
    ):
        assert abs(correlation(one, another)) < 4 / np.sqrt(R * C) + 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.125, 0.5])
def test_dropout_zeroes_its_rate_of_the_numbers_and_keeps_the_mean(rate, dtype):
    inputs = keras.ops.full((4, R // 4, C), 3.0, dtype)

    def dropped(shape, seed):
        outputs = draws.dropout(inputs, rate, seed)
        assert keras.backend.standardize_dtype(outputs.dtype) == dtype
        return keras.ops.reshape(keras.ops.cast(outputs, "float32"), shape)

    first, second = draw(dropped, 5, calls=2)
    np.testing.assert_allclose(np.unique(first), [0, 3 / (1 - rate)], rtol=1e-2)
    assert abs((first == 0).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / (R * C))
    assert abs(correlation(first, second)) < 4 / np.sqrt(R * C) + 1e-3
