"""Networks of experts: from tokens and a plan to the weighted sums of the experts' outputs.

The network of an expert is a function `network(rows, linear)` of rows (n, D) that calls
`linear(name, rows)` once for each of its linear maps. The forward pass saves the outputs and
what `linear` returns. The backward pass is derived: the network runs again with each linear map
replaced by its saved output, and the framework differentiates the rest.

A network runs on parts of the rows of all experts, which the backend lays out: see
`backend.layouts`. Second derivatives, and forward mode, come from the same network in one part,
built on `backend.product`, which has derivatives of any order.

Axes: T tokens, D features, E experts, R rows (assignments sorted by expert), n rows of a part.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe._internal.keras_internals import compute_output_spec
from keras_moe.backend import backend
from keras_moe.backend.base import named_platform
from keras_moe.backend.layouts import AllRows, AllTokens
from keras_moe.ops.draws import hashed
from keras_moe.ops.linears import Kernel, Linear
from keras_moe.ops.plans import row_sums


class Network(NamedTuple):
    """The network of every expert, but for its weights. Hashable: equal networks compile once."""

    function: Callable  # `function(rows, linear)` returns the outputs of rows (n, D)
    names: tuple  # of its linear maps in the order of their calls
    output_width: int  # D'
    ends_linear: bool  # whether the output is what the last of the linear maps returns
    has_dropout: bool = False  # whether it calls `linear.dropout`


def network_of(function: Callable, features: int, widths: dict) -> Network:
    """The `Network` of a function with linear maps of these widths, {name: (D, H)}."""
    return _traced(function, features, tuple(sorted(widths.items())))


class Problem(NamedTuple):
    """The inputs of a network: tokens, linear maps, a plan and a key of random draws."""

    tokens: Any  # (T, D)
    maps: dict  # the `Linear` maps of all experts, by name
    plan: Any  # a `GroupedPlan`
    key: Any = None  # (2,) int32, for dropout; None where there is none

    def split(self):
        """Two structures: tensors with a gradient, and all others."""
        trained, frozen = {}, {}
        for name, linear in self.maps.items():
            fields = {field: each for field, each in linear._asdict().items() if each is not None}
            # Integers never train, nor does what factors correct.
            if linear.lora_a is not None or linear.kernel.scale is not None:
                frozen[name] = fields.pop("kernel")
            trained[name] = {f: x if f == "bias" else x.values for f, x in fields.items()}
        inputs = self.tokens, self.plan.weights, trained
        return inputs, (self.plan._replace(weights=None), frozen, self.key)

    @classmethod
    def join(cls, inputs, context):
        """Inverse of `split`."""
        (tokens, weights, trained), (plan, frozen, key) = inputs, context
        maps = {}
        for name, fields in trained.items():
            fields = {f: x if f == "bias" else Kernel(x) for f, x in fields.items()}
            maps[name] = Linear(**{"kernel": frozen.get(name), **fields})
        return cls(tokens, maps, plan._replace(weights=weights), key)


class _Linear:
    """Argument of a network: its linear maps, `compute(name, rows)`, and dropout, on some rows.

    Random numbers depend on a key and the numbers of the rows: they are the same in both passes.
    """

    def __init__(self, rows, compute, part=None, key=None):
        self._rows, self._compute, self._part, self._key = rows, compute, part, key
        self.num_dropouts = 0

    def __call__(self, name, rows=None):
        if rows is None:  # a vector of each expert
            rows = ops.ones((ops.shape(self._rows)[0], 1), self._rows.dtype)
        if rows.dtype != self._rows.dtype:
            rows = ops.cast(rows, self._rows.dtype)
        return self._compute(name, rows)

    def dropout(self, rows, rate):
        """Rows (n, H), each number set to 0 with the probability `rate`, or scaled, in training."""
        self.num_dropouts += bool(rate)
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` must be at least 0 and below 1. Received: rate={rate}")
        if self._key is None or not rate:
            return rows
        key = self._key + self.num_dropouts
        kept = hashed(self._part.row_numbers(), rows.shape[1], key) >= rate
        return ops.where(kept, rows / (1 - rate), ops.zeros((), rows.dtype))


@functools.lru_cache
def _traced(function, features, widths):
    found, widths, ends_linear, has_dropout = {}, dict(widths), False, False

    def compute(name, rows):
        if name not in widths or name in found:
            raise ValueError(
                "A network must call `linear` once with each name in `widths`. "
                f"Received: {name!r}{' again' * (name in found)}, of {sorted(widths)}"
            )
        fan_in, fan_out = widths[name]
        if len(rows.shape) != 2 or rows.shape[1] != fan_in:
            raise ValueError(
                f"`linear({name!r}, rows)` must have rows of {fan_in} features. "
                f"Received: rows.shape={tuple(rows.shape)}"
            )
        found[name] = ops.zeros((ops.shape(rows)[0], fan_out), rows.dtype)
        return found[name]

    def trace(rows):
        nonlocal ends_linear, has_dropout
        found.clear()
        linear = _Linear(rows, compute)
        outputs = function(rows, linear)
        ends_linear = bool(found) and outputs is found[list(found)[-1]]
        has_dropout = linear.num_dropouts > 0
        return outputs

    outputs = compute_output_spec(trace, keras.KerasTensor((8, features), "float32"))
    shape = tuple(getattr(outputs, "shape", ()))
    if set(found) != set(widths) or len(shape) != 2 or shape[0] != 8:
        raise ValueError(
            "A network must call `linear` once with each name in `widths`, and return rows. "
            f"Received: calls of {sorted(found)} of {sorted(widths)}, outputs of shape {shape} "
            f"for rows of shape (8, {features})"
        )
    return Network(function, tuple(found), shape[1], ends_linear, has_dropout)


# What a linear map returns is saved, and with low-rank factors `x A` before it.


def saved_widths(network, maps):
    """Width of each tensor in the list that `forward_part` saves."""
    linears = [maps[name] for name in network.names]
    kernels = [kernel for each in linears for kernel in (each.lora_a, each.kernel) if kernel]
    widths = [kernel.shape[2] for kernel in kernels]
    return widths[:-1] if network.ends_linear else widths


def forward_part(network, part, maps, rows, key=None):
    """The outputs of some rows, and a list of what is saved of them."""
    saved = []

    def compute(name, values):
        linear = maps[name]
        output = part.product(values, linear.kernel, linear.bias)
        if linear.lora_a is not None:
            saved.append(part.product(values, linear.lora_a))
            output = output + part.product(saved[-1], linear.lora_b)
        saved.append(output)
        return output

    outputs = _like(network.function(rows, _Linear(rows, compute, part, key)), rows)
    return outputs, saved[:-1] if network.ends_linear else saved


def backward_part(network, part, maps, rows, saved, outputs, d_outputs, key=None):
    """From the gradient of outputs: the gradient of rows, and factors of the maps' gradients.

    These are {name: {field: (left, right)}}. For each expert the gradient of a bias is the sum of
    `right`, of any other tensor `left^T right`.
    """
    saved = [*saved, outputs] if network.ends_linear else saved

    def run(rows, *saved):
        inputs, values_in_order = [], iter(saved)

        def attach(value, inputs, kernel):
            transpose = functools.partial(part.product, kernels=kernel, transposed=True)
            return backend.attach_gradient(value, inputs, transpose)

        def compute(name, values):
            kernel, _, lora_a, lora_b = maps[name]
            inputs.append(values)
            if lora_a is None:
                return attach(next(values_in_order), values, kernel)
            low = attach(next(values_in_order), values, lora_a)
            return attach(attach(next(values_in_order), values, kernel), low, lora_b)

        linear = _Linear(rows, compute, part, key)
        return _like(network.function(rows, linear), rows), inputs

    inputs, pullback = backend.vjp(run, (rows, *saved))
    d_rows, *d_saved = pullback(d_outputs)
    pairs, factors = zip(saved, d_saved), {}
    for name, values in zip(network.names, inputs):
        low, d_low = (None, None) if maps[name].lora_a is None else next(pairs)
        _, d_output = next(pairs)
        factors[name] = {
            "kernel": (values, d_output),
            "bias": (values, d_output),
            "lora_a": (values, d_low),
            "lora_b": (low, d_output),
        }
    return d_rows, factors


def _like(values, rows):
    """Values in the dtype of the rows: an activation may compute in float32."""
    # A cast is an operation of a program, even if idle.
    return values if values.dtype == rows.dtype else ops.cast(values, rows.dtype)


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
