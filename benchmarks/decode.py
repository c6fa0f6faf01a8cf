"""A few tokens at a time, as in decoding: where the kernels that are read decide.

    KERAS_BACKEND=jax python -m benchmarks.decode

Forward only, without training. Against a dense layer of width K * H and against all experts run on
all tokens; then experts in integers against those in floats. Each pass has new tokens, so other
experts serve them.
"""

import itertools

import keras

from benchmarks.contestants import AllExperts, dense_twin, mixture, tokens
from benchmarks.measure import interleave, print_table, summarise, write_json
from benchmarks.options import describe, parse, parser
from benchmarks.steps import compiled_step, to_tensor


def main(arguments=None):
    defaults = {"tokens": [1, 4, 16], "features": 512, "hidden": 2048, "experts": [64]}
    options = parse(parser(__doc__, **defaults, rounds=50), arguments, tokens=[1, 4])
    rows = []
    for num_experts in options.experts:
        layer = mixture(num_experts, options)
        integers = {mode: quantized(mode, num_experts, options) for mode in ("int8", "int4")}
        races = {
            "dense twin": {
                "dense twin": dense_twin(options),
                "keras_moe": layer,
                "all experts": AllExperts(layer),
            },
            "keras_moe": {"keras_moe": layer, **integers},
        }
        for num_tokens, (baseline, contestants) in itertools.product(options.tokens, races.items()):
            table = race(contestants, baseline, num_tokens, options)
            print_table(table, f"{describe(options)} E={num_experts} T={num_tokens}, forward")
            about = {"against": baseline, "experts": num_experts, "tokens": num_tokens}
            rows += [{**row, **about} for row in table]
    write_json(f"decode-{keras.backend.backend()}{options.tag}", options, rows)
    return rows


def quantized(mode, num_experts, options):
    layer = mixture(num_experts, options)
    layer.experts.quantize(mode)
    return layer


def race(contestants, baseline, num_tokens, options):
    batches = [tokens(num_tokens, options, seed) for seed in range(options.rounds + 1)]
    steps = {name: on_each(batches, layer, options) for name, layer in contestants.items()}
    return summarise(*interleave(steps, options.rounds), baseline)


def on_each(batches, layer, options):
    """A function that runs a pass on the next batch at each call."""
    step = compiled_step(layer, batches[0], backward=False, jit=not options.no_xla, training=False)
    turns = itertools.cycle([to_tensor(layer, batch) for batch in batches])
    return lambda: step(next(turns))


if __name__ == "__main__":
    main()
