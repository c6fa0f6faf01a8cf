"""The likelihood of a mixture against NumPy, and its gradient."""

import itertools

import keras
import numpy as np
import pytest
from backends import MODES, compiled, gradients, to_numpy
from keras import ops
from layer_checks import normal

from keras_moe import layers, losses, routers

K, D, B = 3, 2, 5


def log_sum_exp(values):
    highest = values.max(-1, keepdims=True)
    return (highest + np.log(np.exp(values - highest).sum(-1, keepdims=True)))[..., 0]


def packed(weights, outputs):
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(weights), -1e9)
    return np.concatenate([logs[..., None], outputs], axis=-1).astype("float32")


def some_weights():
    weights = np.random.default_rng(1).dirichlet(np.ones(K), B)
    weights[0] = [1, 0, 0]
    return weights


@pytest.mark.parametrize(
    "scale, normalized", [(None, True), *itertools.product([1.0, 0.1, 1e-6], [True, False])]
)
def test_gaussian_likelihoods_are_those_of_numpy(scale, normalized):
    weights, means, target = some_weights(), normal(B, K, D), normal(B, D, seed=2)
    log_scales = np.full((B, K, D), np.log(scale)) if scale else 0.3 * normal(B, K, D, seed=3)
    outputs = means if scale else np.concatenate([means, log_scales], axis=-1)
    terms = ((target[:, None] - means) / np.exp(log_scales.astype("float64"))) ** 2
    if normalized:
        terms = terms + 2 * log_scales + np.log(2 * np.pi)
    pred = packed(weights, outputs)
    expected = -log_sum_exp(pred[..., 0].astype("float64") - 0.5 * terms.sum(-1))
    loss = losses.MixtureNegativeLogLikelihood(scale=scale, normalized=normalized, reduction="none")
    np.testing.assert_allclose(to_numpy(loss(target, pred)), expected, rtol=1e-5)


def test_categorical_likelihoods_moments_and_modes_are_those_of_numpy():
    weights, logits = some_weights(), normal(B, K, 4)
    classes = np.array([0, 1, 2, 3, 0])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mean = (weights[..., None] * probabilities).sum(1)
    loss = losses.MixtureNegativeLogLikelihood("categorical", reduction="none")
    pred = packed(weights, logits)
    expected = -np.log(mean[np.arange(B), classes])
    np.testing.assert_allclose(to_numpy(loss(classes, pred)), expected, rtol=1e-5)
    np.testing.assert_allclose(to_numpy(loss.mean(pred)), mean, rtol=1e-5)
    np.testing.assert_allclose(to_numpy(loss.variance(pred)), mean * (1 - mean), atol=1e-6)
    np.testing.assert_array_equal(to_numpy(loss.mode(pred)), mean.argmax(-1))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_class_has_a_loss_of_nan(mode):
    loss = losses.MixtureNegativeLogLikelihood("categorical", reduction="none")
    pred = np.broadcast_to(packed(some_weights()[1:2], normal(1, K, 4)), (8, K, 5))
    labels = np.array([0, 3, -1, 9, -7, 4, 0.5, np.nan], "float32")
    values = compiled(loss, mode)(labels, pred)
    assert np.isfinite(values[:2]).all() and abs(values[2]) < 1e-6
    assert np.isnan(values[3:]).all()
    integers = compiled(loss, mode)(np.array([0, 3, -1, 9, -7, 4], "int32"), pred[:6])
    np.testing.assert_array_equal(integers, values[:6])


def test_moments_and_modes_of_gaussians_are_those_of_draws():
    weights = np.array([[0.5, 0.3, 0.2]])
    means, scales = np.array([[[0.0], [4.0], [-2.0]]]), np.array([[[1.0], [0.1], [0.5]]])
    pred = packed(weights, np.concatenate([means, np.log(scales)], axis=-1))
    loss = losses.MixtureNegativeLogLikelihood(scale=None)
    rng = np.random.default_rng(0)
    expert = rng.choice(3, 200_000, p=weights[0])
    draws = rng.normal(means[0, expert, 0], scales[0, expert, 0])
    np.testing.assert_allclose(to_numpy(loss.mean(pred)), [[draws.mean()]], atol=0.02)
    np.testing.assert_allclose(to_numpy(loss.variance(pred)), [[draws.var()]], rtol=0.02)
    assert to_numpy(loss.mode(pred)).tolist() == [[4.0]]  # the highest peak, not the likeliest


def test_the_gradient_of_the_logits_is_prior_minus_posterior():
    logits, means, target = normal(B, K), normal(B, K, D), normal(B, D, seed=2)
    loss = losses.MixtureNegativeLogLikelihood(reduction="sum")

    def objective(logits):
        logs = ops.expand_dims(ops.log_softmax(logits), -1)
        return loss(target, ops.concatenate([logs, ops.convert_to_tensor(means)], axis=-1))

    (gradient,) = gradients(objective, [logits])
    prior = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    posterior = to_numpy(loss.responsibilities(target, packed(prior, means)))
    np.testing.assert_allclose(gradient, prior - posterior, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, None])
def test_extreme_logits_and_scales_give_no_nan(scale):
    bank = layers.LinearExperts(K, D if scale else 2 * D, kernel_initializer="zeros")
    router = routers.DenseRouter(kernel_initializer=keras.initializers.RandomNormal(stddev=1e4))
    inputs = keras.Input((4,))
    layer = layers.MixtureOfExperts(bank, router)
    _, routing, outputs = layer(inputs, return_routing=True, return_expert_outputs=True)
    model = keras.Model(inputs, losses.pack_mixture(routing, outputs))
    model.compile("sgd", losses.MixtureNegativeLogLikelihood(scale=scale))
    value = model.fit(normal(8, 4), normal(8, D), epochs=2, verbose=0).history["loss"]
    assert np.isfinite(value).all()
    assert all(np.isfinite(to_numpy(weight)).all() for weight in model.weights)
