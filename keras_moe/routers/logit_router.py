"""Routers with a learned map from tokens to logits."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_integer, check_number, check_tensors
from keras_moe.ops import draws
from keras_moe.ops.sorting import as_dtype
from keras_moe.routers.router import Router


class LogitRouter(Router):
    """Abstract: a router whose logits are learned; linear, unless a subclass overrides `project`.

    Args:
        input_jitter: Float from 0 to below 1. In training the inputs of the router, not of the
            experts, are multiplied by uniform noise in `[1 - input_jitter, 1 + input_jitter]`
            (Switch uses 0.01).
        logit_noise: Float. In training, standard deviation of normal noise added to the logits.
        kernel_initializer: Initializer of the kernel (D, E). The default is normal with standard
            deviation 0.02; zeros would send every token to the same experts.
        kernel_regularizer: Regularizer of the kernel, or None, such as
            `keras.regularizers.OrthogonalRegularizer(mode="columns")` (arXiv:2506.14038).
        seed: Integer seed of the noise, or None.
        hidden_dim: Integer or None. Width H of a hidden layer with ReLU before the kernel (H, E).
        temperature: Float above 0. Logits are divided by it: scores are sharper below 1.

    Other arguments, errors, call arguments and returns: as for `Router`.
    """

    has_logits = True
    surgeries: tuple = ("cut", "merge")

    def __init__(
        self,
        num_experts: int | None = None,
        *,
        input_jitter: float = 0.0,
        logit_noise: float = 0.0,
        kernel_initializer: str | Callable | None = None,
        kernel_regularizer: str | Callable | None = None,
        seed: int | None = None,
        hidden_dim: int | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(num_experts, **kwargs)
        self.input_jitter = check_number("input_jitter", input_jitter, below=1)
        self.logit_noise = check_number("logit_noise", logit_noise)
        self.seed = None if seed is None else check_integer("seed", seed, minimum=0)
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.RandomNormal(stddev=0.02, seed=self.seed)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.hidden_dim = None if hidden_dim is None else check_integer("hidden_dim", hidden_dim)
        self.temperature = check_number("temperature", temperature, above=0)
        self._noise_seed = keras.random.SeedGenerator(self.seed)

    def build(self, tokens_shape):
        features = tokens_shape[-1]
        self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: features})
        if self.hidden_dim:
            shape, glorot = (features, self.hidden_dim), keras.initializers.GlorotUniform(self.seed)
            self.hidden_kernel = self._add_kernel("hidden_kernel", shape, glorot)
            self.hidden_bias = self.add_weight((self.hidden_dim,), "zeros", name="hidden_bias")
            features = self.hidden_dim
        self.kernel = self._add_kernel("kernel", self.kernel_shape(features))

    def kernel_shape(self, features: int) -> tuple[int, ...]:
        """Return the shape of the kernel for tokens of a width."""
        return features, self.num_experts

    def project(self, tokens: Tensor) -> Tensor:
        """Return logits (T, E) of tokens (T, D) without noise: their products with the kernel."""
        return ops.matmul(tokens, self.kernel)

    def logits(self, tokens: Tensor, training: bool | None) -> Tensor:
        """Return logits (T, E) in float32, in training with noise."""
        if training and self.input_jitter:
            noise = 2 * self._noise(draws.uniform, tokens) - 1
            tokens = tokens * (1 + self.input_jitter * noise)
        if self.hidden_dim:
            tokens = self.hidden_features(tokens)
        logits = as_dtype(self.project(tokens), "float32")
        if self.temperature != 1:
            logits = logits / self.temperature
        if training and self.logit_noise:
            logits = logits + self.logit_noise * self._noise(draws.normal, logits)
        return logits

    def hidden_features(self, tokens: Tensor) -> Tensor:
        """Return the inputs (T, H) of `project` where there is a hidden layer."""
        return ops.relu(ops.matmul(tokens, self.hidden_kernel) + self.hidden_bias)

    def _noise(self, draw, like):
        return draw(ops.shape(like), self._noise_seed)

    def _add_kernel(self, name, shape, initializer=None):
        kernel = self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer or self.kernel_initializer,
            regularizer=self.kernel_regularizer,
        )
        # Keras does not compare them.
        check_tensors(dict(zip("DE", shape)), kernel_initializer=(kernel.value, "DE"))
        return kernel

    @classmethod
    def from_config(cls, config):
        # Version 0.2 had LoRA in routers, whose corrections are in the saved kernels.
        former = ("lora_rank", "lora_alpha")
        return super().from_config({key: config[key] for key in config if key not in former})
