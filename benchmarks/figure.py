"""Redraws docs/speed.png from benchmarks/results/: the middle of all processes and their span.

    python -m benchmarks.figure

It reads what these two commands write on each backend:

    python -m benchmarks.layer --experts 8 16 32 64
    python -m benchmarks.layer --experts 8 --tokens 1024 4096 16384 65536 --tag=-tokens
"""

import json
import pathlib

from benchmarks import measure

PICTURE = pathlib.Path(__file__).parents[1] / "docs" / "speed.png"
BACKENDS = {"tensorflow": "TensorFlow XLA", "jax": "JAX", "torch": "PyTorch"}


def main():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_experts, by_tokens = figure.subplots(1, 2)
    for index, (backend, label) in enumerate(BACKENDS.items()):
        rows = load(f"layer-{backend}")
        for axes, curve in (
            (by_experts, ratio_by_experts(rows)),
            (by_tokens, time_by_tokens(load(f"layer-{backend}-tokens"))),
        ):
            if curve:
                axes.plot(*zip(*sorted(curve.items())), f"C{index}o-", label=label)
        for row in rows:
            if "experts" in row:
                span = row["ratio_low"], row["ratio_high"]
                by_experts.vlines(row["experts"], *span, colors=f"C{index}", alpha=0.5)
    by_experts.axhline(1.0, color="gray", linewidth=1)
    finish(by_experts, "experts", "time / time of a dense layer", "Of the same active size")
    finish(by_tokens, "tokens in a batch", "microseconds a token", "8 experts")
    figure.savefig(PICTURE, dpi=120)
    print(f"drawn: docs/{PICTURE.name}")


def load(name):
    """The rows of balanced forward and backward passes; none where the file is missing."""
    path = measure.RESULTS / f"{name}.json"
    if not path.exists():
        print(f"left out: benchmarks/results/{path.name} is missing")
        return []
    rows = json.loads(path.read_text())["rows"]
    return [
        row
        for row in rows
        if row["pass"] == "forward+backward" and row.get("skew", "balanced") == "balanced"
    ]


def ratio_by_experts(rows):
    return {row["experts"]: row["ratio"] for row in rows if "experts" in row}


def time_by_tokens(rows):
    return {row["tokens"]: 1e3 * row["ms"] / row["tokens"] for row in rows if "experts" in row}


def finish(axes, xlabel, ylabel, title):
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


if __name__ == "__main__":
    main()
