"""What it costs to write memory, as the gradients of a step: time, and page faults of the system.

    KERAS_BACKEND=jax python -m benchmarks.memory

Each run makes a new tensor of 134 MB, as large as the gradients of 64 experts with D=256, H=1024,
and lets go of it. A process that keeps its memory has no faults; see docs/speed.md.
"""

import resource

import keras
import numpy as np

from benchmarks.measure import milliseconds, print_table, write_json
from benchmarks.options import parse, parser

EXPERTS = 64


def main(arguments=None):
    options = parse(parser(__doc__), arguments)
    tensor = keras.ops.ones((EXPERTS, options.features, 2 * options.hidden))
    double = _compiled(lambda tensor: tensor * 2)
    for _ in range(2):
        double(tensor)
    before = resource.getrusage(resource.RUSAGE_SELF)
    times = [milliseconds(lambda: double(tensor)) for _ in range(options.rounds)]
    after = resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "name": f"{4 * int(np.prod(tensor.shape)) / 1e6:.0f} MB",
        "ms": float(np.median(times)),
        "page_faults": (after.ru_minflt - before.ru_minflt) / options.rounds,
        "system_ms": 1e3 * (after.ru_stime - before.ru_stime) / options.rounds,
    }
    print_table([row], f"{keras.backend.backend()}, one write")
    write_json(f"memory-{keras.backend.backend()}{options.tag}", options, [row])
    return [row]


def _compiled(function):
    """The function, compiled where the backend compiles, that waits for its end."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        compiled = jax.jit(function)
        return lambda tensor: compiled(tensor).block_until_ready()
    if backend == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(function, jit_compile=True)
        return lambda tensor: compiled(tensor)[0, 0, 0].numpy()
    return function


if __name__ == "__main__":
    main()
