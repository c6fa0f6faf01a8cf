"""Grouped computation: each group of rows meets only its own expert's kernels.

Axes: T tokens, D features, E experts, R rows (assignments sorted by expert), H hidden width,
B rows a block.

A grouped operation is a *step*, the arithmetic of one expert on some of its rows, and a driver
that feeds it. There are two, with one interface, because frameworks differ in one thing only:

- Where every shape is fixed at compile time (XLA), rows are taken in blocks: `grouped_blocks`.
  Kernels are taken one expert at a time, and no tensor has the hidden width of all rows but the
  pre-activations.
- Where shapes may depend on data (eager PyTorch, TensorFlow without XLA), groups are taken in
  slices of their exact sizes: `grouped_slices`.

Neither computes a row that belongs to no group: padded and dropped assignments cost nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

from keras import ops

from keras_moe import backend
from keras_moe.ops import grouped_blocks, grouped_slices


class Step(NamedTuple):
    """The arithmetic of the experts on rows that are all their own.

    It multiplies by projections, one for each kernel: `projection(rows)` is the affine map of the
    expert of each row, `projection.pull(gradient)` the product with its transposed kernel. All it
    returns has the dtype of the rows that it is given.

    - `forward(rows, projections) -> (output_rows, saved)`
    - `backward(rows, projections, saved, output_gradient) -> (row_gradient, factors)`. For each
      projection, `factors` has the rows that it took in and the gradient of those it gave out; the
      driver makes the gradients of kernel and bias from them.
    - `saved_widths`: the width of each tensor of rows in `saved`.
    - `output_width`: the width of `output_rows`.
    """

    forward: Callable
    backward: Callable
    saved_widths: tuple
    output_width: int


@backend.compile_once
def run_grouped(step, tokens, weights, kernels, biases, groups):
    """Apply `step` to every group of rows, and sum each token's rows by weight.

    Args:
        step: a `Step`, hashable. The same one is compiled once.
        tokens: (T, D).
        weights: (T, K) combine weights.
        kernels: list of tensors (E, D, H), of as many projections.
        biases: as many tensors (E, H), or none.
        groups: an `ops.Groups` or an `ops.ChosenGroups`.

    Returns:
        (T, `step.output_width`) in the dtype of `tokens`.
    """
    driver = grouped_blocks if backend.compiles_static_shapes() else grouped_slices
    groups_of = type(groups)

    def forward(inputs, context, keep):
        tokens, weights, *parameters = inputs
        groups = groups_of(*context)
        rows, saved = driver.forward(step, tokens, *halves(parameters), groups, keep)
        return ops.cast(groups.sum_rows(rows, weights), tokens.dtype), (rows, saved)

    def backward(inputs, context, saved, gradient):
        tokens, weights, *parameters = inputs
        groups = groups_of(*context)
        rows, kept = saved
        row_weights = groups.weight_of_row(weights)
        row_gradient, weight_gradient, *parameter_gradients = driver.backward(
            step, tokens, row_weights, *halves(parameters), groups, rows, kept, gradient
        )
        return (
            ops.cast(groups.sum_rows(row_gradient), tokens.dtype),
            ops.cast(groups.at_assignments(weight_gradient), weights.dtype),
            *parameter_gradients,
        )

    def halves(parameters):
        return parameters[: len(kernels)], parameters[len(kernels) :]

    inputs = (tokens, weights, *kernels, *biases)
    return backend.differentiable(forward, backward, inputs, tuple(groups))
