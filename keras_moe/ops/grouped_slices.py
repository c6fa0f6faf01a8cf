"""Driver of a grouped operation that gives each expert one slice of its exact size.

For frameworks whose shapes may depend on data.
"""

from keras import ops

from keras_moe import backend
from keras_moe.ops.groups import row_sums


def forward(step, tokens, kernels, groups):
    outputs, saved = [], {}
    for expert, _, token_rows in _slices(groups):
        output, saved[expert] = step.forward(
            backend.gather_rows(tokens, token_rows), [kernel[expert] for kernel in kernels]
        )
        outputs.append(output)
    return _all_rows(outputs, (step.output_width, tokens.dtype), groups), saved


def backward(step, tokens, row_weights, kernels, groups, outputs, saved, gradient):
    row_parts, weight_parts = [], []
    row_weights = ops.expand_dims(ops.cast(row_weights, tokens.dtype), 1)

    def kernel_gradients_of_each():
        for expert, rows, token_rows in _slices(groups):
            output_gradient = backend.gather_rows(gradient, token_rows)
            row_gradient, factors, bias_gradients = step.backward(
                backend.gather_rows(tokens, token_rows),
                [kernel[expert] for kernel in kernels],
                saved[expert],
                output_gradient * row_weights[rows],
            )
            row_parts.append(row_gradient)
            weight_parts.append(row_sums(output_gradient * outputs[rows]))
            matrices = [ops.matmul(ops.transpose(left), right) for left, right in factors]
            yield expert, [*matrices, *bias_gradients]

    # An expert's gradients are put in place before the next one's are computed: they never
    # take their room twice.
    kernel_gradients = backend.stack_entries(kernel_gradients_of_each(), kernels)
    return (
        _all_rows(row_parts, (tokens.shape[1], tokens.dtype), groups),
        _all_rows(weight_parts, (1, "float32"), groups)[:, 0],
        kernel_gradients,
    )


def _slices(groups):
    """For each expert with rows: its number, its rows as a slice, and their tokens."""
    start, token_of_row = 0, groups.token_of_row()
    for expert, size in enumerate(backend.unstack_sizes(groups.sizes)):
        rows = slice(start, start + size)
        start = start + size
        # Known in eager mode only. Each operation on nothing would cost as much as on a few rows.
        if not (isinstance(size, int) and size == 0):
            yield expert, rows, token_of_row[rows]


def _all_rows(parts, width_and_dtype, groups):
    """All rows, where `parts` holds the rows of each group: those of no group are zero."""
    width, dtype = width_and_dtype
    computed = sum(ops.shape(part)[0] for part in parts)
    nobody = ops.zeros((groups.num_rows() - computed, width), dtype)
    return ops.concatenate([*parts, nobody])
