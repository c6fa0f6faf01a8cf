"""Grouped computation: each group of rows meets only its own expert's kernels.

Axes: T tokens, D features, E experts, R rows (assignments sorted by expert), H hidden width,
B rows a block.

A grouped operation is a *step*, the arithmetic of one expert on some of its rows, and a driver
that feeds it. There are two, with one interface, because frameworks differ in one thing only:

- Where every shape is fixed at compile time (XLA), rows are taken in blocks: `grouped_blocks`.
  Kernels are taken one expert at a time, and the hidden activations of a block stay in cache,
  which is why this can be faster than one large dense layer.
- Where shapes may depend on data (eager PyTorch, TensorFlow without XLA), each group is one slice
  of its exact size: `grouped_slices`.

Neither computes a row that belongs to no group: padded and dropped assignments cost nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

from keras import ops

from keras_moe import backend
from keras_moe.ops import grouped_blocks, grouped_slices


class Step(NamedTuple):
    """The arithmetic of one expert on rows that are all its own.

    - `forward(rows, kernels) -> (output_rows, saved)`
    - `backward(rows, kernels, saved, output_gradient) -> (row_gradient, factors, bias_gradients)`.
      The gradient of a matrix is `left^T right`: its two factors, tensors of rows, are returned and
      the driver multiplies them. Kernels are first all matrices, then all biases.
    - `saved_widths`: the width of each tensor of rows in `saved`.
    - `output_width`: the width of `output_rows`.
    """

    forward: Callable
    backward: Callable
    saved_widths: tuple
    output_width: int


def run_grouped(step, tokens, weights, kernels, groups):
    """Apply `step` to every group of rows, and sum each token's rows by weight.

    Args:
        step: a `Step`.
        tokens: (T, D).
        weights: (T, K) combine weights.
        kernels: list of tensors with the expert axis first, (E, ...).
        groups: an `ops.Groups` or an `ops.ChosenGroups`.

    Returns:
        (T, `step.output_width`) in the dtype of `tokens`.
    """
    driver = grouped_blocks if backend.compiles_static_shapes() else grouped_slices
    groups_of = type(groups)

    def forward(inputs, context):
        tokens, weights, *kernels = inputs
        groups = groups_of(*context)
        rows, saved = driver.forward(step, tokens, kernels, groups)
        return groups.sum_rows(rows, weights), (rows, saved)

    def backward(inputs, context, saved, gradient):
        tokens, weights, *kernels = inputs
        groups = groups_of(*context)
        rows, kept = saved
        row_gradient, weight_gradient, kernel_gradients = driver.backward(
            step, tokens, groups.weight_of_row(weights), kernels, groups, rows, kept, gradient
        )
        return (
            groups.sum_rows(row_gradient),
            ops.cast(groups.at_assignments(weight_gradient), weights.dtype),
            *kernel_gradients,
        )

    return backend.differentiable(forward, backward, (tokens, weights, *kernels), tuple(groups))
