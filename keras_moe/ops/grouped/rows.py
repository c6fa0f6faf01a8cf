"""Engine that hands all rows at once to kernels for grouped products, for accelerators.

Sizes of groups stay on the device. Where the kernels can, they add the bias, apply what the step
puts behind a product, and cast the experts' weights tile by tile.
"""

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.grouped.records import Gradients, Parameters
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
    return Gradients(
        row_gradient,
        groups.weight_gradients(outputs, gradient),
        _parameter_gradients(setting, factors, parameters, groups.sizes),
    )


def _products(setting, parameters, sizes):
    def multiply(rows, numbers, then):
        pairs = list(map(parameters.of, numbers))
        kernels = [kernel for kernel, _ in pairs]
        biases = [bias for _, bias in pairs if bias is not None]
        return backend.grouped_products(setting.platform, rows, kernels, biases, sizes, then)

    def pull(gradient, number, then, *extras):
        kernels = [parameters.all_kernels[number]]
        return backend.grouped_products(
            setting.platform, gradient, kernels, [], sizes, then, extras, transposed=True
        )

    return Products(multiply, pull, backend.remakes_factors(setting.platform))


def _parameter_gradients(setting, factors, parameters, sizes):
    kernels, biases = [], []
    for number, (left, right) in enumerate(factors):
        kernel, bias = parameters.of(number)
        is_frozen = number < len(parameters.frozen)
        if is_frozen and bias is None:
            continue
        remade = left if isinstance(left, Remade) else Remade(None, (left,))
        of_kernel, of_bias = backend.grouped_kernel_gradients(
            setting.platform, remade.inputs, right, sizes, kernel, bias, remade.function
        )
        if not is_frozen:
            kernels.append(of_kernel)
        if bias is not None:
            biases.append(of_bias)
    return Parameters(kernels, biases)
