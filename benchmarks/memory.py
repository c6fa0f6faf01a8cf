"""What it costs to write memory, as the gradients of a step: time, and page faults of the system.

    KERAS_BACKEND=jax python -m benchmarks.memory

Each run makes a new tensor of 134 MB, as large as the gradients of 64 experts with D=256, H=1024,
and lets go of it. A process that keeps its memory has no faults; see benchmarks/README.md.
"""

import resource

import keras
import numpy as np

from benchmarks.measure import BACKEND, milliseconds, parse, parser, publish
from benchmarks.steps import compiled_step


def main(arguments=None):
    options = parse(parser(__doc__, experts=[64]), arguments)
    (num_experts,) = options.experts
    tensor = np.ones((num_experts, options.features, 2 * options.hidden), "float32")
    double = keras.layers.Lambda(lambda values: 2 * values)
    double.build(tensor.shape)
    write = compiled_step(double, tensor, backward=False)
    for _ in range(2):
        write()
    before = resource.getrusage(resource.RUSAGE_SELF)
    times = [milliseconds(write) for _ in range(options.rounds)]
    after = resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "name": f"{tensor.nbytes / 1e6:.0f} MB",
        "ms": float(np.median(times)),
        "page_faults": (after.ru_minflt - before.ru_minflt) / options.rounds,
        "system_ms": 1e3 * (after.ru_stime - before.ru_stime) / options.rounds,
    }
    return publish(f"memory-{BACKEND}", f"{BACKEND}, one write", options, [row])


if __name__ == "__main__":
    main()
