"""A training step compiled for TPUs and GPUs that need not be there, and what it costs at least.

    KERAS_BACKEND=jax python -m benchmarks.ahead --chip v5e v5p v6e h100 --experts 8 64

TPUs need `jax[tpu]`, the extra `ahead`; an H100 needs JAX's CUDA plugin, `jax[cuda13]`. One forward
and backward pass, gradients of the inputs and of all weights included, of the dense twin and of a
MoE layer is compiled for one device of each chip, from shapes alone: no weight is made and nothing
runs. All numbers are read from the compiler's final program.

- product_tflops, flops_ratio: FLOPs of all matrix products, and by those of the twin. Grouped
  kernels, custom calls to the compiler, are counted from their shapes: rows that pad a tile count,
  what a kernel computes twice or for a tile that two groups share does not.
- gb: reads and writes of main memory. An instruction reads each operand and writes each result
  once; of what it slices or gathers it reads only that, of what it updates in place it writes only
  that. Custom kernels read each operand and write each result once, though they may read a tile
  anew for each tile of another operand. What a TPU holds in the memory of its core is free.
- bound_ms, ratio: a lower bound on the time, and by that of the twin. Kernels run one after
  another, and each takes the longer of its FLOPs at the chip's peak and its traffic at the memory's
  bandwidth; on a GPU at least 3 us. All traffic together, with copies that run beside kernels,
  gives another lower bound, and the larger of both is taken. On a GPU each time the host must look
  at the device, for the condition of a loop or of a branch, adds 10 us.
- dynamic_loops: loops in the program whose number of trips depends on data. Of these one trip is
  counted, so with any of them work and bound are too low by far, and there is no ratio. Other loops
  count with all their trips, and of a branch the most expensive side.
- host_waits: how often the host must look at the device, GPU only.
- kernels: instructions that run, but for asynchronous copies.
- scratch_mb, scratch_ratio: memory for what is neither an argument nor a result.
- compile_s, compile_ratio: tracing and compiling, once the compiler has started. On a GPU tiles are
  not tuned, which needs a device.
- float32_products: products of rows with kernels, or of their gradients, in float32: 0 in half
  precision unless something is wrong.

The bound is no measurement and no forecast. It takes every product at the peak, which narrow ones
never reach, and no time for latency, sorting, loads of tiles that other tiles cannot hide, or
uneven groups. It says what a program cannot beat, and finds copies, padding, loops and
conversions. The peaks, FLOP/s of products in half precision, in float32 as JAX computes it by
default and in full precision, and bytes/s of memory, stand in `benchmarks.chips`:

    chip         v4     v5e     v5p     v6e   tpu7x    h100
    half       138T    197T    459T    918T   1154T    800T
    float32    138T    197T    459T    918T   1154T    400T
    in full     23T     33T     77T    153T    192T     54T
    memory     0.6T    0.8T    2.8T    1.6T    3.7T    3.4T

`--matrix` instead compiles every case of `benchmarks.ahead_matrix` for each chip.
"""

import collections
import functools
import sys

import keras

from benchmarks import ahead_matrix, chips, contestants, roofline
from benchmarks.measure import print_table, write_json
from benchmarks.options import describe, parse, parser
from benchmarks.step_ahead import compile_step, mixture

_RATIOS = {
    "product_tflops": "flops_ratio",
    "bound_ms": "ratio",
    "scratch_mb": "scratch_ratio",
    "compile_s": "compile_ratio",
}


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(_parser(), arguments)
    if keras.backend.backend() != "jax":
        sys.exit("benchmarks.ahead compiles with JAX: put KERAS_BACKEND=jax in front.")
    rows = {}
    for chip in options.chip:
        package = chips.missing(chip)
        if package:
            print(f"{chip}: skipped, install {package}")
        else:
            rows[chip] = ahead_matrix.run(chip) if options.matrix else run(chip, options)
    if not rows:
        sys.exit("No compiler for any of these chips is installed.")
    if options.matrix and any(rows.values()):
        sys.exit("Not all steps compile.")
    return rows


def _parser():
    options = parser(__doc__, features=1024, hidden=4096, dtype="bfloat16")
    options.add_argument("--chip", nargs="+", default=["v5e"], choices=chips.CHIPS)
    options.add_argument("--capacity-factor", type=float, default=None)
    options.add_argument("--matrix", action="store_true", help="only compile, in many shapes")
    return options


def run(chip, options):
    """Print and write the rows of one chip."""
    sharding = chips.sharding(chip)
    _start_compiler(sharding)
    contest = {"dense twin": functools.partial(contestants.dense_twin, options)}
    for number in options.experts:
        contest[f"E={number}"] = functools.partial(mixture, number, options)
    rows = []
    for name, build in contest.items():
        row = {"name": name, **examine(build, chip, sharding, options)}
        rows.append(_with_ratios(row, rows[0] if rows else row))
    print_table(rows, f"{chip}, {describe(options)} T={options.tokens[0]}, forward+backward")
    write_json(f"ahead-{chip}{options.tag}", options, rows)
    return rows


def examine(build, chip, sharding, options):
    """The numbers of one contestant."""
    compiled, seconds = compile_step(build, options, sharding)
    facts = chips.CHIPS[chip]
    work = roofline.work(_text(compiled), facts)
    return {
        "product_tflops": work.flops / 1e12,
        "gb": work.bytes / 1e9,
        "bound_ms": work.bound(facts) * 1e3,
        "dynamic_loops": work.loops,
        "host_waits": work.waits,
        "kernels": work.kernels,
        "scratch_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "compile_s": seconds,
        "float32_products": sum(_is_wide(product, options) for product in work.products),
    }


def _text(compiled):
    try:
        return compiled.as_text()
    except RuntimeError as error:
        raise RuntimeError(
            "JAX cannot read what this compiler writes. It names the version that it can read: "
            "install jax[tpu] or jax[cuda13] anew."
        ) from error


def _start_compiler(sharding):
    """Compile something, so that no contestant pays for the start."""
    import jax

    scalar = jax.ShapeDtypeStruct((), "float32", sharding=sharding)
    jax.jit(lambda x: x + 1).lower(scalar).compile()


def _with_ratios(row, twin):
    """The row with ratios to the twin's behind what they are ratios of, where they mean something.

    Work that loops hide would make a layer look cheap.
    """
    hidden = ("product_tflops", "bound_ms") if row["dynamic_loops"] else ()
    result = {}
    for key, value in row.items():
        result[key] = value
        if key in _RATIOS:
            known = twin[key] and key not in hidden
            result[_RATIOS[key]] = value / twin[key] if known else None
    return result


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
