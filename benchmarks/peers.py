"""Our layer of gated experts against the MoE blocks of other packages, with the same weights.

    KERAS_BACKEND=torch python -m benchmarks.peers --experts 8 64
    KERAS_BACKEND=torch python -m benchmarks.peers --models --tokens 1024 --tag -models

With `--models`, a whole model of KerasHub is measured before and after `convert.sparsify`.
The packages come with the extra `bench`. A peer whose outputs differ from ours by more than 1e-5,
that is not installed, or that does not run here is not timed; its row says why. The ratio is its
time by ours: above 1 it is slower.
"""

import itertools

import keras
import numpy as np

from benchmarks import peer_models
from benchmarks.contestants import mixture, tokens
from benchmarks.measure import BACKEND, interleave, publish, summarise
from benchmarks.options import describe, parse, parser
from benchmarks.rivals import RIVALS
from benchmarks.steps import compiled_step, to_tensor

TOLERANCE = 1e-5


def main(arguments=None):
    # Blocks that run all experts take seconds a step.
    options = parser(__doc__, gated=True, experts=[8, 32], rounds=3)
    options.add_argument("--models", action="store_true", help="whole models of KerasHub")
    options.add_argument("--peers", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    options = parse(options, arguments)
    rows = []
    for num_experts, num_tokens in itertools.product(options.experts, options.tokens):
        table = (peer_models.race if options.models else race)(num_experts, num_tokens, options)
        rows += [{**row, "experts": num_experts, "tokens": num_tokens} for row in table]
    what = "a whole model" if options.models else "forward+backward"
    return publish(f"peers-{BACKEND}", f"{describe(options)}, {what}", options, rows)


def race(num_experts, num_tokens, options):
    ours = mixture(num_experts, options)
    inputs = tokens(num_tokens, options)
    contestants, errors, reasons = {"keras_moe": ours}, {}, {}
    for name in options.peers:
        try:
            contestants[name], errors[name] = admit(RIVALS[name], ours, inputs)
        except Exception as error:
            # Whatever keeps a peer from running is reported, and the others run.
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    steps = {
        name: compiled_step(layer, inputs, jit=options.xla) for name, layer in contestants.items()
    }
    rows = summarise(*interleave(steps, options.rounds), "keras_moe")
    rows = [{**row, "max_difference": errors.get(row["name"])} for row in rows]
    return rows + [{"name": name, "not timed": reason} for name, reason in reasons.items()]


def admit(rival, ours, inputs):
    """The rival with our weights, and the largest difference of an output."""
    backends, make = rival
    if BACKEND not in backends:
        raise NotImplementedError(f"runs on {', '.join(backends)}, not on {BACKEND}")
    layer = make(ours)
    difference = float(np.max(np.abs(infer(layer, inputs) - infer(ours, inputs))))
    # Not `>`, which a NaN would pass.
    if not difference <= TOLERANCE:
        raise ValueError(f"its outputs differ from ours by {difference:.1e}")
    return layer, difference


def infer(layer, inputs):
    """Outputs in inference."""
    outputs = layer(to_tensor(layer, inputs), training=False)
    return keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float32"))


if __name__ == "__main__":
    main()
