"""One batch through the experts: rows out, a step on each group, weighted sums back.

An engine is a module of this folder with one interface:

- `supports(setting)`: whether it can compute there.
- `forward(setting, step, tokens, parameters, groups, keep) -> (outputs, saved)`: the outputs of
  all rows, (R', D') with R' >= R, and what the backward pass needs, any structure of tensors.
- `backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient)`: from
  the gradient of each token, (T, D'), those of all rows, (R', D), those of the combine weights,
  float32 in their shape, and those of `parameters.trained`.

Rows past the last group are padding. No engine promises anything for them.
"""

import functools

import keras
from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.grouped import loop, padded, rows, slices, tiles
from keras_moe.ops.grouped.records import QUANTIZED, Parameters, Setting
from keras_moe.ops.platforms import named_platform

ENGINES = (rows, padded, tiles, loop, slices)


@functools.lru_cache
def choose(setting):
    """The first engine that supports a `Setting`; docs/accelerators.md has a table."""
    return next(engine for engine in ENGINES if engine.supports(setting))


def name_of(engine):
    """The name of an engine: that of its module."""
    return engine.__name__.rpartition(".")[2]


def engine_on(platform, static_shapes, dtype, projections):
    """The name of the engine that computes a list of `Affine` for many rows of a dtype."""
    return name_of(choose(_setting(platform, static_shapes, dtype, Parameters.of(projections))))


def run_grouped(step, tokens, weights, parameters, groups):
    """Apply a step to every group of rows, and sum each token's rows by weight, (T, D').

    Rows outside all groups are not computed: padded and dropped assignments cost nothing. A step is
    compiled once.

    Args:
        step, parameters: a `Step`, and the `Parameters` of all experts.
        tokens: (T, D).
        weights: combine weights, (T, K) or those of choices (R,).
        groups: an `ops.Groups` or an `ops.ChosenGroups`.
    """
    return _run((step, named_platform()), tokens, weights, parameters, groups)


@backend.compile_once
def _run(step_and_platform, *operands):
    step, platform = step_and_platform
    run_on = functools.partial(_run_on, step)
    return run_on(platform, *operands) if platform else backend.on_its_platform(run_on, *operands)


def _run_on(step, platform, tokens, weights, parameters, groups):
    num_rows, dtype = groups.num_rows(), keras.backend.standardize_dtype(tokens.dtype)
    setting = _setting(platform, backend.compiles_static_shapes(), dtype, parameters)._replace(
        num_experts=groups.sizes.shape[0], num_rows=num_rows if isinstance(num_rows, int) else None
    )
    engine = choose(setting)

    def forward(inputs, context, keep, engine=engine):
        tokens, weights, trained = inputs
        groups, frozen = context
        parameters = Parameters(trained, frozen)
        outputs, saved = engine.forward(setting, step, tokens, parameters, groups, keep)
        return ops.cast(groups.sum_rows(outputs, weights), tokens.dtype), (outputs, saved)

    @backend.trace_once
    def backward(inputs, context, residuals, gradient):
        tokens, weights, trained = inputs
        groups, frozen = context
        parameters, row_weights = Parameters(trained, frozen), groups.weight_of_row(weights)
        of_rows, of_weights, of_trained = engine.backward(
            setting, step, tokens, row_weights, parameters, groups, *residuals, gradient
        )
        of_tokens = ops.cast(groups.sum_rows(of_rows), tokens.dtype)
        return of_tokens, ops.cast(of_weights, weights.dtype), of_trained

    # Derivatives of the gradient are those of an engine without loops.
    def plain(inputs, context):
        return forward(inputs, context, keep=False, engine=padded)[0]

    inputs, context = (tokens, weights, parameters.trained), (groups, parameters.frozen)
    return backend.differentiable(forward, backward, inputs, context, plain)


def _setting(platform, static_shapes, dtype, parameters):
    kernels = [kernel for kernel, _, _ in parameters.projections]
    return Setting(
        platform,
        static_shapes,
        dtype,
        widths=(kernels[0].shape[1], *(kernel.shape[-1] for kernel in kernels)),
        converts=any(keras.backend.standardize_dtype(each.dtype) != dtype for each in kernels),
        is_quantized=any(isinstance(kernel, QUANTIZED) for kernel in kernels),
    )
