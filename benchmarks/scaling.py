"""What each device does as devices are added: products, bytes it receives, and scratch memory.

    KERAS_BACKEND=jax python -m benchmarks.scaling

Devices are virtual, on one CPU: what is counted is exact, times would mean nothing. A step is a
forward and backward pass of one layer. `data` splits tokens only, `expert` splits experts as well,
over all devices. Weak scaling: every device brings `--tokens` tokens. Strong scaling: there are
eight times `--tokens`, however many devices share them. Loads are balanced. The columns:

- gflops: matrix products executed by the busiest device, every trip of every loop.
- ratio: to one device's, in strong scaling to one device's divided by the number of devices.
- gather_mb and so on: what a device receives, where devices pass data on in a ring.
- kernels_mb: what of that are kernels. Gradients of kernels are in reduce_mb.
- temp_mb: the compiler's memory for what is neither an argument nor a result, on one device.
- temp_ratio: to one device's with as many tokens as each has here.
"""

import os

import keras
import numpy as np

from benchmarks import contestants
from benchmarks.measure import BACKEND, describe, in_fresh_process, parse, parser, publish, say
from keras_moe import routers

NUM_DEVICES = (1, 2, 4, 8)


def main(arguments=None):
    defaults = {"tokens": [1024], "experts": [8]}
    options = parse(parser(__doc__, **defaults), arguments, tokens=[64], experts=[8])
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={max(NUM_DEVICES)}"
    rows = in_fresh_process(examine_all, options)
    title = f"{describe(options)} T={options.tokens[0]}, forward+backward, each device"
    return publish(f"scaling-{BACKEND}", title, options, rows)


def examine_all(options):
    (tokens,) = options.tokens
    rows = []
    for scale in ("weak", "strong"):
        for kind in ("data", "expert"):
            one: dict = {}
            for number in NUM_DEVICES:
                total = tokens * (number if scale == "weak" else max(NUM_DEVICES))
                row = examine(kind, number, total, options)
                one = one or row
                share = number if scale == "strong" else 1
                ratios = {"ratio": row["gflops"] * share / one["gflops"]}
                if scale == "weak":
                    ratios["temp_ratio"] = row["temp_mb"] / one["temp_mb"]
                rows.append({"name": f"{scale} {kind} {number}", **row, **ratios})
    return rows


def examine(kind, number, num_tokens, options):
    """The row of a layer on so many devices."""
    say(f"{kind}, {number} devices, {num_tokens} tokens")
    from benchmarks.collectives import collectives, megabytes
    from benchmarks.device_flops import device_flops
    from benchmarks.steps import jax_function
    from keras_moe.distribution import expert_parallel

    devices = keras.distribution.list_devices()[:number]
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=devices)
        if kind == "data"
        else expert_parallel(number, devices=devices)
    )
    # Its kernel sends each of `balanced_tokens` where its first features are largest.
    router = routers.TopKRouter(*options.experts, options.top_k, kernel_initializer="identity")
    layer = contestants.mixture_of(router, options)
    function, (trainable, x, fixed, weight) = jax_function(
        layer, balanced_tokens(num_tokens, options), backward=True, training=True
    )
    arguments = trainable, placed(x), fixed, placed(weight)
    compiled = function.lower(*arguments).compile()
    inside, outside = device_flops(function, arguments)
    text = compiled.as_text()
    widths = {options.features, options.hidden}
    kernels = sum(
        each.bytes
        for each in collectives(text)
        if each.kind != "all-reduce"
        and any(len(shape) == 3 and set(shape[1:]) == widths for shape in each.shapes)
    )
    keras.distribution.set_distribution(None)
    return {
        "gflops": float(np.max(inside) + outside / number) / 1e9,
        **megabytes(text),
        "kernels_mb": kernels / 1e6,
        "temp_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }


def placed(x):
    """A batch where the distribution has it."""
    import jax

    layout = keras.distribution.distribution().get_data_layout(x.shape)
    return jax.device_put(x, layout.backend_layout)


def balanced_tokens(num_tokens, options):
    """Tokens (T, D) that give every expert as many, of each K * E neighbours as well."""
    (num_experts,) = options.experts
    values = np.random.default_rng(0).standard_normal((num_tokens, options.features))
    token = np.arange(num_tokens)
    for choice in range(options.top_k):
        values[token, (token + choice) % num_experts] = 20.0 - choice
    return values.astype("float32")


if __name__ == "__main__":
    main()
