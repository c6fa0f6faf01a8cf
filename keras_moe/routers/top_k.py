"""The router of most sparse models: softmax scores and the k best experts."""

import keras
from keras import ops

from keras_moe.ops.routing import top_k_routing
from keras_moe.routers.router import Router
from keras_moe.serialization import register
from keras_moe.validation import check_fraction, check_not_negative, check_positive_integer


@register
class TopKRouter(Router):
    """Each token goes to the `top_k` experts with the highest softmax scores.

    With `top_k=1` the combine weight is the probability itself, so that the router learns from the
    task (Switch Transformer, Fedus et al. 2021, arXiv:2101.03961). With more, the chosen
    probabilities are divided by their sum (Mixtral, Jiang et al. 2024, arXiv:2401.04088).

    Args:
        num_experts: number of experts, E.
        top_k: experts per token, K, from 1 to E.
        input_jitter: in training the router, not the experts, sees its inputs multiplied by noise
            uniform in `[1 - input_jitter, 1 + input_jitter]` (Switch uses 0.01). From 0 to below 1.
        logit_noise: in training, standard deviation of normal noise added to the logits.
        kernel_initializer: of the kernel (D, E). The default is normal with standard deviation
            0.02; zeros would send every token to the same experts.
        kernel_regularizer: of the kernel, or None.
        seed: integer seed of the noise, or None.
        **kwargs: `name` and the other arguments of a Keras layer. `dtype` is always float32.

    Raises:
        ValueError: If an argument is out of its range.

    Call arguments:
        tokens: (T, D) float tensor.
        mask: (T,) bool tensor, False for padding, or None.
        training: whether jitter and noise are applied.

    Returns:
        An `ops.Routing`.

    Example:

    >>> router = keras_moe.routers.TopKRouter(num_experts=8, top_k=2)
    >>> routing = router(keras.random.normal((32, 64)))
    >>> routing.indices.shape, routing.probs.shape
    ((32, 2), (32, 8))
    """

    def __init__(
        self,
        num_experts,
        top_k=2,
        input_jitter=0.0,
        logit_noise=0.0,
        kernel_initializer=None,
        kernel_regularizer=None,
        seed=None,
        **kwargs,
    ):
        check_positive_integer("num_experts", num_experts)
        check_positive_integer("top_k", top_k)
        if top_k > num_experts:
            raise ValueError(
                "`top_k` must be at most `num_experts`: a token cannot go to more experts than "
                f"there are. Received: top_k={top_k}, num_experts={num_experts}. "
                f"Pass `routers.TopKRouter({num_experts}, top_k={num_experts})` or fewer."
            )
        check_fraction("input_jitter", input_jitter)
        check_not_negative("logit_noise", logit_noise)
        super().__init__(num_experts, **kwargs)
        self.top_k = top_k
        self.input_jitter = input_jitter
        self.logit_noise = logit_noise
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.RandomNormal(stddev=0.02, seed=seed)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.seed = seed
        self._noise_seed = keras.random.SeedGenerator(seed)

    def build(self, tokens_shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(tokens_shape[-1], self.num_experts),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
        )

    def route(self, tokens, mask, training):
        if training and self.input_jitter:
            low, high = 1.0 - self.input_jitter, 1.0 + self.input_jitter
            tokens = tokens * self._noise(keras.random.uniform, tokens, minval=low, maxval=high)
        logits = ops.matmul(tokens, self.kernel)
        if training and self.logit_noise:
            noise = self._noise(keras.random.normal, logits, stddev=self.logit_noise)
            logits = logits + noise
        return top_k_routing(logits, self.top_k, mask)

    def _noise(self, distribution, like, **kwargs):
        return distribution(ops.shape(like), dtype="float32", seed=self._noise_seed, **kwargs)

    def get_config(self):
        return {
            **super().get_config(),
            "top_k": self.top_k,
            "input_jitter": self.input_jitter,
            "logit_noise": self.logit_noise,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "seed": self.seed,
        }
