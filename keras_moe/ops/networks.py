"""Networks of experts: from tokens and a plan to weighted sums of the experts' outputs.

The network of an expert is a function `network(rows, linear)` of rows (n, D) that calls
`linear(name, rows)` once for each of its linear maps. The forward pass saves what the maps return.
The backward pass is derived: the network runs again with each map replaced by its saved output, and
the framework differentiates the operations between them.

A backend divides the rows of all experts into parts, on which the network runs: see
`backend.layouts`. All rows are one part where the framework differentiates all operations: where
derivatives of any order are asked for, and of small problems on PyTorch.

Axes: T tokens, D features, E experts, R rows (assignments sorted by expert), n rows of a part.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe._internal.keras_internals import compute_output_spec
from keras_moe.backend import backend
from keras_moe.backend.layouts import AllTokens
from keras_moe.ops.draws import hashed
from keras_moe.ops.linears import Kernel, LinearMap
from keras_moe.ops.plans import row_sums
from keras_moe.ops.sorting import as_dtype


class Problem(NamedTuple):
    """The inputs of a network: tokens, linear maps, a plan and a key of random draws."""

    tokens: Any  # (T, D)
    maps: dict  # the `LinearMap` of all experts by name
    plan: Any  # a `GroupedPlan`
    key: Any = None  # (2,) int32, for dropout; None where there is none

    def inputs_and_context(self):
        """Return the tensors that get gradients, and all others, as two structures."""
        trained: dict = {}
        frozen = {}
        for name, (kernel, *others) in self.maps.items():
            fields = zip(LinearMap._fields[1:], others)
            trained |= {(name, field): each for field, each in fields if each is not None}
            # Integers, and kernels that LoRA corrects, are frozen.
            if kernel.bits is None and (name, "lora_a") not in trained:
                trained[name, "kernel"], kernel = kernel.values, None
            frozen[name] = kernel
        inputs = self.tokens, self.plan.weights, trained
        return inputs, (self.plan._replace(weights=None), frozen, self.key)

    @classmethod
    def of(cls, inputs, context):
        """Inverse of `inputs_and_context`."""
        (tokens, weights, trained), (plan, frozen, key) = inputs, context
        maps = {
            name: LinearMap(
                kernel or Kernel(trained[name, "kernel"]),
                *(trained.get((name, field)) for field in LinearMap._fields[1:]),
            )
            for name, kernel in frozen.items()
        }
        return cls(tokens, maps, plan._replace(weights=weights), key)


class Network(NamedTuple):
    """A traced network without its weights. Hashable: equal networks share compiled programs."""

    function: Callable  # `function(rows, linear)` returns the outputs of rows (n, D)
    saved: tuple  # names of the maps whose outputs are saved, in the order of their calls
    last: str | None  # the map whose output the network returns, or None
    output_width: int  # D'
    has_dropout: bool = False  # whether it calls `linear.dropout`

    def run(self, platform, problem):
        """Return the weighted sums (T, D') of each token's expert outputs, on one device.

        Rows past the last group are not computed: padded and dropped assignments cost nothing.
        """
        layout = backend.differentiable_layout(problem, platform)
        if layout is not None:
            return self._outputs(layout, problem)[0]
        passes = (functools.partial(each, platform) for each in (self._forward, self._backward))
        return backend.differentiable(*passes, *problem.inputs_and_context())

    def _forward(self, platform, inputs, context, save):
        problem = Problem.of(inputs, context)
        return self._outputs(backend.layout(problem, platform), problem, save)

    def _outputs(self, layout, problem, save=False):
        """Return the weighted sums; if `save`, also buffers of the outputs and of `saved`."""
        tokens, maps, plan, key = problem

        def compute(part, maps, rows):
            linear = Linear(rows, part, maps, key)
            outputs = as_dtype(self.function(rows, linear), rows.dtype)
            saved = [outputs, *(linear.outputs[name] for name in self.saved)] if save else []
            return [outputs, *saved], {}

        width = self.output_width
        widths = [width, width, *(maps[name].kernel.shape[2] for name in self.saved)]
        widths = widths if save else [width]
        sums, buffers, _ = layout.run(compute, maps, [tokens], [], widths, {}, plan.weights)
        return as_dtype(sums, tokens.dtype), buffers

    def _backward(self, platform, inputs, context, buffers, gradient):
        """Return the gradients of tokens, weights and trained tensors."""
        tokens, maps, plan, key = problem = Problem.of(inputs, context)
        layout, trained = backend.layout(problem, platform), inputs[2]

        def compute(part, maps, rows, d_outputs, weights, outputs, *saved):
            values = dict(zip(self.saved, saved))
            if self.last is not None:
                values[self.last] = outputs

            def run(rows, *tensors):
                linear = LinearAgain(rows, part, maps, key, dict(zip(values, tensors)))
                return as_dtype(self.function(rows, linear), rows.dtype), linear.inputs

            inputs, pullback = backend.vjp(run, (rows, *values.values()))
            d_rows, *d_values = pullback(d_outputs * weights)
            factors = {
                (name, field): pair
                for name, d_value in zip(values, d_values)
                for field, pair in maps[name].factors(part, inputs[name], d_value).items()
                if (name, field) in trained
            }
            return [d_rows, row_sums(d_outputs, outputs)], factors

        weights = layout.of_assignments(as_dtype(plan.weights, tokens.dtype))
        by_token, by_row, widths = [tokens, gradient], [weights, *buffers], [tokens.shape[1], None]
        d_tokens, (d_weights,), d_maps = layout.run(
            compute, maps, by_token, by_row, widths, trained
        )
        d_weights = layout.at_assignments(d_weights)
        return as_dtype(d_tokens, tokens.dtype), as_dtype(d_weights, plan.weights.dtype), d_maps

    def run_on_all(self, tokens, maps):
        """Return the outputs (T, E, D') of all experts for each token: products of whole stacks."""
        num_experts = next(iter(maps.values())).kernel.shape[0]
        part = AllTokens(tokens, num_experts)
        outputs = self.function(part.rows, Linear(part.rows, part, maps))
        return ops.transpose(part.by_expert(outputs), (1, 0, 2))


class Linear:
    """The `linear` that is passed to a network: its linear maps and dropout, on some rows."""

    def __init__(self, rows, part, maps, key=None):
        self._rows, self._part, self._maps, self._key = rows, part, maps, key
        self.outputs = {}
        self.num_dropouts = 0

    def __call__(self, name, rows=None):
        self.outputs[name] = self._maps[name].outputs(self._part, self._as_input(rows))
        return self.outputs[name]

    def _as_input(self, rows):
        if rows is None:  # A vector of each expert is a map from one feature.
            return ops.ones((ops.shape(self._rows)[0], 1), self._rows.dtype)
        return as_dtype(rows, self._rows.dtype)

    def dropout(self, rows, rate):
        """Rows (n, H), each number set to 0 with the probability `rate`, or scaled, in training."""
        self.num_dropouts += bool(rate)
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` must be at least 0 and below 1. Received: rate={rate}")
        if self._key is None or not rate:
            return rows
        # By a key and the numbers of the rows, random numbers are the same in both passes.
        key = self._key + self.num_dropouts
        kept = hashed(self._part.row_numbers(), rows.shape[1], key) >= rate
        return ops.where(kept, rows / (1 - rate), ops.zeros((), rows.dtype))


class LinearAgain(Linear):
    """The `linear` of the backward pass: maps return what the forward pass saved."""

    def __init__(self, rows, part, maps, key, values):
        super().__init__(rows, part, maps, key)
        self._values = values
        self.inputs = {}

    def __call__(self, name, rows=None):
        self.inputs[name] = rows = self._as_input(rows)
        transpose = functools.partial(self._maps[name].row_gradients, self._part)
        return backend.attach_gradient(self._values[name], rows, transpose)


def network_of(function: Callable, features: int, widths: dict) -> Network:
    """The `Network` of a function with linear maps of these widths, {name: (D, H)}."""
    return _traced(function, features, tuple(sorted(widths.items())))


@functools.lru_cache
def _traced(function, features, widths):
    widths = dict(widths)
    found: dict = {}

    def trace(rows):
        linear = _TracedLinear(rows, widths)
        outputs = function(rows, linear)
        names = tuple(linear.calls)
        is_last = bool(names) and outputs is linear.outputs[names[-1]]
        found.update(names=names, is_last=is_last, has_dropout=linear.num_dropouts > 0)
        return outputs

    outputs = compute_output_spec(trace, keras.KerasTensor((8, features), "float32"))
    shape, names = tuple(getattr(outputs, "shape", ())), found["names"]
    if sorted(names) != sorted(widths) or len(shape) != 2 or shape[0] != 8:
        raise ValueError(
            "A network must call `linear` once with each name in `widths`, and return rows. "
            f"Received: calls of {sorted(names)} of {sorted(widths)}, outputs of shape {shape} "
            f"for rows of shape (8, {features})"
        )
    saved, last = (names[:-1], names[-1]) if found["is_last"] else (names, None)
    return Network(function, saved, last, shape[1], found["has_dropout"])


class _TracedLinear(Linear):
    """The `linear` with which a network is traced for its shapes."""

    def __init__(self, rows, widths):
        super().__init__(rows, None, {})
        self._widths = widths
        self.calls = []

    def __call__(self, name, rows=None):
        rows = self._as_input(rows)
        self.calls.append(name)
        # Other names are refused when all calls are known.
        fan_in, fan_out = self._widths.get(name, 2 * (rows.shape[-1],))
        if len(rows.shape) != 2 or rows.shape[1] != fan_in:
            raise ValueError(
                f"`linear({name!r}, rows)` must have rows of {fan_in} features. "
                f"Received: rows.shape={tuple(rows.shape)}"
            )
        self.outputs[name] = ops.zeros((ops.shape(rows)[0], fan_out), rows.dtype)
        return self.outputs[name]
