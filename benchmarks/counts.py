"""What can be counted: FLOPs, peak memory and compilations of one training step.

    KERAS_BACKEND=jax python -m benchmarks.counts

Each contestant runs in a fresh process; its matrix products are counted in the process that starts
them. The columns, all of one forward and backward pass:

- matmul_gflops: matrix products really executed, every trip of every loop, on JAX and PyTorch.
  TensorFlow offers no count; under XLA it runs the same blocks of rows as JAX.
- peak_mb: by how much the resident memory rises while a step runs, gradients of all weights and
  of the inputs included, where the system tells (Linux). Their size is gradients_mb. TensorFlow
  keeps what it frees for the next step, so there nothing can be seen to rise.
- compilations: of XLA, over `--steps` steps whose loads differ: the share of the busiest expert
  lies between busiest_low and busiest_high.
"""

import pathlib

import keras
import numpy as np

from benchmarks import contestants
from benchmarks.measure import BACKEND, describe, parse, parser, publish, say
from benchmarks.observed import compilations, in_observed_process, resident_mb
from benchmarks.steps import compiled_step, jax_function, to_tensor


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=100)
    options = parse(options, arguments, steps=3)
    inputs = contestants.tokens(*options.tokens, options)
    rows = []
    for name, build in contestants.contest(options).items():
        row = in_observed_process(examine, options, name)
        flops = executed_flops(build(), inputs)
        rows.append({**row, "matmul_gflops": flops and flops / 1e9})
        if flops:
            rows[-1]["matmul_ratio"] = rows[-1]["matmul_gflops"] / rows[0]["matmul_gflops"]
    title = f"{describe(options)} T={options.tokens[0]}, forward+backward"
    return publish(f"counts-{BACKEND}", title, options, rows)


def examine(options, name, dump):
    """The row of one contestant."""
    layer = contestants.contest(options)[name]()
    inputs = contestants.tokens(*options.tokens, options)
    step = compiled_step(layer, inputs, jit=options.xla)
    compiled_before = compilations(dump)
    step()
    weights = sum(np.prod(weight.shape) for weight in layer.trainable_variables)
    row = {"name": name, "gradients_mb": 4 * int(weights + inputs.size) / 1e6}
    if BACKEND != "tensorflow":
        row["peak_mb"] = peak_mb(step)
    if options.xla:
        say(f"{name}: {options.steps} steps")
        loads = [_run(step, layer, number, options) for number in range(1, options.steps)]
        row["compilations"] = compilations(dump) - compiled_before
        if hasattr(layer, "router"):
            row["busiest_low"], row["busiest_high"] = min(loads), max(loads)
    return row


def _run(step, layer, seed, options):
    """Run a step on other tokens, which lean to other experts; the share of the busiest."""
    inputs = contestants.tokens(*options.tokens, options, seed)
    lean = np.random.default_rng(seed).standard_normal(options.features) * (seed % 5)
    inputs = inputs + lean.astype("float32")
    step(to_tensor(layer, inputs))
    if not hasattr(layer, "router"):
        return None
    logits = inputs @ keras.ops.convert_to_numpy(layer.router.kernel)
    chosen = np.argsort(-logits, axis=1)[:, : options.top_k]
    return float(np.bincount(chosen.ravel()).max() / chosen.size)


def peak_mb(run):
    """By how many megabytes the resident memory rises in `run`; None where no one tells."""
    try:
        before = resident_mb()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        run()
        return resident_mb("VmHWM") - before
    except OSError:
        return None


def executed_flops(layer, inputs):
    """FLOPs of one forward and backward pass, or None on TensorFlow, which does not count them."""
    if BACKEND == "jax":
        from benchmarks.device_flops import device_flops

        inside, outside = device_flops(*jax_function(layer, inputs, backward=True, training=True))
        return float(np.sum(inside)) + outside
    return _count_torch(layer, inputs) if BACKEND == "torch" else None


def _count_torch(layer, inputs):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        flops = 0

        # PyTorch's own counter does not work under `torch.autograd.grad`.
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            outputs = function(*args, **(kwargs or {}))
            formula = flop_registry.get(function._overloadpacket)
            if "grouped_mm" in str(function):  # which has no formula there
                self.flops += 2 * args[0].numel() * args[1].shape[-1]
            elif formula is not None:
                self.flops += formula(*args, **(kwargs or {}), out_val=outputs)
            return outputs

    step = compiled_step(layer, inputs)
    with Counter() as counter:
        step()
    return counter.flops


if __name__ == "__main__":
    main()
