"""What routers with a learned map from tokens to logits have in common."""

import keras
from keras import ops

from keras_moe._internal.shape_checks import check_inputs_shape
from keras_moe._internal.validation import check_fraction, check_not_negative, check_seed
from keras_moe.ops import clean_logits, draws
from keras_moe.routers.router import Router


class LogitRouter(Router):
    """Abstract: a router whose logits are learned; linear, unless a subclass overrides `project`.

    Args:
        num_experts: number of experts, E.
        input_jitter: in training the router, not the experts, sees its inputs multiplied by noise
            uniform in `[1 - input_jitter, 1 + input_jitter]` (Switch uses 0.01). From 0 to below 1.
        logit_noise: in training, standard deviation of normal noise added to the logits.
        kernel_initializer: of the kernel (D, E). The default is normal with standard deviation
            0.02; zeros would send every token to the same experts.
        kernel_regularizer: of the kernel, or None.
        seed: integer seed of the noise, or None.
    """

    def __init__(
        self,
        num_experts=None,
        input_jitter=0.0,
        logit_noise=0.0,
        kernel_initializer=None,
        kernel_regularizer=None,
        seed=None,
        **kwargs,
    ):
        input_jitter = check_fraction("input_jitter", input_jitter)
        logit_noise = check_not_negative("logit_noise", logit_noise)
        seed = check_seed("seed", seed)
        super().__init__(num_experts, **kwargs)
        self.input_jitter = input_jitter
        self.logit_noise = logit_noise
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.RandomNormal(stddev=0.02, seed=seed)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.seed = seed
        self._noise_seed = keras.random.SeedGenerator(seed)

    def build(self, tokens_shape):
        check_inputs_shape(tokens_shape)
        self.input_spec = keras.layers.InputSpec(axes={-1: tokens_shape[-1]})
        self.kernel = self._add_kernel("kernel", self.kernel_shape(tokens_shape[-1]))

    def kernel_shape(self, features):
        return features, self.num_experts

    def project(self, tokens):
        """Logits (T, E) of tokens (T, D), without noise."""
        return ops.matmul(tokens, self.kernel)

    def logits(self, tokens, mask, training):
        """Logits (T, E) of tokens (T, D) with the noise of training, and a mask: `clean_logits`."""
        if training and self.input_jitter:
            noise = 2 * self._noise(draws.uniform, tokens) - 1
            tokens = tokens * (1 + self.input_jitter * noise)
        logits = self.project(tokens)
        if training and self.logit_noise:
            logits = logits + self.logit_noise * self._noise(draws.normal, logits)
        return clean_logits(logits, mask)

    def _add_kernel(self, name, shape, initializer=None):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer or self.kernel_initializer,
            regularizer=self.kernel_regularizer,
        )

    def _noise(self, draw, like):
        """Noise of the shape (R, C) of a tensor, from one of `ops.draws`."""
        return draw(ops.shape(like), self._noise_seed)

    def get_config(self):
        return {
            **super().get_config(),
            "input_jitter": self.input_jitter,
            "logit_noise": self.logit_noise,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "seed": self.seed,
        }
