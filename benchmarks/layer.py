"""One MoE layer against a dense layer of the same active size.

    KERAS_BACKEND=jax python -m benchmarks.layer --experts 8 64

The dense twin is one feed-forward network of width K * H with the same activation and biases, on
the same backend, compiled the same way.
"""

import itertools

import keras

from benchmarks import contestants
from benchmarks.measure import interleave, print_table, summarise, write_json
from benchmarks.options import describe, parse, parser
from benchmarks.steps import compiled_step

SKEWS = ("balanced", "zipf", "all-to-one")


def main(arguments=None):
    options = parse(_parser(), arguments)
    rows = []
    for backward in (False, True):
        direction = "forward+backward" if backward else "forward"
        for num_tokens, num_experts in itertools.product(options.tokens, options.experts):
            table = race(num_tokens, num_experts, backward, options)
            print_table(table, f"{describe(options)} T={num_tokens}, {direction}")
            rows += [{**row, "tokens": num_tokens, "pass": direction} for row in table]
    write_json(f"layer-{keras.backend.backend()}{options.tag}", options, rows)
    return rows


def _parser():
    options = parser(__doc__)
    options.add_argument("--skew", nargs="+", default=["balanced"], choices=SKEWS)
    return options


def race(num_tokens, num_experts, backward, options):
    """Rows of the twin and of one number of experts: more of them would share its memory."""
    inputs = contestants.tokens(num_tokens, options)

    def step(layer):
        return compiled_step(layer, inputs, backward, jit=not options.no_xla)

    steps, facts = {"dense twin": step(contestants.dense_twin(options))}, {"dense twin": {}}
    for skew in options.skew:
        name = f"E={num_experts} {skew}"
        steps[name] = step(contestants.mixture(num_experts, options, skew))
        facts[name] = {"experts": num_experts, "skew": skew}
    rows = summarise(*interleave(steps, options.rounds), "dense twin")
    return [{**row, **facts[row["name"]]} for row in rows]


if __name__ == "__main__":
    main()
