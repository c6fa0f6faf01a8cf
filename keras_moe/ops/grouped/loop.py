"""Engine that loops over the experts that have rows, for few rows where shapes may depend on data.

As in decoding, when most experts have none: in `slices` even they cost their operations.
"""

from keras import ops

from keras_moe import backend
from keras_moe.ops.grouped import slices

# With more rows for an expert, on average, it is faster to compute experts side by side.
MOST_ROWS = 4

# The same where kernels are converted, which is faster in a loop.
MOST_ROWS_OF_INTEGERS = 16


def supports(setting):
    # The number of rows is asked last: `torch.export` fixes what it is compared with.
    if setting.platform != "cpu" or setting.num_rows is None or not backend.loops_over_groups():
        return False
    most = MOST_ROWS_OF_INTEGERS if setting.is_quantized else MOST_ROWS
    return setting.num_rows <= most * setting.num_experts


def forward(setting, step, tokens, parameters, groups, keep):
    rows = backend.gather_rows(tokens, groups.token_of_row())
    widths = [step.output_width, *(step.saved_widths if keep else ())]

    def compute(expert, start, end):
        products = slices.Run([end - start], [expert], end - start).products(parameters)
        output, saved = step.forward(rows[start:end], products, keep)
        return [output, *saved]

    buffers = [ops.zeros((setting.num_rows, width), setting.dtype) for width in widths]
    outputs, *saved = backend.loop_over_groups(compute, groups.sizes, buffers)
    return outputs, saved


def backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient):
    saved = slices.saved_of_runs(setting, groups, saved)
    return slices.backward(
        setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient
    )
