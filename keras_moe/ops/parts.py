"""Engine of grouped products, on parts of the rows that the backend chooses: see `backend.layouts`.

Axes: T tokens, D features, R rows.
"""

from keras import ops

from keras_moe.ops.networks import backward_part, dtype_of, forward_part
from keras_moe.ops.plans import row_sums


def forward(problem, save):
    layout, token_of_row = problem.layout, problem.plan.token_of_row()
    outputs, saved = [], []
    for part, rows in zip(layout.parts, layout.gather(problem.tokens, token_of_row)):
        output, of_part = forward_part(problem.network, rows, part, problem.maps, problem.key)
        outputs.append(output)
        saved.append(of_part if save else ())
    dtype = dtype_of(problem.tokens)
    return layout.join(outputs, problem.network.output_width, dtype), saved


def backward(problem, row_weights, outputs, saved, gradient):
    layout, token_of_row = problem.layout, problem.plan.token_of_row()
    tokens, dtype = problem.tokens, dtype_of(problem.tokens)
    row_weights = ops.expand_dims(ops.cast(row_weights, dtype), 1)
    of_rows, of_weights = [], []
    totals = {
        name: {field: layout.empty(tensor) for field, tensor in fields.items()}
        for name, fields in problem.trained().items()
    }
    # Each part's gradients are in place before the next part's are computed.
    for part, of_part, rows, of_outputs, weights, output in zip(
        layout.parts,
        saved,
        layout.gather(tokens, token_of_row),
        layout.gather(gradient, token_of_row),
        layout.split(row_weights),
        layout.split(outputs),
    ):
        row_gradient, factors = backward_part(
            problem, rows, part, problem.maps, of_part, output, of_outputs * weights
        )
        of_rows.append(row_gradient)
        of_weights.append(row_sums(of_outputs, output))
        for name, fields in factors.items():
            for field, pair in fields.items():
                totals[name][field] = part.gradient(field, *pair, totals[name][field])
    of_maps = {
        name: {f: ops.stack(x) if isinstance(x, list) else x for f, x in fields.items()}
        for name, fields in totals.items()
    }
    of_rows = layout.join(of_rows, tokens.shape[1], dtype)
    return of_rows, layout.join(of_weights, 1, "float32"), of_maps
