"""A few tokens at a time, as in decoding: where the kernels that are read decide.

    KERAS_BACKEND=jax python -m benchmarks.decode

Forward only, without training. Against a dense layer of width K * H, against all experts run on all
tokens, and against experts in integers.
"""

import keras

from benchmarks.contestants import AllExperts, dense_twin, mixture, tokens
from benchmarks.measure import interleave, print_table, summarise, write_json
from benchmarks.options import describe, parse, parser
from benchmarks.steps import compiled_step


def main(arguments=None):
    defaults = {"tokens": [1, 4, 16], "features": 512, "hidden": 2048, "experts": [64]}
    options = parse(parser(__doc__, **defaults, rounds=50), arguments, tokens=[1, 4])
    rows = []
    for num_experts in options.experts:
        layer = mixture(num_experts, options)
        contestants = {
            "dense twin": dense_twin(options),
            "keras_moe": layer,
            "all experts": AllExperts(layer),
            **{mode: quantized(mode, num_experts, options) for mode in ("int8", "int4")},
        }
        for num_tokens in options.tokens:
            table = race(contestants, num_tokens, options)
            print_table(table, f"{describe(options)} E={num_experts} T={num_tokens}, forward")
            rows += [{**row, "experts": num_experts, "tokens": num_tokens} for row in table]
    write_json(f"decode-{keras.backend.backend()}{options.tag}", options, rows)
    return rows


def quantized(mode, num_experts, options):
    layer = mixture(num_experts, options)
    layer.experts.quantize(mode)
    return layer


def race(contestants, num_tokens, options):
    inputs = tokens(num_tokens, options)
    steps = {
        name: compiled_step(layer, inputs, backward=False, jit=not options.no_xla, training=False)
        for name, layer in contestants.items()
    }
    return summarise(*interleave(steps, options.rounds), "dense twin")


if __name__ == "__main__":
    main()
