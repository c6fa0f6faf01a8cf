"""Exported programs with few and with many experts: what the idle experts cost there.

    KERAS_BACKEND=tensorflow python -m benchmarks.exported
    KERAS_BACKEND=torch python -m benchmarks.exported --programs onnx --features 512 --hidden 2048

One MoE layer is exported for batches of any size, and runs in the runtime of each format on one
core. Programs with different numbers of experts take turns; the ratio is that to the fewest. Times
are those of the processor, which other programs on the machine change little.
"""

import os
import pathlib
import tempfile
import time
import typing
from collections.abc import Callable
from functools import partial

import keras

from benchmarks import runtimes
from benchmarks.contestants import mixture, tokens
from benchmarks.measure import BACKEND, describe, interleave, parse, parser, publish, say, summarise


class Program(typing.NamedTuple):
    """How a model is exported: the ending of the path, the runtime, `export(model, path)`."""

    ending: str
    runtime: str
    export: Callable


def by_keras(model, path, **kwargs):
    model.export(path, verbose=False, **kwargs)


def by_torch(model, path, strict):
    import torch

    sizes = [({0: torch.export.Dim("batch", min=1)},)]
    example = (torch.ones(2, *model.input_shape[1:]),)
    program = torch.export.export(model.eval(), example, dynamic_shapes=sizes, strict=strict)
    torch.export.save(program, path)


def by_jax(model, path):
    import jax
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    example = jax.ShapeDtypeStruct((batch, *model.input_shape[1:]), "float32")
    program = export.export(jax.jit(model), platforms=("cpu", "cuda", "tpu"))(example)
    pathlib.Path(path).write_bytes(program.serialize())


ONNX = Program(".onnx", "onnx", partial(by_keras, format="onnx"))
PROGRAMS = {
    "tensorflow": {
        "saved_model": Program("", "saved_model", by_keras),
        "onnx": ONNX,
        "litert": Program(".tflite", "litert", partial(by_keras, format="litert")),
    },
    "jax": {"jax.export": Program(".jax", "jax", by_jax)},
    "torch": {
        "onnx": ONNX,
        "torch.export strict": Program(".pt2", "torch", partial(by_torch, strict=True)),
        "torch.export": Program(".pt2", "torch", partial(by_torch, strict=False)),
    },
}[BACKEND]


def main(arguments=None):
    # A cheap activation hides less of what idle experts cost.
    defaults = {"tokens": [4096], "experts": [4, 32], "activation": "silu", "rounds": 9}
    options = parser(__doc__, **defaults)
    options.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    options = parse(options, arguments, experts=[2, 4])
    rows = []
    for num_tokens in options.tokens:
        for name in options.programs:
            table = race(PROGRAMS[name], num_tokens, options)
            rows += [{**row, "program": name, "tokens": num_tokens} for row in table]
    return publish(f"exported-{BACKEND}", describe(options), options, rows)


def on_one_core():
    """All threads of this process on one core, whatever number of them a runtime starts."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if BACKEND == "torch":
        import torch

        torch.set_num_threads(1)  # several on one core would wait for each other


def race(program, num_tokens, options):
    inputs, runs = tokens(num_tokens, options), {}
    with tempfile.TemporaryDirectory() as folder:
        for num_experts in options.experts:
            say(f"exporting E={num_experts} for {program.runtime}")
            path = os.path.join(folder, f"{num_experts}{program.ending}")
            x = keras.Input((options.features,))
            model = keras.Model(x, mixture(num_experts, options)(x))
            model(inputs[:2])  # Keras exports what was called
            program.export(model, path)
            run = runtimes.LOADERS[program.runtime](path)
            runs[f"E={num_experts}"] = partial(run, inputs)
        times = interleave(runs, options.rounds, time.process_time)
    return summarise(*times, next(iter(runs)))


if __name__ == "__main__":
    on_one_core()
    main()
