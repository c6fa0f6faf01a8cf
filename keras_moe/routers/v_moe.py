"""The router of vision mixtures: fixed noise and raw probabilities."""

from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_not_negative, check_positive_integer
from keras_moe.ops import draws, make_routing, noisy_load, take_scores, top_k_indices
from keras_moe.ops.scores import softmax
from keras_moe.routers.logit_router import LogitRouter


@register
class VMoERouter(LogitRouter):
    """Top-k of a softmax whose logits have normal noise of deviation `noise_std / E` in training.

    The weights are the noisy probabilities themselves, not divided by their sum. `probs`, and with
    them `losses.ImportanceVariation`, are without noise.

    Args:
        num_experts: number of experts, E.
        top_k: experts per token, K, from 1 to E.
        noise_std: standard deviation of the noise times E, at least 0.
        **kwargs: `input_jitter`, `logit_noise`, `kernel_initializer`, `kernel_regularizer` and
            `seed`, as in `TopKRouter`, and `name`.

    Raises:
        ValueError: If an argument is out of its range.

    Call arguments:
        tokens: (T, D) float tensor.
        mask: (T,) bool tensor, False for padding, or None.
        training: whether noise is drawn.

    Returns:
        An `ops.Routing`.

    Example:

    >>> router = keras_moe.routers.VMoERouter(num_experts=8)
    >>> router(keras.random.normal((32, 64)), training=True).indices.shape
    (32, 2)

    Reference: Riquelme et al. 2021 (arXiv:2106.05974), section 2.2 and appendix A.
    """

    default_losses = ("importance_variation", "load_variation")

    _attribute_checks = {"top_k": check_positive_integer, "noise_std": check_not_negative}

    def __init__(self, num_experts=None, top_k=2, noise_std=1.0, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.top_k = top_k
        self.noise_std = noise_std

    def route(self, tokens, mask, training):
        clean, mask = self.checked_logits(tokens, mask, training)
        noisy, load = clean, None
        if training and self.noise_std:
            deviation = self.noise_std / self.num_experts
            noisy = clean + deviation * self._noise(draws.normal, clean)
            load = noisy_load(clean, noisy, deviation, self.top_k, mask)
        scores = softmax(noisy)
        indices = top_k_indices(scores, self.top_k)
        weights = take_scores(scores, indices)
        return make_routing(indices, weights, softmax(clean), clean, mask, load=load)

    def get_config(self):
        return {**super().get_config(), "top_k": self.top_k, "noise_std": self.noise_std}
