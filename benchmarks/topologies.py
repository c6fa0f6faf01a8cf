"""A layer compiled ahead of time for TPU topologies: what one chip computes, receives and holds.

    KERAS_BACKEND=jax python -m benchmarks.topologies --topology v5e:2x2 v5e:4x4

No TPU is needed, only the package `libtpu`. Nothing runs: times are bounds, the least that a chip
could take at its full speed. A step is a forward and backward pass of one layer in mixed bfloat16,
with `--tokens` tokens on every chip and the loads balanced. The columns:

- experts: chips that share the experts, the `experts` of `expert_parallel`.
- product_ms: the products of the experts at the chip's peak.
- network_ms: what a chip receives, at the bandwidth of one axis of its interconnect.
- bound_ratio: the larger of both to that of one chip of its kind, whose tokens stay.
- gather_mb and so on: what a chip receives, where chips pass data on in a ring.
- weights_gb, temp_gb: memory of weights, and of what is neither an argument nor a result.

`--overlap` adds a shared expert and lets XLA start collectives before their results are needed:

- meanwhile: products that are scheduled while an all-to-all is under way, of the shared expert and
  of all.
"""

import time

import keras

from benchmarks import chips, contestants
from benchmarks.collectives import megabytes, products_meanwhile
from benchmarks.measure import describe, parse, parser, publish, say

# Bytes/s that a chip receives along one axis of its network, from both sides: 1,600 Gbit/s over
# four links (https://cloud.google.com/tpu/docs/v5e), and 4,800 over six
# (https://cloud.google.com/tpu/docs/v5p).
NETWORK = {"v5e": 1e11, "v5p": 2e11}
# Options of XLA that let other work run between the start of a collective and its end.
ASYNCHRONOUS = dict.fromkeys(
    ("xla_tpu_enable_latency_hiding_scheduler", "xla_tpu_enable_async_all_to_all"), "true"
)


def main(arguments=None):
    options = parser(
        __doc__, tokens=[8192], features=2048, hidden=1408, experts=[64], dtype="bfloat16"
    )
    options.add_argument("--topology", nargs="+", default=["v5e:2x2", "v5e:4x4", "v5e:8x8"])
    options.add_argument("--shards", type=int, default=8, help="chips that share experts, at most")
    options.add_argument("--overlap", action="store_true", help="with a shared expert")
    options.set_defaults(gated=True, top_k=6)
    options = parse(options, arguments, experts=[8], topology=["v5e:2x2"])
    rows = [examine(topology, options) for topology in options.topology]
    title = f"{describe(options)} T={options.tokens[0]} a chip, E={options.experts[0]}"
    return publish("topologies", title, options, rows)


def examine(topology, options):
    """The row of one topology, such as "v5e:4x4"."""
    from keras_moe.distribution import AXES, expert_parallel

    say(f"compiling for {topology}")
    kind, devices = topology.partition(":")[0], chips.devices(topology)
    shards = min(len(devices), options.shards)
    # `devices` of `expert_parallel` are those that Keras lists: of this process.
    mesh = keras.distribution.DeviceMesh((len(devices) // shards, shards), AXES, devices)
    distribution = expert_parallel(layout_map=keras.distribution.LayoutMap(mesh))
    start = time.perf_counter()
    compiled = compile_for(distribution, len(devices) * options.tokens[0], options)
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    received = megabytes(text)
    rows = options.tokens[0] * options.top_k
    flops = 3 * 2 * (3 if options.gated else 2) * rows * options.features * options.hidden
    product = 1e3 * flops / chips.CHIPS[kind].half
    network = 1e9 * sum(received.values()) / NETWORK[kind]  # of megabytes, in milliseconds
    row = {
        "name": topology,
        "chips": len(devices),
        "experts": shards,
        "product_ms": product,
        "network_ms": network,
        "bound_ratio": max(product, network) / product,
        **received,
        "weights_gb": memory.argument_size_in_bytes / 1e9,
        "temp_gb": memory.temp_size_in_bytes / 1e9,
        "compile_s": seconds,
    }
    if options.overlap:
        products = products_meanwhile(text)
        shared = sum("dense_twin" in name for name in products)
        row["meanwhile"] = f"{shared} of {len(products)}"
    return row


def compile_for(distribution, num_tokens, options):
    def sharding_of(variable):
        return distribution.get_variable_layout(variable).backend_layout

    # A topology has no memory: weights have shapes and layouts, but no values. The distribution is
    # set before the layer is made, as banks tell it which of their weights are split.
    with keras.StatelessScope(initialize_variables=False), distribution.scope():
        shared_expert = contestants.DenseTwin(options) if options.overlap else None
        router = contestants.skewed_router(options.experts[0], options)
        layer = contestants.mixture_of(router, options, shared_expert=shared_expert)
        for variable in layer.variables:
            variable._layout = distribution.get_variable_layout(variable)
        data_layout = distribution.get_data_layout((num_tokens, options.features))
        lowered = chips.lowered_step(
            layer, num_tokens, options, sharding_of, data_layout.backend_layout
        )
    return lowered.compile(ASYNCHRONOUS if options.overlap else None)


if __name__ == "__main__":
    main()
