"""One MoE layer against a dense layer of the same active size.

    KERAS_BACKEND=jax python -m benchmarks.layer --experts 8 16 32 64

The dense twin is one feed-forward network of width K * H with the same activation and biases, on
the same backend, compiled the same way.

All is measured in several processes: where their memory lies makes more of a difference than
anything within one. The table shows the process with the middle ratio, and the lowest and highest
ratio of all.

With `--kept` all is measured again in processes that keep freed memory, see `benchmarks.memory`.
"""

import itertools

from benchmarks import contestants
from benchmarks.measure import (
    BACKEND,
    describe,
    in_fresh_process,
    interleave,
    parse,
    parser,
    publish,
    summarise,
)
from benchmarks.observed import KEEP_MEMORY, environment
from benchmarks.steps import compiled_step

SKEWS = ("balanced", "zipf", "all-to-one")


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--skew", nargs="+", default=["balanced"], choices=SKEWS)
    options.add_argument("--processes", type=int, default=3, help="take the middle of so many")
    options.add_argument("--kept", action="store_true", help="again with memory that is kept")
    options = parse(options, arguments, processes=1)
    rows = measured(options)
    if options.kept:
        with environment(KEEP_MEMORY):
            rows += [{**row, "memory": "kept"} for row in measured(options)]
    title = f"{describe(options)}, middle of {options.processes} processes"
    return publish(f"layer-{BACKEND}", title, options, rows)


def measured(options):
    if options.processes > 1:
        return middle([in_fresh_process(run, options) for _ in range(options.processes)])
    # A process reads the variables of the allocator when it starts.
    return in_fresh_process(run, options) if options.kept else run(options)


def run(options):
    rows = []
    for backward in (False, True):
        direction = "forward+backward" if backward else "forward"
        for num_tokens, num_experts in itertools.product(options.tokens, options.experts):
            table = race(num_tokens, num_experts, backward, options)
            rows += [{**row, "tokens": num_tokens, "pass": direction} for row in table]
    return rows


def middle(runs):
    """Of each row of several runs the one with the middle ratio, between the extremes of all."""
    rows = []
    for same in zip(*runs):
        ranked = sorted(same, key=lambda row: row["ratio"])
        extremes = {"ratio_low": ranked[0]["ratio"], "ratio_high": ranked[-1]["ratio"]}
        rows.append({**ranked[len(ranked) // 2], **extremes})
    return rows


def race(num_tokens, num_experts, backward, options):
    """Rows of the twin and of one number of experts: more of them would share its memory."""
    inputs = contestants.tokens(num_tokens, options)
    layers, facts = {"dense twin": contestants.DenseTwin(options)}, {"dense twin": {}}
    for skew in options.skew:
        name = f"E={num_experts} {skew}"
        layers[name] = contestants.mixture(num_experts, options, skew)
        facts[name] = {"experts": num_experts, "skew": skew}
    steps = {
        name: compiled_step(layer, inputs, backward, options.xla) for name, layer in layers.items()
    }
    rows = summarise(*interleave(steps, options.rounds), "dense twin")
    return [{**row, **facts[row["name"]]} for row in rows]


if __name__ == "__main__":
    main()
