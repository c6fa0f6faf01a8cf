"""The likelihood of a mixture: experts that compete, as in the mixtures of 1991.

Axes: K experts of a sample, D target features or classes, D' outputs of an expert.
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_choice, check_number, check_tensors
from keras_moe._internal.serialization import register
from keras_moe.ops.routing import Routing, check_is_routing

# The logarithm of a weight of zero, finite so that no gradient is NaN.
_LOG_ZERO = -1e9


@register
class MixtureNegativeLogLikelihood(keras.losses.Loss):
    """`-log sum_k w_k p_k(y)`, where each expert k predicts a distribution of the target y.

    Experts compete: the one that explains a sample best gets most of its gradient. The weights of a
    sample should sum to 1, as with a `DenseRouter`, or a `TopKRouter` with at least two experts.

    Args:
        distribution: String. "gaussian": outputs are means (D), with `scale=None` followed by
            logarithms of standard deviations (D). "categorical": logits of D classes.
        scale: Positive float, the standard deviation of all Gaussians, or None to learn it.
        normalized: Boolean. Whether a Gaussian has its normalizing constant. False is the
            competitive error of Jacobs et al., eq. 1.3. A learned scale needs it.
        name: String. Name of the loss.
        **kwargs: `reduction`, as in `keras.losses.Loss`. It computes in float32.

    Raises:
        ValueError: If an argument is out of its range, `y_true` does not fit, or D' is odd with
            `scale=None`.

    Call arguments:
        y_true: (batch, ..., D) float tensor, or (batch, ...) integer tensor of classes, -1 for an
            unknown class; any other value outside the classes gives NaN.
        y_pred: (batch, ..., K, 1 + D') float tensor of `losses.pack_mixture`, and of nothing else.

    Returns:
        Scalar, float32, or (batch, ...) without a reduction.

    Example:

    >>> experts = keras_moe.layers.LinearExperts(num_experts=2, output_dim=1)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts, router="dense")
    >>> inputs = keras.Input((4,))
    >>> _, routing, outputs = layer(inputs, return_routing=True, return_expert_outputs=True)
    >>> model = keras.Model(inputs, keras_moe.losses.pack_mixture(routing, outputs))
    >>> model.compile("adam", keras_moe.losses.MixtureNegativeLogLikelihood(scale=0.1))

    References: Jacobs et al. 1991, "Adaptive mixtures of local experts", eq. 1.3; Bishop 1994,
    "Mixture density networks", for learned scales.
    """

    def __init__(
        self,
        distribution: str = "gaussian",
        scale: float | None = 1.0,
        normalized: bool = True,
        name: str = "mixture_negative_log_likelihood",
        **kwargs: Any,
    ):
        super().__init__(name=name, **{"dtype": "float32", **kwargs})
        if self.dtype not in ("float32", "float64"):
            rule = "`dtype` must be float32 or float64, as others round class numbers and targets"
            raise ValueError(f"{rule}. Received: dtype={self.dtype}")
        self.distribution = check_choice("distribution", distribution, ("gaussian", "categorical"))
        self.scale = None if scale is None else check_number("scale", scale, above=0)
        self.normalized = bool(normalized)
        if distribution == "gaussian" and scale is None and not normalized:
            rule = "`normalized` must be True with a learned scale, else there is no lower bound"
            raise ValueError(f"{rule}. Received: scale=None, normalized={normalized}")

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return -ops.logsumexp(self._log_joint(y_true, y_pred, self.normalized), axis=-1)

    def log_prob(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the logarithm of the density or probability of each target, (batch, ...)."""
        return ops.logsumexp(self._log_joint(y_true, y_pred, True), axis=-1)

    def responsibilities(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return each expert's posterior probability for a sample, (batch, ..., K)."""
        return ops.softmax(self._log_joint(y_true, y_pred, True), axis=-1)

    def unpack(self, y_pred: Tensor) -> dict[str, Tensor]:
        """Return the parts of a prediction by name, a dict of float32 tensors.

        "weights" (batch, ..., K), the weight of each expert; (batch, ..., K, D) "means" and
        "scales", standard deviations, of Gaussians, or "probabilities" of classes.
        """
        weights = {"weights": ops.exp(_log_weights(y_pred))}
        means, log_scales = self._parameters(y_pred)
        if log_scales is None:
            return {**weights, "probabilities": means}
        return {**weights, "means": means, "scales": ops.exp(log_scales)}

    def sample(self, y_pred: Tensor, seed: Any = None) -> Tensor:
        """Draw a target for each prediction: (batch, ..., D) float32, or (batch, ...) classes.

        `seed` is an integer, a `keras.random.SeedGenerator` or None, as in `keras.random.normal`.
        """
        means, log_scales = self._parameters(y_pred)
        logs = _log_weights(y_pred)  # finite, although padding has no weights
        if log_scales is None:
            logs = ops.logsumexp(logs[..., None] + ops.log(means), axis=-2)
        drawn = keras.random.categorical(ops.reshape(logs, (-1, logs.shape[-1])), 1, seed=seed)
        drawn = ops.reshape(drawn, ops.shape(logs)[:-1])
        if log_scales is None:
            return drawn
        mean, log_scale = _of_expert(drawn, means), _of_expert(drawn, log_scales)
        seed = seed + 1 if isinstance(seed, int) else seed  # other numbers than those above
        return mean + ops.exp(log_scale) * keras.random.normal(ops.shape(mean), seed=seed)

    def mean(self, y_pred: Tensor) -> Tensor:
        """Return the mean of the mixture, (batch, ..., D); of classes their probabilities."""
        return self._average(y_pred, self._parameters(y_pred)[0])

    def variance(self, y_pred: Tensor) -> Tensor:
        """Return the variance of each target feature, or of each class, (batch, ..., D)."""
        means, log_scales = self._parameters(y_pred)
        mean = self._average(y_pred, means)
        if log_scales is None:
            return mean * (1 - mean)
        squares = ops.square(means - ops.expand_dims(mean, -2)) + ops.exp(2 * log_scales)
        return self._average(y_pred, squares)

    def mode(self, y_pred: Tensor) -> Tensor:
        """Return the mean of the expert with the highest peak (batch, ..., D), or the class."""
        means, log_scales = self._parameters(y_pred)
        if log_scales is None:
            return ops.argmax(self.mean(y_pred), axis=-1)
        peaks = _log_weights(y_pred) - ops.sum(log_scales, axis=-1)
        return _of_expert(ops.argmax(peaks, axis=-1), means)

    def _log_joint(self, y_true, y_pred, normalized):
        """Logarithms of `w_k p_k(y)`, (batch, ..., K)."""
        if self.distribution == "categorical":
            logs = ops.log_softmax(_outputs(y_pred), axis=-1)
            targets = ops.cast(_targets(y_true, logs.shape[:-2]), "float32")
            # -1 for any class, and the numbers of all classes.
            numbers = np.arange(-1, logs.shape[-1], dtype="float32")
            is_chosen = ops.equal(ops.expand_dims(targets, -1), numbers)
            # Only the chosen class: minus infinity times zero is NaN.
            chosen = ops.where(ops.expand_dims(is_chosen[..., 1:], -2), logs, 0.0)
            is_known = ops.expand_dims(ops.any(is_chosen, axis=-1), -1)
            return ops.where(is_known, _log_weights(y_pred) + ops.sum(chosen, axis=-1), math.nan)
        means, log_scales = self._parameters(y_pred)
        wanted = (*means.shape[:-2], means.shape[-1])
        targets = ops.expand_dims(ops.cast(_targets(y_true, wanted), "float32"), -2)
        distances = _squared_distances(targets - means, log_scales)
        if normalized:
            distances = distances + 2 * log_scales + math.log(2 * math.pi)
        return _log_weights(y_pred) - 0.5 * ops.sum(distances, axis=-1)

    def _parameters(self, y_pred):
        """Means (batch, ..., K, D) and logarithms of scales, None of classes."""
        outputs = _outputs(y_pred)
        if self.distribution == "categorical":
            return ops.softmax(outputs, axis=-1), None
        if self.scale is not None:
            return outputs, ops.full_like(outputs, math.log(self.scale))
        if outputs.shape[-1] % 2:
            rule = "With `scale=None` experts must have an even number of outputs, means and scales"
            raise ValueError(f"{rule}. Received: {outputs.shape[-1]} outputs")
        return tuple(ops.split(outputs, 2, axis=-1))

    def _average(self, y_pred, values):
        weights = ops.exp(_log_weights(y_pred))
        return ops.sum(ops.expand_dims(weights, -1) * values, axis=-2)

    def get_config(self):
        names = ("distribution", "scale", "normalized")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _squared_distances(residuals, log_scales):
    """`(residual / scale)^2`; past e^50 linear in its logarithm, so that gradients are finite."""
    is_zero = ops.abs(residuals) < 1e-15  # which have no logarithm
    logs = ops.log(ops.abs(ops.where(is_zero, 1.0, residuals))) - log_scales
    bounded = ops.minimum(2 * logs, 50.0)
    return ops.where(is_zero, 0.0, ops.exp(bounded) * (1 + 2 * logs - bounded))


def _log_weights(y_pred):
    return ops.convert_to_tensor(y_pred, "float32")[..., 0]


def _outputs(y_pred):
    y_pred = ops.convert_to_tensor(y_pred, "float32")
    if len(y_pred.shape) < 3:
        rule = "`y_pred` must have the shape (batch, ..., K, 1 + D') of `losses.pack_mixture`"
        raise ValueError(f"{rule}. Received: shape {tuple(y_pred.shape)}")
    return y_pred[..., 1:]


def _of_expert(number, values):
    """The values (batch, ..., K, D) of one expert (batch, ...) for each prediction."""
    chosen = ops.expand_dims(ops.one_hot(number, values.shape[-2], dtype=values.dtype), -1)
    return ops.sum(chosen * values, axis=-2)


def _targets(y_true, shape):
    """Targets of a shape; as in Keras's losses, a last axis of size 1 is optional."""
    targets = ops.convert_to_tensor(y_true)
    rank = len(targets.shape)
    if rank == len(shape) + 1 and targets.shape[-1] == 1:
        targets = ops.squeeze(targets, -1)
    elif rank == len(shape) - 1 and shape[-1] == 1:
        targets = ops.expand_dims(targets, -1)
    axes = "abcdefghij"[: len(shape)]
    check_tensors(dict(zip(axes, shape)), y_true=(targets, axes))
    return targets


def pack_mixture(routing: Routing, expert_outputs: Tensor) -> Tensor:
    """Combine weights and expert outputs in one tensor, the prediction of a mixture.

    The first entry of each expert is the logarithm of its weight.
    `MixtureNegativeLogLikelihood.unpack` returns the parts by name.

    Args:
        routing: `ops.Routing` of T tokens.
        expert_outputs: (batch, ..., K, D') float tensor of T tokens. Only the batch may be unknown.

    Returns:
        (batch, ..., K, 1 + D') float32 tensor.
    """
    check_is_routing(routing)
    weights, expert_outputs = routing.weights, ops.convert_to_tensor(expert_outputs)
    if expert_outputs.shape[-2] != weights.shape[-1]:
        rule = "`expert_outputs` must have an output for each weight of the routing"
        shapes = tuple(expert_outputs.shape), tuple(weights.shape)
        raise ValueError(f"{rule}. Received: shapes {shapes}")
    weights = ops.reshape(weights, (-1, *expert_outputs.shape[1:-1]))
    logs = ops.log(ops.where(weights > 0, weights, 1.0))
    logs = ops.expand_dims(ops.where(weights > 0, logs, _LOG_ZERO), -1)
    return _PackMixture(dtype="float32")(expert_outputs, logs)


@register
class _PackMixture(keras.layers.Layer):
    """A concatenation that passes on the mask of the expert outputs."""

    def compute_mask(self, expert_outputs, previous_mask):
        return None if previous_mask is None else previous_mask[..., 0]  # the same for all experts

    def call(self, expert_outputs, logs):
        return ops.concatenate([logs, expert_outputs], axis=-1)
