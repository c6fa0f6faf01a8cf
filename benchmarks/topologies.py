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

import sys
import time

import keras

from benchmarks import chips
from benchmarks.measure import print_table, write_json
from benchmarks.options import describe, parse, parser

# FLOP/s in bfloat16, and bytes/s that a chip receives along one axis of its network, from both
# sides: 1,600 Gbit/s over four links (https://cloud.google.com/tpu/docs/v5e), and 4,800 over six
# (https://cloud.google.com/tpu/docs/v5p).
CHIPS = {"v5e": (197e12, 1e11), "v5p": (459e12, 2e11)}
# Options of XLA that let other work run between the start of a collective and its end.
ASYNCHRONOUS = dict.fromkeys(
    ("xla_tpu_enable_latency_hiding_scheduler", "xla_tpu_enable_async_all_to_all"), "true"
)


def main(arguments=None):
    options = _options(sys.argv[1:] if arguments is None else arguments)
    rows = [examine(topology, options) for topology in options.topology]
    print_table(rows, f"{describe(options)} T={options.tokens[0]} a chip, E={options.experts[0]}")
    write_json(f"topologies{options.tag}", options, rows)
    return rows


def _options(arguments):
    options = parser(
        __doc__, tokens=[8192], features=2048, hidden=1408, experts=[64], dtype="bfloat16"
    )
    options.add_argument("--topology", nargs="+", default=["v5e:2x2", "v5e:4x4", "v5e:8x8"])
    options.add_argument("--shards", type=int, default=8, help="chips that share experts, at most")
    options.add_argument("--overlap", action="store_true", help="with a shared expert")
    options.set_defaults(gated=True, top_k=6)
    return parse(options, arguments, experts=[8], topology=["v5e:2x2"])


def examine(topology, options):
    """The row of one topology, such as "v5e:4x4"."""
    from benchmarks.collectives import bytes_by_kind, products_meanwhile
    from keras_moe.distribution import AXES, expert_parallel

    devices = chips.devices(topology)
    shards = min(len(devices), options.shards)
    # `devices` of `expert_parallel` are those that Keras lists: of this process.
    mesh = keras.distribution.DeviceMesh((len(devices) // shards, shards), AXES, devices)
    distribution = expert_parallel(layout_map=keras.distribution.LayoutMap(mesh))
    start = time.perf_counter()
    # A topology has no memory: weights have shapes and layouts, but no values.
    with keras.StatelessScope(initialize_variables=False):
        layer = unmade_layer(distribution, options)
        lowered = lowered_step(layer, distribution, len(devices) * options.tokens[0], options)
    compiled = lowered.compile(ASYNCHRONOUS if options.overlap else None)
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    received = bytes_by_kind(text)
    memory = compiled.memory_analysis()
    speed, bandwidth = CHIPS[topology.partition(":")[0]]
    kernels = 3 if options.gated else 2
    rows = options.tokens[0] * options.top_k
    product = 3 * 2 * kernels * rows * options.features * options.hidden / speed
    network = sum(received.values()) / bandwidth
    row = {
        "name": topology,
        "chips": len(devices),
        "experts": shards,
        "product_ms": 1e3 * product,
        "network_ms": 1e3 * network,
        "bound_ratio": max(product, network) / product,
        "gather_mb": received.get("all-gather", 0) / 1e6,
        "scatter_mb": received.get("reduce-scatter", 0) / 1e6,
        "to_all_mb": received.get("all-to-all", 0) / 1e6,
        "permute_mb": received.get("collective-permute", 0) / 1e6,
        "reduce_mb": received.get("all-reduce", 0) / 1e6,
        "weights_gb": memory.argument_size_in_bytes / 1e9,
        "temp_gb": memory.temp_size_in_bytes / 1e9,
        "compile_s": seconds,
    }
    if options.overlap:
        products = products_meanwhile(text)
        shared = sum("dense_twin" in name for name in products)
        row["meanwhile"] = f"{shared} of {len(products)}"
    return row


def unmade_layer(distribution, options):
    from benchmarks import contestants

    router = contestants.skewed_router(options.experts[0], options, "balanced")
    shared_expert = contestants.dense_twin(options) if options.overlap else None
    layer = contestants.mixture_of(router, options, shared_expert)
    for variable in layer.variables:
        variable._layout = distribution.get_variable_layout(variable)
    return layer


def lowered_step(layer, distribution, num_tokens, options):
    import jax

    def abstract(shape, dtype, layout):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.backend_layout)

    trainable, fixed = (
        [abstract(v.shape, v.dtype, v._layout) for v in variables]
        for variables in (layer.trainable_variables, layer.non_trainable_variables)
    )
    shape = (num_tokens, options.features)
    x = abstract(shape, layer.compute_dtype, distribution.get_data_layout(shape))

    def loss(trainable, x, fixed, weight):
        y, _, losses = layer.stateless_call(trainable, fixed, x, training=True, return_losses=True)
        return (y * weight).astype("float32").sum() + sum(losses, 0.0)

    with distribution.scope():
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(trainable, x, fixed, x)


if __name__ == "__main__":
    main()
