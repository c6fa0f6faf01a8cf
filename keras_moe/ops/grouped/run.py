"""One batch through the experts: rows out, a step on each group, weighted sums back.

An engine is a module of this folder with one interface:

- `supports(setting)`: whether it can compute there.
- `forward(setting, step, tokens, parameters, groups, keep) -> (outputs, saved)`: the outputs of
  all rows, (R', D') with R' >= R, and what the backward pass needs, any structure of tensors.
- `backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient)`:
  the `Gradients`, from the gradient of each token, (T, D').

Rows past the last group are padding. No engine promises anything for them.
"""

import functools

import keras
from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.grouped import loop, padded, rows, slices, tiles
from keras_moe.ops.grouped.records import QUANTIZED, Parameters, Setting
from keras_moe.ops.grouped.steps import products_of
from keras_moe.ops.platforms import named_platform, on_platform

ENGINES = (rows, padded, tiles, loop, slices)


def choose(setting):
    """The first engine that supports a `Setting`.

    | backend | platform | engine |
    | --- | --- | --- |
    | JAX | TPU | `rows` by Pallas; float16, integer kernels, symbolic sizes: `padded` |
    | JAX | GPU | `rows` by Triton; before sm80, integer kernels, symbolic sizes: `padded` |
    | PyTorch | CUDA, sm90 or newer | `rows` for bfloat16 and widths that are multiples of 8 |
    | TensorFlow with XLA | GPU, TPU | `padded` |
    | JAX, TensorFlow with XLA | CPU | `tiles` |
    | PyTorch | CPU, and GPU otherwise | `slices` |
    | TensorFlow without XLA | all | `slices`; few rows on a CPU: `loop` |
    """
    return next(engine for engine in ENGINES if engine.supports(setting))


def name_of(engine):
    """The name of an engine: that of its module."""
    return engine.__name__.rpartition(".")[2]


def engine_on(platform, static_shapes, dtype, projections):
    """The name of the engine that computes a list of `Affine` for many rows of a dtype."""
    kernels = [kernel for kernel, _, _ in Parameters.of(projections).projections]
    widths = (kernels[0].shape[1], *(kernel.shape[-1] for kernel in kernels))
    is_quantized = any(isinstance(kernel, QUANTIZED) for kernel in kernels)
    setting = Setting(platform, static_shapes, dtype, widths, is_quantized=is_quantized)
    return name_of(choose(setting))


def run_grouped(step, tokens, weights, parameters, groups):
    """Apply a step to every group of rows, and sum each token's rows by weight.

    Rows outside all groups are not computed: padded and dropped assignments cost nothing.

    Args:
        step: a `Step`, hashable. The same one is compiled once.
        tokens: (T, D).
        weights: combine weights, (T, K) or those of choices (R,).
        parameters: the `Parameters` of all experts.
        groups: an `ops.Groups` or an `ops.ChosenGroups`.

    Returns:
        (T, `step.output_width`) in the dtype of `tokens`.
    """
    return _run((step, named_platform()), tokens, weights, parameters, groups)


@backend.compile_once
def _run(step_and_platform, *operands):
    step, _ = step_and_platform
    return on_platform(functools.partial(_run_on, step), *operands)


def _run_on(step, platform, tokens, weights, parameters, groups):
    setting = _setting(platform, tokens, parameters, groups)
    engine = choose(setting)

    def forward(inputs, context, keep):
        tokens, weights, trained = inputs
        groups, frozen = context
        parameters = Parameters(trained, frozen)
        outputs, saved = engine.forward(setting, step, tokens, parameters, groups, keep)
        return ops.cast(groups.sum_rows(outputs, weights), tokens.dtype), (outputs, saved)

    @backend.trace_once
    def backward(inputs, context, residuals, gradient):
        tokens, weights, trained = inputs
        groups, frozen = context
        gradients = engine.backward(
            setting,
            step,
            tokens,
            groups.weight_of_row(weights),
            Parameters(trained, frozen),
            groups,
            *residuals,
            gradient,
        )
        return (
            ops.cast(groups.sum_rows(gradients.rows), tokens.dtype),
            ops.cast(gradients.weights, weights.dtype),
            gradients.trained,
        )

    def plain(inputs, context):
        tokens, weights, trained = inputs
        groups, frozen = context
        return _run_plainly(step, tokens, weights, Parameters(trained, frozen), groups)

    inputs, context = (tokens, weights, parameters.trained), (groups, parameters.frozen)
    return backend.differentiable(forward, backward, inputs, context, plain)


def _run_plainly(step, tokens, weights, parameters, groups):
    """`run_grouped` for derivatives of any order: every row by all experts.

    Each product is one of matrices (R, E D) and (E D, H). In each row of the first only the columns
    of the row's expert are not zero.
    """
    projections = parameters.take(lambda stacked: stacked, tokens.dtype)
    ends = ops.cumsum(groups.sizes)
    row = ops.expand_dims(ops.arange(groups.num_rows(), dtype="int32"), 1)
    is_of_expert = ops.logical_and(row >= ends - groups.sizes, row < ends)
    is_served = ops.any(is_of_expert, axis=1, keepdims=True)

    def project(rows, number):
        kernel, bias, _ = projections[number]
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


def _setting(platform, tokens, parameters, groups):
    num_rows = groups.num_rows()
    kernels = [kernel for kernel, _, _ in parameters.projections]
    return Setting(
        platform=platform,
        static_shapes=backend.compiles_static_shapes(),
        dtype=keras.backend.standardize_dtype(tokens.dtype),
        widths=(tokens.shape[-1], *(kernel.shape[-1] for kernel in kernels)),
        num_experts=groups.sizes.shape[0],
        num_rows=num_rows if isinstance(num_rows, int) else None,
        converts=any(kernel.dtype != tokens.dtype for kernel in kernels),
        is_quantized=any(isinstance(kernel, QUANTIZED) for kernel in kernels),
    )
