"""Redraws docs/speed.png and docs/scaling.png from benchmarks/results/.

    python -m benchmarks.figure

Speed is the middle of all processes and their span. It reads what these two commands write on each
backend:

    python -m benchmarks.layer --experts 8 16 32 64
    python -m benchmarks.layer --experts 8 --tokens 1024 4096 16384 65536 --tag=-tokens

Scaling is a bound, not a measurement, from what `python -m benchmarks.topologies` writes.
"""

import json
import pathlib

from benchmarks import measure

DOCS = pathlib.Path(__file__).parents[1] / "docs"
BACKENDS = {"tensorflow": "TensorFlow XLA", "jax": "JAX", "torch": "PyTorch"}


def main():
    draw_speed()
    draw_scaling()


def draw_speed():
    figure = new_figure(width=9)
    by_experts, by_tokens = figure.subplots(1, 2)
    for index, (backend, label) in enumerate(BACKENDS.items()):
        rows = balanced(f"layer-{backend}")
        for axes, curve in (
            (by_experts, ratio_by_experts(rows)),
            (by_tokens, time_by_tokens(balanced(f"layer-{backend}-tokens"))),
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
    save(figure, "speed.png")


def draw_scaling():
    """Efficiency: the time of the products to the bound, with the products of one chip as 1."""
    rows = load("topologies")
    if not rows:
        return
    figure = new_figure(width=5)
    axes = figure.subplots()
    chips = [row["chips"] for row in rows]
    axes.plot(
        chips, [1 / row["bound_ratio"] for row in rows], "o-", label="products and network overlap"
    )
    overlap = [row["product_ms"] / (row["product_ms"] + row["network_ms"]) for row in rows]
    axes.plot(chips, overlap, "o:", label="nothing overlaps")
    finish(axes, "chips", "efficiency of a step (bound)", "Expert parallelism, TPU v5e")
    axes.set_xticks(chips, chips)
    axes.legend(loc="lower left")
    save(figure, "scaling.png")


def new_figure(width):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 3.6), layout="constrained")


def save(figure, name):
    figure.savefig(DOCS / name, dpi=120)
    print(f"drawn: docs/{name}")


def balanced(name):
    """The rows of balanced forward and backward passes."""
    return [
        row
        for row in load(name)
        if row["pass"] == "forward+backward" and row.get("skew", "balanced") == "balanced"
    ]


def load(name):
    """The rows of a file; none where it is missing."""
    path = measure.RESULTS / f"{name}.json"
    if not path.exists():
        print(f"left out: benchmarks/results/{path.name} is missing")
        return []
    return json.loads(path.read_text())["rows"]


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
