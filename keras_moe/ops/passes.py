"""Computation in passes: buffers for the expected rows, and more passes where more come.

A device that has some of the experts may be sent every token, or none. Shapes are fixed, but memory
for the worst case would be that of all devices. So the first pass has buffers for little more than
a mean share of the rows. What exceeds it goes through shorter passes of a loop, often none. Only
the first pass saves anything for the backward pass; the others are computed again there.

Axes: T tokens, E experts, K experts per token, R rows.
"""

from typing import NamedTuple

import keras
from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.assignments import ceil_divide
from keras_moe.ops.grouped import run_grouped
from keras_moe.ops.grouped.records import Parameters
from keras_moe.ops.groups import Groups
from keras_moe.ops.platforms import keeping_platform


class Lengths(NamedTuple):
    """How many rows the first pass takes, and each of those that may follow. Integers."""

    first: int
    further: int

    @classmethod
    def of_mean_share(cls, num_rows):
        """A thirty-second more than the mean share of the rows, then a quarter at a time."""
        return cls(ceil_divide(33 * num_rows, 32), ceil_divide(num_rows, 4))

    def split(self, number):
        """As many passes for rows in so many buckets, each of which takes its part."""
        return Lengths(ceil_divide(self.first, number), ceil_divide(self.further, number))

    def span(self, number):
        """The first row of a pass, and its length; only the integer 0 is the first pass."""
        if isinstance(number, int) and number == 0:
            return 0, self.first
        return self.first + (number - 1) * self.further, self.further

    def passes_for(self, num_rows):
        """How many passes so many rows take, at least one. An integer tensor."""
        return 1 + ceil_divide(ops.maximum(num_rows - self.first, 0), self.further)


def sum_passes(pass_over, lengths, num_rows, num_passes, inputs, context):
    """The sum of all passes of the `lengths`, at least one, with derivatives for the inputs.

    `pass_over(start, length, context)` returns a function of the inputs: `length` is `num_rows` for
    all rows at once. `num_passes(context)` is an integer tensor. Inputs are a tuple of structures
    of tensors, the context is a structure.
    """

    def nth_pass(number, context):
        return pass_over(*lengths.span(number), context)

    def forward(inputs, context, keep):
        first = nth_pass(0, context)
        output, pullback = backend.vjp(first, inputs) if keep else (first(*inputs), ())

        def add(number, total):
            return total + nth_pass(number, context)(*inputs)

        return ops.fori_loop(1, num_passes(context), add, output), pullback

    def backward(inputs, context, pullback, gradient):
        def add(number, totals):
            _, pullback = backend.vjp(nth_pass(number, context), inputs)
            return keras.tree.map_structure(ops.add, totals, pullback(gradient))

        return ops.fori_loop(1, num_passes(context), add, pullback(gradient))

    def plain(inputs, context):
        return pass_over(0, num_rows, context)(*inputs)

    forward, backward, plain = map(keeping_platform, (forward, backward, plain))
    return backend.differentiable(forward, backward, inputs, context, plain)


def run_in_passes(step, tokens, weights, parameters, groups, lengths):
    """`run_grouped` for an `ops.Groups`, in passes of the `lengths`."""
    if lengths.first >= groups.num_rows():
        return run_grouped(step, tokens, weights, parameters, groups)

    def pass_over(start, length, context):
        groups, frozen = context
        part = _part(groups, start, length)
        return lambda tokens, weights, trained: run_grouped(
            step, tokens, weights, Parameters(trained, frozen), part
        )

    def num_passes(context):
        groups, _ = context
        return lengths.passes_for(ops.sum(groups.sizes))

    inputs, context = (tokens, weights, parameters.trained), (groups, parameters.frozen)
    return sum_passes(pass_over, lengths, groups.num_rows(), num_passes, inputs, context)


def _part(groups, start, length):
    """The groups of `length` rows from `start` on."""
    ends = ops.cumsum(groups.sizes)
    inside = ops.clip(ends - start, 0, length) - ops.clip(ends - groups.sizes - start, 0, length)
    rows = groups.rows_of_token - start
    # The last part may overrun the rows.
    assignments = ops.pad(groups.assignment_of_row, (0, length))
    return Groups(
        sizes=inside,
        assignment_of_row=backend.slice_at(assignments, (start,), (length,)),
        rows_of_token=ops.where(ops.logical_and(rows >= 0, rows < length), rows, -1),
    )
