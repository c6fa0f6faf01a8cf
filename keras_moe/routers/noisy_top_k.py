"""Noise that the router learns."""

from keras import ops

from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_positive_integer
from keras_moe.ops import draws, make_routing, noisy_load, take_scores, top_k_indices
from keras_moe.ops.scores import distribution, softmax
from keras_moe.routers.logit_router import LogitRouter


@register
class NoisyTopKRouter(LogitRouter):
    """Top-k routing with noise of a learned size for each token and expert.

    `H = x W + N(0, 1) * (softplus(x W_noise) + 0.01)` in training, `x W` in evaluation; the weights
    are a softmax over the K largest of H. The noise makes the load a smooth function, which
    `losses.LoadVariation` evens out.

    Args:
        num_experts: number of experts, E.
        top_k: experts per token, K, from 1 to E. With 1 the weight is the probability among all
            experts, as the softmax over one alone would be 1 and have no gradient.
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

    >>> router = keras_moe.routers.NoisyTopKRouter(num_experts=8)
    >>> router(keras.random.normal((32, 64)), training=True).indices.shape
    (32, 2)

    Reference: Shazeer et al. 2017 (arXiv:1701.06538), eq. 3 to 5 and 8 to 10. The smallest noise is
    that of tensor2tensor.
    """

    default_losses = ("importance_variation", "load_variation")

    _attribute_checks = {"top_k": check_positive_integer}

    def __init__(self, num_experts=None, top_k=2, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.top_k = top_k

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.noise_kernel = self.add_weight(
            name="noise_kernel", shape=self.kernel.shape, initializer="zeros"
        )

    def route(self, tokens, mask, training):
        clean, mask = self.checked_logits(tokens, mask, training)
        noisy, load = clean, None
        if training:
            deviation = ops.softplus(ops.matmul(tokens, self.noise_kernel)) + 0.01
            noisy = clean + deviation * self._noise(draws.normal, clean)
            load = noisy_load(clean, noisy, deviation, self.top_k, mask)
        scores = softmax(noisy)
        indices = top_k_indices(scores, self.top_k)
        weights = take_scores(scores, indices)
        if self.top_k > 1:
            weights = distribution(weights)
        return make_routing(indices, weights, softmax(clean), clean, mask, load=load)

    def get_config(self):
        return {**super().get_config(), "top_k": self.top_k}
