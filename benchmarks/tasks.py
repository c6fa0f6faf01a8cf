"""Many tasks and whole samples, in CPU time of a training step.

    KERAS_BACKEND=jax python -m benchmarks.tasks

- MMoE and PLE with dense gates against the same written by hand of Keras's `Dense` layers, with the
  same weights; `max_difference` is that of their outputs.
- MMoE with top-2 gates against dense gates, 16 wide experts and 2 tasks.
- Whole images: 8 convolutional experts, one of which serves an image, against one of them.
"""

import time

import keras
import numpy as np
from keras import ops

from benchmarks.measure import BACKEND, describe, interleave, parse, parser, publish, summarise
from benchmarks.steps import compiled_step
from keras_moe import layers, routers

TASKS = 2


def main(arguments=None):
    options = parser(__doc__, tokens=[2048], hidden=256, experts=[8])
    options.add_argument("--wide", type=int, nargs=3, default=(8192, 1024, 16), help="T, H and E")
    options.add_argument("--image", type=int, nargs=2, default=(256, 32), help="number and width")
    options = parse(options, arguments, wide=(32, 16, 4), image=(8, 8), experts=[2])
    rows = []
    for about, inputs, contestants in races(options):
        baseline = list(contestants)[0]
        outputs = [ops.convert_to_numpy(layer(inputs)) for layer in contestants.values()]
        steps = {
            name: compiled_step(layer, inputs, jit=options.xla)
            for name, layer in contestants.items()
        }
        table = summarise(*interleave(steps, options.rounds, time.process_time), baseline)
        if "by hand" in baseline:
            table[1]["max_difference"] = float(np.abs(outputs[1] - outputs[0]).max())
        rows += [{**row, **about} for row in table]
        del contestants, steps
    return publish(f"tasks-{BACKEND}", f"{describe(options)}, CPU time", options, rows)


def races(options):
    """Tuples of what is the same, inputs, and contestants by name, the baseline first."""
    (num_tokens,), features = options.tokens, options.features
    for number in options.experts:
        about = {"tokens": num_tokens, "experts": number}
        for name, num_own in (("MMoE", 0), ("PLE", max(number // 4, 1))):
            layer = many_tasks(number - num_own, options.hidden, features, "dense", num_own)
            pair = {f"{name} by hand": ByHand(layer), f"{name} of keras_moe": layer}
            yield about, normal(num_tokens, features), pair
    num_tokens, hidden, number = options.wide
    gates = {"dense gates": "dense", "top-2 gates": routers.TopKRouter(top_k=2)}
    wide = {name: many_tasks(number, hidden, features, gate) for name, gate in gates.items()}
    yield {"tokens": num_tokens, "experts": number}, normal(num_tokens, features), wide
    number, width = options.image
    images = normal(number, width, width, 3)
    bank = layers.LayerExperts([convolutions() for _ in range(8)])
    sparse = layers.MixtureOfExperts(bank, routers.TopKRouter(top_k=1), token_axes=1)
    contestants = {"one network": convolutions(), "8 networks, top-1": sparse}
    for layer in contestants.values():
        layer.build(images.shape)
    yield {"tokens": number, "experts": 8}, images, contestants


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def convolutions():
    return keras.Sequential(
        [
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )


def many_tasks(number, hidden, features, router, num_own=0):
    """A layer of all tasks, whose outputs are one tensor."""
    own = [layers.FeedForwardExperts(num_own, hidden) for _ in range(TASKS)] if num_own else None
    layer = layers.MultiGateMixtureOfExperts(
        layers.FeedForwardExperts(number, hidden), TASKS, router, task_experts=own
    )
    return Joined(layer, features)


class Joined(keras.layers.Layer):
    """The outputs of all tasks side by side."""

    def __init__(self, layer, features):
        super().__init__()
        self.layer, self.features = layer, features
        self.build((None, features))

    def build(self, shape):
        self.layer.build(shape)

    def call(self, x, training=None):
        return ops.concatenate(self.layer(x, training=training), axis=-1)

    def compute_output_shape(self, shape):
        return (*shape[:-1], TASKS * self.features)


class ByHand(keras.layers.Layer):
    """The same of `Dense` layers, as people write it: each expert is called once."""

    def __init__(self, joined):
        super().__init__()
        layer, self.features = joined.layer, joined.features
        self.shared = _dense_experts(layer.experts, self.features)
        self.own = [_dense_experts(bank, self.features) for bank in layer.task_experts]
        self.gates = []
        for task in layer.tasks:
            gate = keras.layers.Dense(task.router.num_experts, "softmax", use_bias=False)
            gate.build((None, self.features))
            gate.kernel.assign(task.router.kernel)
            self.gates.append(gate)
        self.built = True

    def call(self, x, training=None):
        shared = [expert(x) for expert in self.shared]
        tasks = []
        for number, gate in enumerate(self.gates):
            own = [expert(x) for expert in self.own[number]] if self.own else []
            outputs = ops.stack([*shared, *own], axis=1)
            tasks.append(ops.einsum("te,ted->td", gate(x), outputs))
        return ops.concatenate(tasks, axis=-1)

    def compute_output_shape(self, shape):
        return (*shape[:-1], TASKS * self.features)


def _dense_experts(bank, features):
    experts = []
    for number in range(bank.num_experts):
        up = keras.layers.Dense(bank.up_kernel.shape[-1], bank.activation)
        expert = keras.Sequential([keras.Input((features,)), up, keras.layers.Dense(features)])
        stacks = (bank.up_kernel, bank.up_bias, bank.down_kernel, bank.down_bias)
        expert.set_weights([ops.convert_to_numpy(stack)[number] for stack in stacks])
        experts.append(expert)
    return experts


if __name__ == "__main__":
    main()
