"""One MoE layer against a dense layer of the same active size.

    KERAS_BACKEND=jax python -m benchmarks.layer --experts 8 64

The dense twin is one feed-forward network of width K * H with the same activation and biases, on
the same backend, compiled the same way.
"""

import argparse

import keras
import numpy as np

from benchmarks.measure import interleave, print_table, summarise, write_json
from benchmarks.steps import compiled_step
from keras_moe import layers, routers


def main():
    arguments = parse()
    keras.utils.set_random_seed(0)
    if arguments.dtype != "float32":
        keras.config.set_dtype_policy(f"mixed_{arguments.dtype}")
    inputs = np.random.default_rng(0).standard_normal((arguments.tokens, arguments.features))
    inputs = inputs.astype("float32")
    rows = []
    for backward in (False, True):
        contestants = {"dense twin": step(dense_twin(arguments), inputs, backward, arguments)}
        for num_experts in arguments.experts:
            for skew in arguments.skew:
                layer = mixture(num_experts, skew, arguments)
                name = f"E={num_experts} {skew}"
                contestants[name] = step(layer, inputs, backward, arguments)
        times, first = interleave(contestants, arguments.rounds)
        table = summarise(times, first, "dense twin")
        direction = "forward+backward" if backward else "forward"
        print_table(table, f"{keras.backend.backend()}, {direction}, {describe(arguments)}")
        rows += [{**row, "pass": direction} for row in table]
    write_json(f"layer-{keras.backend.backend()}{arguments.tag}", vars(arguments), rows)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="T")
    parser.add_argument("--features", type=int, default=256, help="D")
    parser.add_argument("--hidden", type=int, default=1024, help="H")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64], help="E")
    parser.add_argument("--top-k", type=int, default=2, help="K")
    parser.add_argument("--gated", action="store_true", help="gated experts and twin")
    parser.add_argument("--activation", default=None, help="default: gelu, or silu when gated")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--skew", nargs="+", default=["balanced"], choices=["balanced", "zipf", "all-to-one"]
    )
    parser.add_argument("--no-xla", action="store_true", help="TensorFlow graph without XLA")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tag", default="", help="ending of the name of the JSON file")
    return parser.parse_args()


def describe(arguments):
    return (
        f"T={arguments.tokens} D={arguments.features} H={arguments.hidden} K={arguments.top_k} "
        f"{arguments.dtype}{' gated' if arguments.gated else ''}"
        f"{' without XLA' if arguments.no_xla else ''}"
    )


def step(layer, inputs, backward, arguments):
    if not layer.built:
        layer.build(inputs.shape)
    return compiled_step(layer, inputs, backward, jit=not arguments.no_xla)


def mixture(num_experts, skew, arguments):
    bank = layers.GatedExperts if arguments.gated else layers.FeedForwardExperts
    activation = {"activation": arguments.activation} if arguments.activation else {}
    experts = bank(num_experts, arguments.hidden, **activation)
    router = SkewedRouter(num_experts, arguments.top_k, skew)
    return layers.MixtureOfExperts(experts, router=router)


class SkewedRouter(routers.TopKRouter):
    """A router whose logits lean to low-numbered experts by a fixed amount."""

    def __init__(self, num_experts, top_k, skew):
        super().__init__(num_experts, top_k, kernel_initializer=keras.initializers.Zeros())
        generator = np.random.default_rng(2)
        rank = np.arange(1, num_experts + 1)
        lean = {
            "balanced": np.zeros(num_experts),
            "zipf": -np.log(rank),
            "all-to-one": np.where(rank <= top_k, 0.0, -1e4),
        }[skew]
        self._lean = lean.astype("float32")
        self._generator = generator

    def build(self, tokens_shape):
        super().build(tokens_shape)
        scale = tokens_shape[-1] ** -0.5
        kernel = self._generator.standard_normal(self.kernel.shape) * scale
        self.kernel.assign(kernel.astype("float32"))

    def route(self, tokens, mask, training):
        from keras_moe.ops import top_k_routing

        logits = keras.ops.matmul(tokens, self.kernel) + keras.ops.convert_to_tensor(self._lean)
        return top_k_routing(logits, self.top_k, mask)


def dense_twin(arguments):
    width = arguments.top_k * arguments.hidden
    if arguments.gated:
        return GatedDense(width, arguments.features, arguments.activation or "silu")
    return keras.Sequential(
        [
            keras.layers.Dense(width, activation=arguments.activation or "gelu"),
            keras.layers.Dense(arguments.features),
        ]
    )


class GatedDense(keras.layers.Layer):
    """The dense twin of gated experts."""

    def __init__(self, width, features, activation):
        super().__init__()
        self.gate = keras.layers.Dense(width, activation=activation, use_bias=False)
        self.up = keras.layers.Dense(width, use_bias=False)
        self.down = keras.layers.Dense(features, use_bias=False)

    def build(self, shape):
        self.gate.build(shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], self.gate.units))

    def call(self, x):
        return self.down(self.gate(x) * self.up(x))

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.down.units)


if __name__ == "__main__":
    main()
