"""Routing as pure functions: who goes where, with which weight, and what the router learns."""

import keras
import numpy as np
import pytest
import reference
from backends import (
    FAST_MODE,
    assert_close,
    compiled,
    differentiated,
    on_each_backend,
    on_one_backend,
)
from keras import ops

from keras_moe import losses
from keras_moe.ops import top_k_routing
from keras_moe.ops.routing import complete
from keras_moe.ops.selection import take_scores, top_k_indices

pytestmark = on_one_backend

load_balance = losses.LoadBalance(1.0)


TIES = [
    # The scores of a token, and the best three.
    ([0, 0, 0, 0], [0, 1, 2]),
    ([0, 1, 1, 0], [1, 2, 0]),
    ([1, 0, 2, 1], [2, 0, 3]),
    ([-np.inf, 0, -np.inf, -np.inf], [1, 0, 2]),
    ([np.inf, 0, np.inf, 1], [0, 2, 3]),
    ([np.nan, 0, 1, np.nan], [0, 3, 2]),
    ([np.nan] * 4, [0, 1, 2]),
]


@on_each_backend
def test_a_tie_goes_to_the_lower_index_and_nan_ranks_first(mode):
    scores, expected = zip(*TIES)
    indices = compiled(lambda scores: top_k_indices(scores, 3), mode)(np.array(scores, "float32"))
    np.testing.assert_array_equal(indices, expected)


@pytest.mark.parametrize("top_k", [1, 2])
def test_nan_logits_of_a_token_reach_its_own_weights_only(top_k, mode):
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    function = compiled(lambda z: top_k_routing(z, top_k), mode)
    clean = function(logits)
    logits[2, 1] = np.nan
    spoilt = function(logits)
    others = np.arange(6) != 2
    assert np.all(np.isnan(spoilt.weights[2]))
    np.testing.assert_array_equal(spoilt.weights[others], clean.weights[others])
    np.testing.assert_array_equal(spoilt.indices[others], clean.indices[others])
    assert set(spoilt.indices[2]) <= {0, 1, 2, 3} and len(set(spoilt.indices[2])) == top_k


@on_each_backend
@pytest.mark.parametrize("top_k", [1, 2])
def test_extreme_logits_give_finite_weights_and_gradients(top_k, mode):
    def function(inputs):
        routing = top_k_routing(inputs[0], top_k)
        return ops.sum(routing.weights[:, 0]) + load_balance(routing), routing

    logits = np.array([[1e4, 0, 0], [-1e30, 0, -1e30], [3e38, -3e38, 0], [0, 0, 0]], "float32")
    _, routing, (gradient,) = differentiated(function, mode)([logits])
    assert np.all(np.isfinite(routing.weights)) and np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(routing.indices[:, 0], [0, 1, 0, 0])
    assert_close(routing.weights[:3, 0], [1, 1, 1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_are_computed_on_in_float32(dtype):
    logits = np.array([[1.0, 2.0, 4.0]], "float32")
    routing = compiled(lambda z: top_k_routing(ops.cast(z, dtype), 2), FAST_MODE)(logits)
    assert {routing.weights.dtype, routing.probs.dtype, routing.logits.dtype} == {
        np.dtype("float32")
    }
    assert_close(routing.weights, reference.top_k_routing(logits, 2).weights)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64"])
def test_experts_may_be_integers_of_any_dtype(dtype):
    logits = np.random.normal(size=(5, 4)).astype("float32")
    best = np.argsort(-logits, axis=1)[:, :2].astype(dtype)
    expected = top_k_routing(logits, 2)
    routing = complete(expected._replace(indices=ops.convert_to_tensor(best), counts=None))
    assert keras.backend.standardize_dtype(routing.indices.dtype) == "int32"
    np.testing.assert_array_equal(routing.counts, expected.counts)
    scores = take_scores(*map(ops.convert_to_tensor, (logits, best)))
    assert_close(ops.convert_to_numpy(scores), np.take_along_axis(logits, best.astype("int64"), 1))


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 3)])
def test_a_mean_over_real_tokens_is_one_of_values_of_any_shape(shape):
    mask, values = np.arange(6) < 4, np.random.normal(size=shape).astype("float32")
    for real in (mask, None):
        routing = top_k_routing(np.zeros((6, 4), "float32"), 1, real)
        expected = values[:4] if real is mask else values
        assert_close(ops.convert_to_numpy(routing.mean(values)), expected.mean(0))
