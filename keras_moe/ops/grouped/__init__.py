"""Grouped computation: each group of rows meets only its own expert's weights.

Axes: T tokens, D features, E experts, R rows (assignments sorted by expert), H hidden width,
B rows of a tile.

Where to read, in the order of a batch:

- `run`: chooses an engine, and makes the operation differentiable.
- `engines`: which engine computes where, and the interface that all have.
- `rows`, `padded`, `tiles`, `slices`: the engines, each of which feeds rows to a step; `blocks` has
  the products of `tiles` with integer kernels where rows are few.
- `steps`: the arithmetic of one expert on some of its rows, the same for all engines.
- `records`: what passes between these.

`functions` applies any functions to groups of rows, for experts that are Keras layers.
"""

from keras_moe.ops.grouped.run import run_grouped
from keras_moe.ops.grouped.steps import feed_forward_step, low_rank_step, product_step

__all__ = ["feed_forward_step", "low_rank_step", "product_step", "run_grouped"]
