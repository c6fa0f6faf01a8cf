"""The likelihood of a mixture against NumPy, and its gradient."""

import itertools

import keras
import numpy as np
import pytest
from backends import compiled, gradients, on_each_backend, on_one_backend, to_numpy, unless_compiled
from keras import ops
from layer_checks import normal

from keras_moe import layers, losses, routers

pytestmark = on_one_backend

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


def test_the_parts_of_a_prediction_have_names_and_log_prob_is_a_density():
    weights, means, target = some_weights(), normal(B, K, D), normal(B, D, seed=2)
    log_scales = 0.3 * normal(B, K, D, seed=3)
    loss = losses.MixtureNegativeLogLikelihood(scale=None, reduction="none")
    pred = packed(weights, np.concatenate([means, log_scales], axis=-1))
    parts = to_numpy(loss.unpack(pred))
    expected = {"weights": weights, "means": means, "scales": np.exp(log_scales)}
    for name, value in expected.items():
        np.testing.assert_allclose(parts.pop(name), value, rtol=1e-5, atol=1e-7)
    assert not parts
    np.testing.assert_allclose(to_numpy(loss.log_prob(target, pred)), -to_numpy(loss(target, pred)))
    # Whatever constant the loss leaves out.
    fixed = packed(weights, means)
    log_probs = [
        to_numpy(losses.MixtureNegativeLogLikelihood(normalized=n).log_prob(target, fixed))
        for n in (True, False)
    ]
    np.testing.assert_array_equal(*log_probs)
    grid = np.linspace(-30, 30, 6001, dtype="float32")[:, None]
    one = np.repeat(packed(np.array([[0.3, 0.7]]), np.array([[[-2.0], [3.0]]])), len(grid), axis=0)
    density = np.exp(to_numpy(losses.MixtureNegativeLogLikelihood(scale=0.5).log_prob(grid, one)))
    assert np.sum(density) * 0.01 == pytest.approx(1, rel=1e-4)


def test_samples_have_the_moments_of_the_mixture_and_repeat_with_a_seed():
    gaussian = losses.MixtureNegativeLogLikelihood(scale=0.5)
    pred = np.tile(packed(np.array([[0.3, 0.7]]), np.array([[[-2.0], [3.0]]])), (4000, 1, 1))
    drawn = to_numpy(gaussian.sample(pred, seed=0))
    assert drawn.shape == (4000, 1)
    np.testing.assert_allclose(drawn.mean(), to_numpy(gaussian.mean(pred[:1])), atol=0.15)
    np.testing.assert_allclose(drawn.var(), to_numpy(gaussian.variance(pred[:1])), rtol=0.1)
    # The noise does not depend on the expert that was drawn.
    branch = (drawn > 0.5)[:, 0]
    noise = [np.mean(drawn[branch] - 3.0), np.mean(drawn[~branch] + 2.0)]
    np.testing.assert_allclose(noise, 0, atol=0.05)
    np.testing.assert_array_equal(to_numpy(gaussian.sample(pred, seed=0)), drawn)
    categorical = losses.MixtureNegativeLogLikelihood("categorical")
    logits = np.log([[[0.1, 0.2, 0.7], [0.5, 0.4, 0.1]]])
    pred = np.tile(packed(np.array([[0.25, 0.75]]), logits), (4000, 1, 1)).reshape(8, 500, 2, 4)
    drawn = to_numpy(categorical.sample(pred, seed=keras.random.SeedGenerator(1)))
    assert drawn.shape == (8, 500)
    shares = np.bincount(drawn.reshape(-1), minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.4, 0.35, 0.25], atol=0.03)
    padding = packed(np.zeros((1, 2)), logits)
    assert to_numpy(categorical.sample(padding, seed=0)) in (0, 1, 2)


def test_class_numbers_are_exact_however_many():
    loss = losses.MixtureNegativeLogLikelihood("categorical", reduction="none")
    pred = packed(some_weights()[1:2], normal(1, K, 300))
    for number in (257, 299):
        expected = -np.log(to_numpy(loss.mean(pred))[0, number])
        np.testing.assert_allclose(to_numpy(loss([number], pred)), [expected], rtol=1e-5)


@on_each_backend
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


@on_each_backend
@pytest.mark.parametrize("scale", unless_compiled([1e-6, None], [None]))
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


@on_each_backend
def test_one_expert_of_any_scale_leaves_finite_gradients():
    loss = losses.MixtureNegativeLogLikelihood(scale=None, reduction="none")
    scales = np.concatenate([np.arange(-200.0, 201.0, 5.0), [-43.0, -30.0]])
    for residual in (0.0, 1e-20, 1e-10, 1.0, 1e4):
        for other in (0.0, None):  # one bad expert of two, or both
            logs = np.stack([scales, scales if other is None else 0 * scales], axis=1)
            means = np.full_like(logs, residual)
            pred = packed(np.full_like(logs, 0.5), np.stack([means, logs], axis=-1))
            target = np.zeros((len(scales), 1), "float32")
            (gradient,) = gradients(lambda pred, to=target: ops.sum(loss(to, pred)), [pred])
            assert np.isfinite(to_numpy(loss(target, pred))).all()
            assert np.isfinite(to_numpy(gradient)).all(), (residual, other)
