"""The first training step and the first prediction, which compile, against the dense twin.

    KERAS_BACKEND=jax python -m benchmarks.first_step

CPU time of the classifier of `benchmarks.model` with 1, 6 and 12 blocks; each contestant has
a fresh process. The columns:

- build_s, first_step_s, first_predict_s: seconds to build the model, and for its first calls, which
  trace and compile.
- step_s: seconds of the second step.
- first_step_ratio, first_predict_ratio: by those of the twin with as many blocks.
- hlo_lines: of the optimised program of one layer's forward and backward pass, where XLA compiles.
"""

import functools
import itertools
import pathlib
import time

from benchmarks.contestants import contest, tokens
from benchmarks.measure import (
    BACKEND,
    describe,
    in_fresh_process,
    milliseconds,
    parse,
    parser,
    publish,
)
from benchmarks.model import batch_of, compiled_transformer
from benchmarks.observed import in_observed_process
from benchmarks.steps import compiled_step


def main(arguments=None):
    options = parser(__doc__, hidden=512)
    options.add_argument("--length", type=int, default=256, help="tokens of one text")
    options.add_argument("--blocks", type=int, nargs="+", default=[1, 6, 12])
    options = parse(options, arguments, length=8, blocks=[1])
    names = list(contest(options))
    lines = {name: options.xla and in_observed_process(hlo_lines, options, name) for name in names}
    rows, twin = [], {}
    for blocks, name in itertools.product(options.blocks, names):
        row = in_fresh_process(first_calls, options, blocks, name)
        twin = row if name == names[0] else twin
        for call in ("first_step", "first_predict"):
            row[f"{call}_ratio"] = row[f"{call}_s"] / twin[f"{call}_s"]
        rows.append({"name": f"{name}, {blocks} blocks", **row, "hlo_lines": lines[name] or None})
    title = f"{describe(options)} T={options.tokens[0]}, CPU time"
    return publish(f"first_step-{BACKEND}", title, options, rows)


def first_calls(options, blocks, name):
    """Seconds of the first calls of a model."""
    seconds, made = {}, []
    build = functools.partial(compiled_transformer, contest(options)[name], options, blocks)
    ids, classes = batch_of(options)
    calls = {
        "build_s": lambda: made.append(build()),
        "first_step_s": lambda: made[0].train_on_batch(ids, classes),
        "step_s": lambda: made[0].train_on_batch(ids, classes),
        "first_predict_s": lambda: made[0].predict_on_batch(ids),
    }
    for call, run in calls.items():
        seconds[call] = milliseconds(run, time.process_time) / 1e3
    return seconds


def hlo_lines(options, name, dump):
    """Lines of the largest program of a pass of one layer, without tables of locations."""
    compiled_step(contest(options)[name](), tokens(*options.tokens, options), jit=options.xla)()
    programs = pathlib.Path(dump).glob("*after_optimizations.txt")
    lines = (program.read_text().splitlines() for program in programs)
    return max(sum(not line[:1].isdigit() for line in each) for each in lines)


if __name__ == "__main__":
    main()
