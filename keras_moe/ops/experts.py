"""All experts on a batch: from tokens and a plan to the weighted sums of the experts' outputs.

The network of an expert runs on parts of the rows of all experts, which the backend lays out: see
`backend.layouts`. Second derivatives, and forward mode, come from the same network in one part,
built on `backend.product`, which has derivatives of any order.

Axes: T tokens, D features, E experts, R rows (assignments sorted by expert).
"""

import functools

from keras import ops

from keras_moe.backend import backend
from keras_moe.backend.layouts import AllRows, AllTokens
from keras_moe.ops.networks import Problem, backward_part, forward_part, saved_widths
from keras_moe.ops.plans import row_sums
from keras_moe.ops.platforms import named_platform


def run_network(network, problem, platform=None):
    """The weighted sums (T, D') of the outputs of each token's experts.

    Rows outside all groups are not computed: padded and dropped assignments cost nothing. The plan
    of the problem is sorted, and `platform` is None for the one that is found: `on_its_platform`.
    """
    return _run((network, platform or named_platform()), problem)


@backend.compile_once
def _run(network_and_platform, problem):
    network, platform = network_and_platform
    run = functools.partial(_run_on, network)
    return run(platform, problem) if platform else backend.on_its_platform(run, problem)


def _run_on(network, platform, problem):
    def forward(inputs, context, save):
        problem = Problem.join(inputs, context)
        return _forward(network, problem, backend.layout(problem, platform), save)

    def backward(inputs, context, buffers, gradient):
        problem = Problem.join(inputs, context)
        layout = backend.layout(problem, platform)
        return _backward(network, problem, layout, buffers, gradient, trained=inputs[2])

    def reference(inputs, context):
        problem = Problem.join(inputs, context)
        return _forward(network, problem, AllRows(backend, problem, platform), save=False)[0]

    inputs, context = problem.split()
    return backend.differentiable(forward, backward, inputs, context, reference)


def _forward(network, problem, layout, save):
    tokens, maps, plan, key = problem

    def run(part, maps, rows):
        outputs, saved = forward_part(network, part, maps, rows, key)
        return [outputs, *(saved if save else ())], {}

    widths = [network.output_width, *(saved_widths(network, maps) if save else ())]
    buffers, _ = layout.run(run, maps, [tokens], [], widths, {})
    outputs = layout.join(buffers[0], network.output_width, tokens.dtype)
    return ops.cast(plan.sum_rows(outputs, plan.weights), tokens.dtype), buffers


def _backward(network, problem, layout, buffers, gradient, trained):
    tokens, maps, plan, key = problem

    def run(part, maps, rows, d_outputs, weights, outputs, *saved):
        weighted = d_outputs * weights
        d_rows, factors = backward_part(network, part, maps, rows, saved, outputs, weighted, key)
        return [d_rows, row_sums(d_outputs, outputs)], factors

    weights = ops.expand_dims(ops.cast(plan.weight_of_row(plan.weights), tokens.dtype), 1)
    by_row, features = [layout.split(weights), *buffers], tokens.shape[1]
    (d_rows, d_weights), d_maps = layout.run(
        run, maps, [tokens, gradient], by_row, [features, 1], trained
    )
    d_rows = layout.join(d_rows, features, tokens.dtype)
    d_weights = plan.at_assignments(layout.join(d_weights, 1, plan.weights.dtype)[:, 0])
    return (
        ops.cast(plan.sum_rows(d_rows), tokens.dtype),
        ops.cast(d_weights, plan.weights.dtype),
        d_maps,
    )


def run_on_all(network, tokens, maps):
    """The outputs (T, E, D') of all experts for each token (T, D): products of whole stacks."""
    num_experts = next(iter(maps.values())).kernel.shape[0]
    part = AllTokens(tokens, num_experts)
    outputs, _ = forward_part(network, part, maps, part.rows)
    if network.ends_linear and maps[network.names[-1]].lora_a is None:
        outputs = part.last_products
    else:
        outputs = ops.reshape(outputs, (num_experts, ops.shape(tokens)[0], outputs.shape[1]))
    return ops.transpose(outputs, (1, 0, 2))
