"""All experts on a batch: from tokens and a plan to the weighted sums of the experts' outputs.

The network of an expert runs on the rows of all experts: in tiles of one expert, inside a loop, for
XLA on CPUs and few rows in a graph of TensorFlow (`tiles`); elsewhere on parts of the rows, made of
grouped products (`parts`). Second derivatives, and forward mode, come from the same network built
on `backend.product`, which has derivatives of any order.

Axes: T tokens, D features, E experts, R rows (assignments sorted by expert).
"""

import functools

from keras import ops

from keras_moe.backend import backend
from keras_moe.backend.layouts import AllRows, AllTokens
from keras_moe.ops import linears, parts, tiles
from keras_moe.ops.networks import Problem, dtype_of, forward_part
from keras_moe.ops.platforms import named_platform


def run_network(network, tokens, maps, plan, key=None, platform=None):
    """The weighted sums (T, D') of the outputs of each token's experts.

    Rows outside all groups are not computed: padded and dropped assignments cost nothing. `maps`
    are the `Linear` maps of all experts by name, `plan` is sorted, `key` (2,) int32 is for dropout,
    None where there is none, and `platform` None for the one that is found: `on_its_platform`.
    """
    trained, frozen = linears.split(maps)
    inputs, context = (tokens, plan.weights, trained), (plan.without_weights(), frozen, key)
    return _run((network, platform or named_platform()), inputs, context)


@backend.compile_once
def _run(network_and_platform, inputs, context):
    network, platform = network_and_platform
    run = functools.partial(_run_on, network)
    if platform:
        return run(platform, inputs, context)
    return backend.on_its_platform(run, inputs, context)


def _run_on(network, platform, inputs, context):
    def forward(inputs, context, save):
        problem = _problem(network, platform, inputs, context)
        engine = parts if problem.layout else tiles
        outputs, saved = engine.forward(problem, save)
        tokens, weights, _ = inputs
        return ops.cast(problem.plan.sum_rows(outputs, weights), tokens.dtype), (outputs, saved)

    def backward(inputs, context, residuals, gradient):
        tokens, weights, _ = inputs
        problem = _problem(network, platform, inputs, context)
        engine = parts if problem.layout else tiles
        row_weights = problem.plan.weight_of_row(weights)
        of_rows, of_weights, of_maps = engine.backward(problem, row_weights, *residuals, gradient)
        of_tokens = ops.cast(problem.plan.sum_rows(of_rows), tokens.dtype)
        of_weights = ops.cast(problem.plan.at_assignments(of_weights[:, 0]), weights.dtype)
        return of_tokens, of_weights, of_maps

    def reference(inputs, context):
        (tokens, weights, trained), (plan, frozen, key) = inputs, context
        part = AllRows(backend, plan.sizes, plan.num_rows(), platform)
        rows = backend.gather_rows(tokens, plan.token_of_row())
        outputs, _ = forward_part(network, rows, part, linears.join(trained, frozen), key)
        return ops.cast(plan.sum_rows(outputs, weights), tokens.dtype)

    return backend.differentiable(forward, backward, inputs, context, reference)


def engine_on(platform, static_shapes):
    """The name of the engine for many rows, "tiles" or "parts"."""
    return "tiles" if platform == "cpu" and static_shapes else "parts"


def _problem(network, platform, inputs, context):
    (tokens, _, trained), (plan, frozen, key) = inputs, context
    maps = linears.join(trained, frozen)
    converts = any(dtype_of(each.kernel) != dtype_of(tokens) for each in maps.values())
    layout = backend.layout(plan.sizes, plan.num_rows(), platform, converts)
    return Problem(network, platform, tokens, maps, plan, key, layout)


def run_on_all(network, tokens, maps):
    """The outputs (T, E, D') of all experts for each token (T, D): products of whole stacks."""
    num_experts = next(iter(maps.values())).kernel.shape[0]
    part = AllTokens(tokens, num_experts)
    outputs, _ = forward_part(network, part.rows, part, maps)
    if network.ends_linear and network.scale is None:
        outputs = part.last_products
    else:
        outputs = ops.reshape(outputs, (num_experts, ops.shape(tokens)[0], outputs.shape[1]))
    return ops.transpose(outputs, (1, 0, 2))
