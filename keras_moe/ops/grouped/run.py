"""One batch through the experts: rows out, a step on each group, weighted sums back."""

import functools

import keras
from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.grouped import engines
from keras_moe.ops.grouped.records import QUANTIZED, Setting
from keras_moe.ops.grouped.steps import products_of
from keras_moe.ops.platforms import PLATFORMS, named_platform, on_platform


def run_grouped(step, tokens, weights, parameters, groups):
    """Apply a step to every group of rows, and sum each token's rows by weight.

    Rows outside of all groups are not computed: padded and dropped assignments cost nothing.

    Args:
        step: a `Step`, hashable. The same one is compiled once.
        tokens: (T, D).
        weights: (T, K) combine weights.
        parameters: the `Parameters` of all experts.
        groups: an `ops.Groups` or an `ops.ChosenGroups`.

    Returns:
        (T, `step.output_width`) in the dtype of `tokens`.
    """
    return _run((step, named_platform()), tokens, weights, parameters, groups)


@backend.compile_once
def _run(step_and_platform, tokens, weights, parameters, groups):
    step, platform = step_and_platform
    run_on = {
        name: functools.partial(_run_on, setting_of(name, tokens, parameters, groups), step)
        for name in PLATFORMS
    }
    return on_platform(run_on, tokens, weights, parameters, groups, name=platform)


def setting_of(platform, tokens, parameters, groups):
    """The `Setting` of a grouped operation on a platform."""
    num_rows = groups.num_rows()
    return Setting(
        platform=platform,
        static_shapes=backend.compiles_static_shapes(),
        dtype=keras.backend.standardize_dtype(tokens.dtype),
        widths=(tokens.shape[-1], *(kernel.shape[-1] for kernel in parameters.all_kernels)),
        num_experts=groups.sizes.shape[0],
        num_rows=num_rows if isinstance(num_rows, int) else None,
        converts=any(kernel.dtype != tokens.dtype for kernel in parameters.all_kernels),
        is_quantized=any(isinstance(kernel, QUANTIZED) for kernel in parameters.frozen),
    )


def _run_on(setting, step, tokens, weights, parameters, groups):
    engine = engines.choose(setting)

    def forward(inputs, context, keep):
        tokens, weights, trained = inputs
        groups, frozen = context
        parameters = trained._replace(frozen=frozen)
        outputs, saved = engine.forward(setting, step, tokens, parameters, groups, keep)
        return ops.cast(groups.sum_rows(outputs, weights), tokens.dtype), (outputs, saved)

    @backend.trace_once
    def backward(inputs, context, residuals, gradient):
        tokens, weights, trained = inputs
        groups, frozen = context
        parameters = trained._replace(frozen=frozen)
        row_weights = groups.weight_of_row(weights)
        gradients = engine.backward(
            setting, step, tokens, row_weights, parameters, groups, *residuals, gradient
        )
        return (
            ops.cast(groups.sum_rows(gradients.rows), tokens.dtype),
            ops.cast(gradients.weights, weights.dtype),
            gradients.parameters._replace(frozen=[]),
        )

    def plain(inputs, context):
        tokens, weights, trained = inputs
        groups, frozen = context
        return run_plainly(step, tokens, weights, trained._replace(frozen=frozen), groups)

    trained, context = parameters._replace(frozen=[]), (groups, parameters.frozen)
    return backend.differentiable(forward, backward, (tokens, weights, trained), context, plain)


def run_plainly(step, tokens, weights, parameters, groups):
    """What `run_grouped` computes, for derivatives of any order: every row by all experts.

    Each product is one of matrices (R, E D) and (E D, H). In each row of the first only the columns
    of the row's expert are not zero.
    """
    parameters = parameters.take(lambda stacked: stacked, tokens.dtype)
    ends = ops.cumsum(groups.sizes)
    row = ops.expand_dims(ops.arange(groups.num_rows(), dtype="int32"), 1)
    is_of_expert = ops.logical_and(row >= ends - groups.sizes, row < ends)
    is_served = ops.any(is_of_expert, axis=1, keepdims=True)

    def project(rows, number):
        kernel, bias = parameters.of(number)
        num_experts, depth, width = kernel.shape
        spread = ops.where(ops.expand_dims(is_of_expert, 2), ops.expand_dims(rows, 1), 0.0)
        spread = ops.reshape(spread, (-1, num_experts * depth))
        product = ops.matmul(spread, ops.reshape(kernel, (num_experts * depth, width)))
        if bias is not None:
            product = product + ops.matmul(ops.cast(is_of_expert, bias.dtype), bias)
        # Not zeros, where an activation may have no derivative: NaN times 0 is NaN.
        return ops.where(is_served, product, 1.0)

    rows = backend.gather_rows(tokens, groups.token_of_row())
    outputs, _ = step.forward(rows, products_of(project, pull=None), keep=False)
    return ops.cast(groups.sum_rows(outputs, weights), tokens.dtype)
