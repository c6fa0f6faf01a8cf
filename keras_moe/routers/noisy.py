"""Routers whose choices are random in training."""

from typing import Any

from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.serialization import register
from keras_moe.backend import backend
from keras_moe.ops import draws
from keras_moe.ops.routing import Routing, weigh
from keras_moe.ops.selection import chosen_experts, softmax, take_scores, top_k_indices
from keras_moe.routers.logit_router import LogitRouter


@backend.jit_when_eager
def noisy_load(clean, noisy, deviation, top_k, mask):
    """Expected assignments (E,) of each expert if its own noise were drawn again.

    The probability that the logit of an expert, with new noise, is above the best K others: a load
    with a gradient. Shazeer et al. 2017 (arXiv:1701.06538), eq. 8 to 10. `clean` and `noisy` are
    logits (T, E), `deviation` (T, E), or a number, is the standard deviation of the noise.
    """
    num_experts = noisy.shape[-1]
    if top_k == num_experts:
        return ops.sum(ops.cast(ops.expand_dims(mask, 1), "float32") + 0.0 * clean, axis=0)
    best = top_k_indices(noisy, top_k + 1)
    values = take_scores(noisy, best)
    last_in, first_out = values[:, top_k - 1 : top_k], values[:, top_k:]
    is_in = chosen_experts(best[:, :top_k], num_experts)
    threshold = ops.where(is_in, first_out, last_in)
    chance = 0.5 * (1.0 + ops.erf((clean - threshold) / (deviation * 2**0.5)))
    return ops.sum(ops.where(ops.expand_dims(mask, 1), chance, 0.0), axis=0)


class NoisyRouter(LogitRouter):
    """Abstract: top-k of the softmax of logits that have normal noise in training.

    The noise makes the load a smooth function, which `losses.LoadVariation` can balance. A subclass
    implements `deviation(tokens)`.
    """

    has_smooth_load = True
    default_losses = ("importance_variation", "load_variation")
    # Whether the weights are divided by their sum, if there are several.
    renormalizes = False

    def __init__(self, num_experts: int | None = None, top_k: int = 2, **kwargs: Any):
        super().__init__(num_experts, **kwargs)
        self.top_k = check_integer("top_k", top_k)
        self.check_num_experts()

    def deviation(self, tokens: Tensor) -> Tensor | float:
        """Return the standard deviation of the noise: a tensor (T, E) or a float."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `deviation`")

    def route(self, tokens, mask, training, **context):
        clean = self.logits(tokens, training)
        noisy, load = clean, None
        deviation = self.deviation(tokens) if training else 0.0
        if not isinstance(deviation, float) or deviation:
            noisy = clean + deviation * self._noise(draws.normal, clean)
            load = noisy_load(clean, noisy, deviation, self.top_k, mask)
        scores = softmax(noisy)
        indices = top_k_indices(scores, self.top_k)
        weights, _ = weigh(indices, noisy, scores, "softmax", None if self.renormalizes else False)
        return Routing(indices, weights, softmax(clean), clean, mask, load=load)


@register
class NoisyTopKRouter(NoisyRouter):
    """Top-k routing with noise of a learned size for each token and expert.

    `H = x W + N(0, 1) * (softplus(x W_noise) + 0.01)` in training, `x W` in evaluation; the weights
    are a softmax over the K largest of H.

    Args:
        top_k: Integer. Experts per token, K, at most E. With 1 the softmax is over all experts.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.

    Reference: Shazeer et al. 2017 (arXiv:1701.06538), eq. 3 to 5 and 8 to 10; the smallest noise as
    in tensor2tensor.
    """

    renormalizes = True

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.noise_kernel = self.add_weight(self.kernel.shape, "zeros", name="noise_kernel")

    def deviation(self, tokens):
        if self.hidden_dim:
            tokens = self.hidden_features(tokens)
        return ops.softplus(ops.matmul(tokens, self.noise_kernel)) + 0.01


@register
class VMoERouter(NoisyRouter):
    """Top-k of a softmax whose logits have normal noise of deviation `noise_std / E` in training.

    The weights are the noisy probabilities themselves, not divided by their sum. `probs`, and with
    them `losses.ImportanceVariation`, are without noise.

    Args:
        top_k: Integer. Experts per token, K, at most E.
        noise_std: Float. Standard deviation of the noise times E.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.

    Reference: Riquelme et al. 2021 (arXiv:2106.05974), section 2.2 and appendix A.
    """

    def __init__(
        self, num_experts: int | None = None, top_k: int = 2, noise_std: float = 1.0, **kwargs: Any
    ):
        super().__init__(num_experts, top_k, **kwargs)
        self.noise_std = check_number("noise_std", noise_std)

    def deviation(self, tokens):
        return self.noise_std / self.num_experts


@register
class GShardRouter(LogitRouter):
    """Two experts per token; in training the second is used at random, in proportion to its weight.

    The two best probabilities are divided by their sum. In training the second expert is kept with
    probability `min(1, weight / threshold)`, in evaluation always.

    Args:
        threshold: Float above 0. Weight above which the second expert is always kept.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.

    Reference: Lepikhin et al. 2020 (arXiv:2006.16668), section 2.2; the threshold as in Mesh
    TensorFlow, which draws in evaluation too.
    """

    top_k = 2

    def __init__(self, num_experts: int | None = None, *, threshold: float = 0.2, **kwargs: Any):
        super().__init__(num_experts, **kwargs)
        self.threshold = check_number("threshold", threshold, above=0)
        self.check_num_experts()

    def route(self, tokens, mask, training, **context):
        logits = self.logits(tokens, training)
        probs = softmax(logits)
        indices = top_k_indices(probs, self.top_k)
        weights, _ = weigh(indices, logits, probs, "softmax")
        if training:
            second = ops.stop_gradient(weights[:, 1:])
            kept = self._noise(draws.uniform, second) * self.threshold < second
            kept = ops.concatenate([ops.ones_like(weights[:, :1], "bool"), kept], axis=1)
            indices = ops.where(kept, indices, -1)
            weights = ops.where(kept, weights, 0.0)
        return Routing(indices, weights, probs, logits, mask)
