"""A few tokens at a time, as in decoding: where the kernels that are read decide.

    KERAS_BACKEND=jax python -m benchmarks.decode

Forward only, without training. Against a dense layer of width K * H and against all experts run on
all tokens; then experts in integers against those in floats. Each pass has new tokens, so other
experts serve them.
"""

import itertools

from benchmarks.contestants import AllExperts, DenseTwin, mixture, tokens
from benchmarks.measure import BACKEND, describe, interleave, parse, parser, publish, summarise
from benchmarks.steps import compiled_step, to_tensor


def main(arguments=None):
    defaults = {"tokens": [1, 4, 16], "features": 512, "hidden": 2048, "experts": [64]}
    options = parse(parser(__doc__, **defaults, rounds=50), arguments, tokens=[1, 4])
    rows = []
    for num_experts in options.experts:
        layer = mixture(num_experts, options)
        integers = {mode: mixture(num_experts, options) for mode in ("int8", "int4")}
        for mode, quantized in integers.items():
            quantized.experts.quantize(mode)
        everything = {"dense twin": DenseTwin(options), "all experts": AllExperts(layer)}
        races = {
            "dense twin": {**everything, "keras_moe": layer},
            "keras_moe": {"keras_moe": layer, **integers},
        }
        for num_tokens, (baseline, contestants) in itertools.product(options.tokens, races.items()):
            batches = [tokens(num_tokens, options, seed) for seed in range(options.rounds + 1)]
            steps = {name: on_each(batches, each, options) for name, each in contestants.items()}
            about = {"against": baseline, "experts": num_experts, "tokens": num_tokens}
            table = summarise(*interleave(steps, options.rounds), baseline)
            rows += [{**row, **about} for row in table]
    return publish(f"decode-{BACKEND}", f"{describe(options)}, forward", options, rows)


def on_each(batches, layer, options):
    """A function that runs a pass on the next batch at each call."""
    step = compiled_step(layer, batches[0], backward=False, jit=options.xla, training=False)
    turns = itertools.cycle([to_tensor(layer, batch) for batch in batches])
    return lambda: step(next(turns))


if __name__ == "__main__":
    main()
