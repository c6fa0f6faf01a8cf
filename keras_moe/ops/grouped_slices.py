"""Driver of a grouped operation that takes groups in slices of their exact sizes.

For frameworks whose shapes may depend on data. Where sizes are known, small groups that stand one
behind another are one slice: only their products are made one by one.
"""

from itertools import zip_longest
from typing import Any, NamedTuple

from keras import ops

from keras_moe import backend
from keras_moe.ops.groups import row_sums

# For so many rows together an operation costs more than its call, and they stay in the cache.
RUN_ROWS = 512


def forward(step, tokens, kernels, biases, groups, keep):
    token_of_row, outputs, saved = groups.token_of_row(), [], []
    for run in _runs(groups):
        output, kept = step.forward(
            backend.gather_rows(tokens, token_of_row[run.rows]), run.projections(kernels, biases)
        )
        outputs.append(output)
        if keep:
            saved.append(kept)
    return _all_rows(outputs, (step.output_width, tokens.dtype), groups), saved


def backward(step, tokens, row_weights, kernels, biases, groups, outputs, saved, gradient):
    token_of_row, row_parts, weight_parts = groups.token_of_row(), [], []
    row_weights = ops.expand_dims(ops.cast(row_weights, tokens.dtype), 1)

    def factors_of_runs():
        for run, kept in zip(_runs(groups), saved):
            output_gradient = backend.gather_rows(gradient, token_of_row[run.rows])
            row_gradient, factors = step.backward(
                backend.gather_rows(tokens, token_of_row[run.rows]),
                run.projections(kernels, biases),
                kept,
                output_gradient * row_weights[run.rows],
            )
            row_parts.append(row_gradient)
            weight_parts.append(row_sums(output_gradient, outputs[run.rows]))
            yield run.sizes, run.experts, factors

    # Each run's gradients can be put in place before the next one's are computed.
    gradients = backend.stack_gradients(factors_of_runs(), kernels, biases)
    return (
        _all_rows(row_parts, (tokens.shape[1], tokens.dtype), groups),
        _all_rows(weight_parts, (1, "float32"), groups)[:, 0],
        *gradients,
    )


class _Run(NamedTuple):
    """Groups that stand one behind another: the sizes and experts of all, and all their rows."""

    sizes: list
    experts: list
    rows: slice

    def projections(self, kernels, biases):
        return [_Projection(self, kernel, bias) for kernel, bias in zip_longest(kernels, biases)]


class _Projection(NamedTuple):
    """The affine maps of the experts of a run."""

    run: _Run
    kernel: Any
    bias: Any

    def __call__(self, rows):
        sizes, experts, _ = self.run
        return backend.multiply_groups(rows, sizes, experts, self.kernel, self.bias)

    def pull(self, gradient):
        sizes, experts, _ = self.run
        return backend.multiply_groups(gradient, sizes, experts, self.kernel, transposed=True)


def _runs(groups):
    """All groups in runs of up to `RUN_ROWS` rows; longer ones and unknown ones by themselves."""
    start = end = 0
    sizes: list = []
    experts: list = []
    for expert, size in enumerate(backend.unstack_sizes(groups.sizes)):
        is_known = isinstance(size, int)
        # Each operation on nothing would cost as much as on a few rows.
        if is_known and size == 0:
            continue
        if sizes and not (is_known and end - start + size <= RUN_ROWS):
            yield _Run(sizes, experts, slice(start, end))
            start, sizes, experts = end, [], []
        sizes.append(size)
        experts.append(expert)
        end = end + size
    if sizes:
        yield _Run(sizes, experts, slice(start, end))


def _all_rows(parts, width_and_dtype, groups):
    """All rows, where `parts` holds the rows of each run: those of no group are zero."""
    width, dtype = width_and_dtype
    computed = sum(ops.shape(part)[0] for part in parts)
    nobody = ops.zeros((groups.num_rows() - computed, width), dtype)
    return ops.concatenate([*parts, nobody])
