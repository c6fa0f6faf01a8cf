"""What is compared: a MoE layer, its dense twin, and the same experts all run on all tokens."""

import keras
import numpy as np
from keras import ops

from keras_moe import layers, routers


def mixture(num_experts, options, skew="balanced"):
    return mixture_of(skewed_router(num_experts, options, skew), options)


def mixture_of(router, options, **kwargs):
    bank = layers.GatedExperts if options.gated else layers.FeedForwardExperts
    experts = bank(router.num_experts, options.hidden, activation=options.activation)
    layer = layers.MixtureOfExperts(experts, router, **kwargs)
    layer.build((None, options.features))
    return layer


def skewed_router(num_experts, options, skew="balanced"):
    """A router of unit-variance tokens whose load leans to low-numbered experts.

    One feature of the tokens, which `tokens` sets to 1, carries the lean.
    """
    rank = np.arange(1, num_experts + 1)
    lean = {
        "balanced": np.zeros(num_experts),
        "zipf": -np.log(rank),
        "all-to-one": np.where(rank <= options.top_k, 0.0, -1e4),
    }[skew]

    def kernel(shape, dtype=None):
        values = np.random.default_rng(2).standard_normal(shape) * shape[0] ** -0.5
        values[0] = lean
        return ops.convert_to_tensor(values, dtype)

    return routers.TopKRouter(num_experts, options.top_k, kernel_initializer=kernel)


def tokens(num_tokens, options, seed=0):
    """Normal tokens, (T, D) float32, whose first feature is 1."""
    values = np.random.default_rng(seed).standard_normal((num_tokens, options.features))
    values[:, 0] = 1.0
    return values.astype("float32")


def contest(options):
    """Functions that build the dense twin and a mixture of each number of experts, by name."""
    builders = {"dense twin": lambda: DenseTwin(options)}
    for number in options.experts:
        builders[f"E={number}"] = lambda number=number: mixture(number, options)
    return builders


class DenseTwin(keras.layers.Layer):
    """One feed-forward network as wide as the experts that serve a token, together."""

    def __init__(self, options):
        super().__init__()
        self.supports_masking = True
        # As in the banks, gated networks have no biases.
        gated, activation = options.gated, options.activation
        width, use_bias = options.top_k * options.hidden, not gated
        self.up = keras.layers.Dense(width, None if gated else activation, use_bias)
        self.gate = keras.layers.Dense(width, activation, use_bias) if gated else None
        self.down = keras.layers.Dense(options.features, use_bias=use_bias)
        self.build((None, options.features))

    def build(self, shape):
        self.up.build(shape)
        self.down.build((None, self.up.units))
        if self.gate is not None:
            self.gate.build(shape)

    def call(self, x, training=None):
        hidden = self.up(x)
        if self.gate is not None:
            hidden = self.gate(x) * hidden
        return self.down(hidden)

    def compute_output_shape(self, shape):
        return shape


class AllExperts(keras.layers.Layer):
    """The experts of a MoE layer all run on all tokens, those not chosen with a weight of zero."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture
        self.built = True

    def call(self, x, training=None):
        routing = self.mixture.router(x)
        bank = self.mixture.experts
        chosen = ops.one_hot(routing.indices, bank.num_experts)
        weights = ops.sum(chosen * ops.expand_dims(routing.weights, -1), axis=1)
        # One copy for each expert: XLA is slow where it broadcasts inside a product.
        copies = ops.broadcast_to(x, (bank.num_experts, *x.shape))
        hidden = self._project(copies, "up")
        if hasattr(bank, "gate_kernel"):
            hidden = bank.activation(self._project(copies, "gate")) * hidden
        else:
            hidden = bank.activation(hidden)
        outputs = self._project(hidden, "down")
        return ops.einsum("etd,te->td", outputs, ops.cast(weights, self.compute_dtype))

    def _project(self, x, name):
        bank = self.mixture.experts
        outputs = ops.matmul(x, ops.cast(getattr(bank, f"{name}_kernel"), self.compute_dtype))
        if bank.use_bias:
            bias = ops.cast(getattr(bank, f"{name}_bias"), self.compute_dtype)
            outputs = outputs + ops.expand_dims(bias, 1)
        return outputs

    def compute_output_shape(self, shape):
        return shape
