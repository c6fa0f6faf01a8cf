"""Computation in passes: buffers for the expected rows, and more passes where more come.

A device that has some of the experts may be sent every token, or none. Shapes are fixed, but memory
for the worst case would be that of all devices. So buffers hold somewhat more than a mean share of
the rows; what exceeds it is computed by further passes of a loop, usually none. Only the first pass
saves anything for the backward pass; others are computed again there.

Axes: T tokens, E experts, K experts per token, R rows.
"""

from keras import ops

from keras_moe import backend
from keras_moe.ops.grouped import run_grouped
from keras_moe.ops.groups import Groups


def sum_passes(nth_pass, num_passes, inputs, context):
    """The sum of all passes, at least one.

    Args:
        nth_pass: function of a number and the context that returns a function of the inputs.
        num_passes: function of the context, an integer tensor.
        inputs: tuple of tensors that have a gradient.
        context: tuple of integer tensors.
    """

    def forward(inputs, context, keep):
        context = tuple(context)
        first = nth_pass(0, context)
        output, pullback = backend.vjp(first, inputs) if keep else (first(*inputs), ())

        def add(number, total):
            return total + nth_pass(number, context)(*inputs)

        return ops.fori_loop(1, num_passes(context), add, output), pullback

    def backward(inputs, context, pullback, gradient):
        context = tuple(context)

        def add(number, totals):
            _, pullback = backend.vjp(nth_pass(number, context), inputs)
            return tuple(map(ops.add, totals, pullback(gradient)))

        return ops.fori_loop(1, num_passes(context), add, tuple(pullback(gradient)))

    return backend.differentiable(forward, backward, inputs, context)


def run_in_passes(step, tokens, weights, kernels, biases, groups, length):
    """What `run_grouped` computes, in passes of `length` rows, an integer.

    Args:
        step, tokens, weights, kernels, biases: as for `run_grouped`.
        groups: an `ops.Groups`.
        length: rows of a pass.

    Returns:
        (T, `step.output_width`) in the dtype of `tokens`.
    """
    if length >= groups.num_rows():
        return run_grouped(step, tokens, weights, kernels, biases, groups)

    def nth_pass(number, context):
        part = _part(Groups(*context), number * length, length)

        def run(tokens, weights, *parameters):
            halves = list(parameters[: len(kernels)]), list(parameters[len(kernels) :])
            return run_grouped(step, tokens, weights, *halves, part)

        return run

    def num_passes(context):
        return (ops.sum(Groups(*context).sizes) + length - 1) // length

    return sum_passes(nth_pass, num_passes, (tokens, weights, *kernels, *biases), tuple(groups))


def _part(groups, start, length):
    """The groups of `length` rows from `start` on."""
    ends = ops.cumsum(groups.sizes)
    inside = ops.clip(ends - start, 0, length) - ops.clip(ends - groups.sizes - start, 0, length)
    rows = groups.rows_of_token - start
    # The last part may reach past the end.
    assignments = ops.pad(groups.assignment_of_row, (0, length))
    return Groups(
        sizes=inside,
        assignment_of_row=backend.slice_at(assignments, (start,), (length,)),
        rows_of_token=ops.where(ops.logical_and(rows >= 0, rows < length), rows, -1),
    )
