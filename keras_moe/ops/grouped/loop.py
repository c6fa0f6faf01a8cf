"""Engine that loops over the experts that have rows, for few rows where shapes may depend on data.

As in decoding, when most experts have none: in `slices` even they cost their operations.
"""

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.grouped import slices

# With more rows for an expert, on average, it is faster to compute experts side by side.
MOST_ROWS = 0.5

# The same where kernels are converted: those of experts without rows are not in a loop.
MOST_CONVERTED_ROWS = 16


def supports(setting):
    # The number of rows is asked last: `torch.export` fixes what it is compared with.
    if setting.static_shapes or setting.platform != "cpu" or not backend.loops_over_groups():
        return False
    if setting.num_rows is None:
        return setting.is_quantized
    return setting.num_rows <= _most_rows(setting)


def _most_rows(setting):
    return setting.num_experts * (MOST_CONVERTED_ROWS if setting.converts else MOST_ROWS)


def forward(setting, step, tokens, parameters, groups, keep):
    arguments = setting, step, tokens, parameters, groups, keep
    if setting.num_rows is not None:
        return _in_loop(*arguments)
    # A program for batches of any size, with integers as kernels: it has both ways.
    few = groups.num_rows() <= _most_rows(setting)
    return ops.cond(few, lambda: _in_loop(*arguments), lambda: _side_by_side(*arguments))


def _side_by_side(setting, step, tokens, parameters, groups, keep):
    outputs, saved = slices.forward(setting, step, tokens, parameters, groups, keep)
    return outputs, slices.join_saved(setting, groups, saved)


def _in_loop(setting, step, tokens, parameters, groups, keep):
    token_of_row = groups.token_of_row()
    projections = slices.stored(parameters, setting.dtype)
    widths = [step.output_width, *(step.saved_widths if keep else ())]

    def compute(expert, rows):
        tokens_of_rows = backend.gather_rows(tokens, backend.gather_rows(token_of_row, rows))
        # The size of a group is needed where its expert is an integer only.
        products = slices.Run([None], [expert], None).products(projections)
        output, saved = step.forward(tokens_of_rows, products, keep)
        return [output, *saved]

    buffers = [ops.zeros((groups.num_rows(), width), setting.dtype) for width in widths]
    outputs, *saved = backend.loop_over_groups(compute, groups.sizes, buffers)
    return outputs, saved


def backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient):
    saved = slices.split_saved(setting, groups, saved)
    return slices.backward(
        setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient
    )
