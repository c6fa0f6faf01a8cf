"""What can be counted: FLOPs, bytes, peak memory and compilations of one training step.

    KERAS_BACKEND=jax python -m benchmarks.counts

Each contestant runs in a fresh process; its matrix products are counted in the process that starts
them. The columns, all of one forward and backward pass:

- matmul_gflops: matrix products really executed, every trip of every loop, on JAX and PyTorch.
  TensorFlow offers no count; under XLA it runs the same blocks of rows as JAX.
- xla_gflops, xla_gb: the compiler's cost analysis, JAX only. It takes the body of a loop once, so
  of a MoE layer it sees one block of each size and says nothing on its work.
- xla_temp_mb: the compiler's memory for what is neither an argument nor a result, JAX only.
- peak_mb: by how much the resident memory rises while a step runs, gradients of all weights and
  of the inputs included, where the system tells (Linux). Their size is gradients_mb. TensorFlow
  keeps what it frees for the next step, so there nothing can be seen to rise.
- compilations: of XLA, over `--steps` steps whose loads differ: the share of the busiest expert
  lies between busiest_low and busiest_high.
- compile_s: the first run less the second.
"""

import pathlib
import sys

import keras
import numpy as np

from benchmarks import contestants
from benchmarks.executed import executed_flops
from benchmarks.measure import milliseconds, print_table, write_json
from benchmarks.observed import compilations, in_observed_process, resident_mb
from benchmarks.options import describe, parse, parser
from benchmarks.steps import compiled_step, jax_function, to_tensor

BACKEND = keras.backend.backend()


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(_parser(), arguments, steps=3)
    (num_tokens,) = options.tokens
    rows = []
    for num_experts in (None, *options.experts):
        rows.append(in_observed_process(examine, arguments, num_experts))
        flops = executed_flops(_contestant(num_experts, options), _inputs(options))
        rows[-1]["matmul_gflops"] = flops and flops / 1e9
    for row in rows:
        if row["matmul_gflops"]:
            row["matmul_ratio"] = row["matmul_gflops"] / rows[0]["matmul_gflops"]
    print_table(rows, f"{describe(options)} T={num_tokens}, forward+backward")
    write_json(f"counts-{BACKEND}{options.tag}", options, rows)
    return rows


def _parser():
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=100)
    return options


def examine(arguments, num_experts, dump):
    """The row of one contestant; the dense twin has no `num_experts`."""
    options = parse(_parser(), arguments, steps=3)
    layer, inputs = _contestant(num_experts, options), _inputs(options)
    step = compiled_step(layer, inputs, jit=not options.no_xla)
    compiled_before = compilations(dump)
    first, second = milliseconds(step), milliseconds(step)
    weights = sum(np.prod(weight.shape) for weight in layer.trainable_variables)
    row = {
        "name": "dense twin" if num_experts is None else f"E={num_experts}",
        "gradients_mb": 4 * int(weights + inputs.size) / 1e6,
    }
    if BACKEND != "tensorflow":
        row["peak_mb"] = peak_mb(step)
    if BACKEND != "torch":
        row["compile_s"] = (first - second) / 1e3
        loads = [_run(step, layer, number, options) for number in range(1, options.steps)]
        if not options.no_xla:
            row["compilations"] = compilations(dump) - compiled_before
        if num_experts is not None:
            row["busiest_low"], row["busiest_high"] = min(loads), max(loads)
    if BACKEND == "jax":
        row.update(cost_analysis(layer, inputs))
    return row


def _contestant(num_experts, options):
    if num_experts is None:
        return contestants.dense_twin(options)
    return contestants.mixture(num_experts, options)


def _inputs(options):
    return contestants.tokens(options.tokens[0], options)


def _run(step, layer, seed, options):
    """Run a step on other tokens, which lean to other experts; the share of the busiest."""
    inputs = contestants.tokens(options.tokens[0], options, seed)
    lean = np.random.default_rng(seed).standard_normal(options.features) * (seed % 5)
    inputs = inputs + lean.astype("float32")
    step(to_tensor(layer, inputs))
    if not hasattr(layer, "router"):
        return None
    logits = inputs @ keras.ops.convert_to_numpy(layer.router.kernel)
    chosen = np.argsort(-logits, axis=1)[:, : options.top_k]
    return float(np.bincount(chosen.ravel()).max() / chosen.size)


def cost_analysis(layer, inputs):
    function, arguments = jax_function(layer, inputs, backward=True, training=True)
    compiled = function.lower(*arguments).compile()
    cost = compiled.cost_analysis()
    return {
        "xla_gflops": cost["flops"] / 1e9,
        "xla_gb": cost["bytes accessed"] / 1e9,
        "xla_temp_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }


def peak_mb(run):
    """By how many megabytes the resident memory rises in `run`; None where no one tells."""
    try:
        before = resident_mb()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        run()
        return resident_mb("VmHWM") - before
    except OSError:
        return None


if __name__ == "__main__":
    main()
