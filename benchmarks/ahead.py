"""A training step compiled for TPUs and GPUs that need not be there, and what it costs at least.

    KERAS_BACKEND=jax python -m benchmarks.ahead --chip v5e v5p v6e h100 --experts 8 64

TPUs need `jax[tpu]`, the extra `ahead`; an H100 needs JAX's CUDA plugin, `jax[cuda13]`. One forward
and backward pass, gradients of the inputs and of all weights included, of the dense twin and of a
MoE layer is compiled for one device of each chip, from shapes alone: no weight is made and nothing
runs. All numbers are read from the compiler's final program.

- bound_ms, ratio: a lower bound on the time, and by that of the twin. Kernels run one after
  another, and each takes the longer of its FLOPs at the chip's peak and its traffic at the memory's
  bandwidth; on a GPU at least 3 us. All traffic together, with copies that run beside kernels,
  gives another lower bound, and the larger of both is taken. On a GPU each time the host must look
  at the device, for the condition of a loop or of a branch, adds 10 us (host_waits).
- product_tflops: FLOPs of all products. Grouped kernels, custom calls to the compiler, are counted
  from their shapes: rows that pad a tile count, what a kernel computes twice or for a tile that two
  groups share does not.
- traffic: an instruction reads each operand and writes each result once; of what it slices or
  gathers it reads only that, of what it updates in place it writes only that. What a TPU holds in
  the memory of its core is free.
- traffic_gb, kernels: all traffic together, and the kernels that are started, those of loops at
  each trip; on a TPU, where one program holds them all, its instructions that do some work.
- dynamic_loops: loops with products whose number of trips depends on data. On a GPU they multiply
  the rows of groups that are longer than 5/4 of their mean, and groups are taken for even: no trip
  is counted. Other loops count with all their trips, or with one if the number is unknown, as in
  searches; of a branch the most expensive side counts.
- scratch_mb, scratch_ratio: memory for what is neither an argument nor a result.
- compile_s: tracing and compiling. On a GPU tiles are not tuned, which needs a device.
- float32_products: products of rows with kernels, or of their gradients, in float32: 0 in half
  precision unless something is wrong.

The bound is no measurement and no forecast. It takes every product at the peak of
`benchmarks.chips`, which narrow ones never reach, and no time for latency, sorting, loads of tiles
that other tiles cannot hide, or uneven groups. It finds copies, padding, loops and conversions.
"""

import collections
import sys

from benchmarks import chips, contestants, roofline
from benchmarks.measure import BACKEND, describe, parse, parser, publish


def main(arguments=None):
    options = parser(__doc__, features=1024, hidden=4096, dtype="bfloat16")
    options.add_argument("--chip", nargs="+", default=["v5e"], choices=chips.CHIPS)
    options = parse(options, arguments)
    if BACKEND != "jax":
        sys.exit("benchmarks.ahead compiles with JAX: put KERAS_BACKEND=jax in front.")
    rows = {}
    for chip in options.chip:
        package = chips.missing(chip)
        if package:
            print(f"{chip}: skipped, install {package}")
        else:
            rows[chip] = run(chip, options)
    return rows


def run(chip, options):
    """Print and write the rows of one chip."""
    import jax

    sharding, rows = chips.sharding(chip), []
    # Something is compiled first, so that no contestant pays for the start of the compiler.
    scalar = jax.ShapeDtypeStruct((), "float32", sharding=sharding)
    jax.jit(lambda x: x + 1).lower(scalar).compile()
    for name, build in contestants.contest(options).items():
        row = {"name": name, **examine(build, chip, sharding, options)}
        rows.append(row)
        row["ratio"] = row["bound_ms"] / rows[0]["bound_ms"]
        scratch = rows[0]["scratch_mb"]
        row["scratch_ratio"] = row["scratch_mb"] / scratch if scratch else None
    title = f"{chip}, {describe(options)} T={options.tokens[0]}, forward+backward"
    return publish(f"ahead-{chip}", title, options, rows)


def examine(build, chip, sharding, options):
    """The numbers of one contestant."""
    compiled, seconds = chips.compile_step(build, options, sharding)
    facts = chips.CHIPS[chip]
    work = roofline.work(compiled.as_text(), facts)
    return {
        "product_tflops": work.flops / 1e12,
        "traffic_gb": work.bytes / 1e9,
        "kernels": work.kernels,
        "bound_ms": work.bound(facts) * 1e3,
        "dynamic_loops": work.loops,
        "host_waits": work.waits,
        "scratch_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "compile_s": seconds,
        "float32_products": sum(_is_wide(product, options) for product in work.products),
    }


def _is_wide(product, options):
    """Whether float32 rows are multiplied with kernels, and not tokens with the router's.

    The compiler may cut one of the widths D and H, but not both, into parts; a product of the
    router, or of biases, has an axis of E.
    """
    widths = collections.Counter([options.features, options.hidden])
    found = widths & collections.Counter(product.sizes)
    is_small = set(product.sizes) & set(options.experts) and found != widths
    return product.dtype == "f32" and bool(found) and not is_small


if __name__ == "__main__":
    main()
