"""Engine that hands all rows at once to kernels for grouped products, for accelerators.

Sizes of groups stay on the device. Where the kernels can, they add the bias, apply what follows a
product in the step, and cast the experts' weights tile by tile.
"""

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.grouped.steps import Products, Remade


def supports(setting):
    # The grids of kernels are integers, and their factors are floats.
    fits = setting.num_rows is not None and not setting.is_quantized
    return fits and backend.has_grouped_products(setting.platform, setting.dtype, setting.widths)


def forward(setting, step, tokens, parameters, groups, keep):
    rows = backend.gather_rows(tokens, groups.token_of_row())
    return step.forward(rows, _products(setting, parameters, groups.sizes), keep)


def backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient):
    token_of_row = groups.token_of_row()
    output_gradient = backend.gather_rows(gradient, token_of_row)
    row_gradient, factors = step.backward(
        backend.gather_rows(tokens, token_of_row),
        _products(setting, parameters, groups.sizes),
        saved,
        output_gradient * ops.cast(ops.expand_dims(row_weights, 1), setting.dtype),
    )
    return (
        row_gradient,
        groups.weight_gradients(outputs, gradient),
        _gradients(setting, factors, parameters, groups.sizes),
    )


def _products(setting, parameters, sizes):
    projections = parameters.projections

    def multiply(rows, numbers, then):
        kernels = [projections[number].kernel for number in numbers]
        biases = [projections[number].bias for number in numbers]
        biases = [bias for bias in biases if bias is not None]
        return backend.grouped_products(setting.platform, rows, kernels, biases, sizes, then)

    def pull(gradient, number, then, *extras):
        kernels = [projections[number].kernel]
        return backend.grouped_products(
            setting.platform, gradient, kernels, [], sizes, then, extras, transposed=True
        )

    return Products(multiply, pull, backend.remakes_factors(setting.platform))


def _gradients(setting, factors, parameters, sizes):
    gradients: list = []
    for trained, projection, (left, right) in zip(
        parameters.trained, parameters.projections, factors
    ):
        gradients.append({})
        if not trained:
            continue
        remade = left if isinstance(left, Remade) else Remade(None, (left,))
        of_kernel, of_bias = backend.grouped_kernel_gradients(
            setting.platform,
            remade.inputs,
            right,
            sizes,
            projection.kernel,
            projection.bias,
            remade.function,
        )
        both = {"kernel": of_kernel, "bias": of_bias}
        gradients[-1].update({name: both[name] for name in trained})
    return gradients
