"""Grouped computation: each group of rows meets only its own expert's weights.

Axes: T tokens, D features, E experts, R rows (assignments sorted by expert), H hidden width,
B rows of a tile.

Where to read, in the order of a batch:

- `run`: chooses an engine, and makes the operation differentiable.
- `rows`, `padded`, `tiles`, `slices`, `loop`: the engines, each of which feeds rows to a step.
- `steps`: the arithmetic of one expert on some of its rows, the same for all engines.
- `records`: what passes between these.

`functions` applies any functions to groups of rows, for experts that are Keras layers.
"""

from keras_moe.ops.grouped.run import engine_on, run_grouped
from keras_moe.ops.grouped.steps import product_step, step_of

__all__ = ["engine_on", "product_step", "run_grouped", "step_of"]
