"""Networks of experts: from tokens and a plan to weighted sums of the experts' outputs.

The network of an expert is a function `network(rows, linear)` of rows (n, D) that calls
`linear(name, rows)` once for each of its linear maps. The forward pass saves what the maps return.
The backward pass is derived: the network runs again with each map replaced by its saved output, and
the framework differentiates the operations between them.

A backend divides the rows of all experts into parts, on which the network runs: see
`backend.layouts`.

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
from keras_moe.ops.draws import drop
from keras_moe.ops.linears import Kernel, LinearMap
from keras_moe.ops.plans import row_sums
from keras_moe.ops.sorting import as_dtype


class Problem(NamedTuple):
    """The inputs of a network. The first three get gradients, the others have none."""

    tokens: Any  # (T, D)
    weights: Any  # (T, K), of the assignments
    trained: dict  # {(name, part): tensor (E, ...)}, parts of a `LinearMap`, even if not trainable
    frozen: dict  # {name: kernel}: integers, and what LoRA corrects
    plan: Any  # a `GroupedPlan`
    key: Any = None  # (2,) int32, for dropout; None where there is none

    @property
    def maps(self):
        """The `LinearMap` of all experts by name."""
        maps = {name: LinearMap(kernel) for name, kernel in self.frozen.items()}
        for (name, part), tensor in self.trained.items():
            value = Kernel(tensor) if part == "kernel" else tensor
            maps[name] = maps.get(name, LinearMap())._replace(**{part: value})
        return maps

    @property
    def widest(self):
        """The largest D or H of the maps."""
        return max(max(each.kernel.shape[1:]) for each in self.maps.values())

    @property
    def num_experts(self):
        return next(iter(self.maps.values())).kernel.shape[0]


class Network(NamedTuple):
    """A traced network without its weights. Hashable: equal networks share compiled programs."""

    function: Callable  # `function(rows, linear)` returns the outputs of rows (n, D)
    saved: tuple  # names of the maps whose outputs are saved, in the order of their calls
    last: str | None  # the map whose output the network returns, or None
    output_width: int  # D'
    has_dropout: bool = False  # whether it calls `linear.dropout`

    def forward(self, layout, inputs, context, save=False):
        """Return the weighted sums (T, D') of each token's expert outputs, computed by a layout.

        If `save`, also buffers of what the maps in `saved` return. Rows past the last group may be
        computed; their outputs are not used.
        """
        problem = Problem(*inputs, *context)
        layout, maps, names = layout(problem), problem.maps, self.saved if save else ()

        def on_part(part, maps, carry):
            sums, *buffers = carry
            rows = part.gather(problem.tokens)
            linear = Linear(part, maps, rows, problem.key)
            outputs = as_dtype(self.function(rows, linear), rows.dtype)
            outputs_of_maps = (linear.outputs[name] for name in names)
            sums = part.add_to_sums(sums, outputs, weighted=True)
            return [sums, *map(part.write, buffers, outputs_of_maps)]

        buffers = [layout.buffer(maps[name].kernel.shape[2]) for name in names]
        carry = [layout.sums(self.output_width), *buffers]
        sums, *buffers = layout.for_each_part(on_part, maps, carry)
        return as_dtype(sums, problem.tokens.dtype), tuple(buffers)

    def backward(self, layout, inputs, context, buffers, gradient):
        """Return the gradients of the inputs: of tokens, weights and trained tensors."""
        problem = Problem(*inputs, *context)
        layout, maps, trained = layout(problem), problem.maps, problem.trained

        def on_part(part, maps, carry):
            d_tokens, d_weights, d_trained = carry
            rows, d_outputs = part.gather(problem.tokens), part.gather(gradient)

            def run(rows, *saved):
                linear = Linear(part, maps, rows, problem.key, dict(zip(self.saved, saved)))
                outputs = as_dtype(self.function(rows, linear), rows.dtype)
                return outputs, (outputs, linear.inputs)

            (outputs, inputs_of_maps), pullback = backend.vjp(run, (rows, *map(part.read, buffers)))
            d_returned = d_outputs
            if self.last is not None:  # in `run` this map returned its inputs
                d_returned = maps[self.last].row_gradients(part, d_outputs)
            weights = as_dtype(part.weights(), rows.dtype)
            d_rows, *d_values = pullback(d_returned * weights)
            d_values = dict(zip(self.saved, d_values))
            if self.last is not None:
                d_values[self.last] = d_outputs * weights
            factors = {
                (name, field): pair
                for name, d_value in d_values.items()
                for field, pair in maps[name].factors(part, inputs_of_maps[name], d_value).items()
            }
            return [
                part.add_to_sums(d_tokens, d_rows),
                part.add_to_assignments(d_weights, row_sums(d_returned, outputs)),
                {key: part.add_gradient(d_trained[key], key[1], *factors[key]) for key in trained},
            ]

        d_trained = {key: layout.gradient(tensor) for key, tensor in trained.items()}
        carry = [layout.sums(problem.tokens.shape[1]), layout.assignments(), d_trained]
        d_tokens, d_weights, d_trained = layout.for_each_part(on_part, maps, carry)
        d_weights = layout.at_assignments(d_weights)
        if self.last is not None and maps[self.last].bias is not None:
            bias = ops.transpose(as_dtype(maps[self.last].bias, "float32"))
            of_bias = ops.matmul(as_dtype(gradient, "float32"), bias)
            d_weights = d_weights + backend.take_columns(of_bias, problem.plan.experts)
        d_trained = {
            key: None if each is None else as_dtype(each, trained[key].dtype)
            for key, each in d_trained.items()
        }
        d_tokens = as_dtype(d_tokens, problem.tokens.dtype)
        return d_tokens, as_dtype(d_weights, problem.weights.dtype), d_trained

    def run_on_all(self, problem):
        """Return the outputs (T, E, D') of all experts for each token: products of whole stacks."""
        part = AllTokens(problem.tokens, problem.num_experts)
        outputs = self.function(part.rows, Linear(part, problem.maps, part.rows))
        return ops.transpose(part.by_expert(outputs), (1, 0, 2))


class Linear:
    """The `linear` that is passed to a network: its linear maps and dropout, on rows of a part.

    In the backward pass its maps return what the forward pass has `saved`, by their names. A last
    one, whose outputs would be those of the network, returns its rows.
    """

    def __init__(self, part, maps, rows, key=None, saved=None):
        self._part, self._maps, self._rows, self._key, self._saved = part, maps, rows, key, saved
        self.inputs, self.outputs = {}, {}
        self.num_dropouts = 0

    def __call__(self, name, rows=None):
        if rows is None:  # A vector of each expert is a map from one feature.
            rows = ops.ones((ops.shape(self._rows)[0], 1), self._rows.dtype)
        rows, linear_map = as_dtype(rows, self._rows.dtype), self._maps[name]
        if self._saved is not None:
            transpose, outputs = functools.partial(linear_map.row_gradients, self._part), rows
            if name in self._saved:
                outputs = backend.attach_gradient(self._saved[name], rows, transpose)
        else:
            outputs = self._part.product(rows, linear_map.kernel, linear_map.bias)
            if linear_map.lora_a is not None:
                outputs = outputs + linear_map.correction(self._part, rows)
        self.inputs[name], self.outputs[name] = rows, outputs
        return outputs

    def dropout(self, rows, rate):
        """Rows (n, H), each number set to 0 with the probability `rate`, or scaled, in training."""
        self.num_dropouts += bool(rate)
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` must be at least 0 and below 1. Received: rate={rate}")
        if self._key is None or not rate:
            return rows
        # By a key and the numbers of the rows, draws are the same in both passes.
        return drop(rows, rate, self._part.row_numbers(), self._key + self.num_dropouts)


def network_of(function: Callable, features: int, widths: dict) -> Network:
    """The `Network` of a function with linear maps of these widths, {name: (D, H)}."""
    return _traced(function, features, tuple(sorted(widths.items())))


@functools.lru_cache
def _traced(function, features, widths):
    widths = dict(widths)
    maps = {name: LinearMap((name, *each)) for name, each in widths.items()}
    found: dict = {}

    def trace(rows):
        part = _TracedPart(rows)
        # With a key, as in training: outputs that are dropped are not those of the last map.
        linear = Linear(part, maps, rows, key=ops.zeros((2,), "int32"))
        outputs = function(rows, linear)
        if any(map(backend.is_written, linear.outputs.values())):
            raise ValueError(
                "A network must not write into what `linear` returns: `y = y + x`, not `y += x`. "
                f"Received: the outputs of one of {part.calls} are written into"
            )
        is_last = bool(part.calls) and outputs is linear.outputs[part.calls[-1]]
        found.update(names=part.calls, is_last=is_last, has_dropout=linear.num_dropouts > 0)
        return outputs

    outputs = compute_output_spec(trace, keras.KerasTensor((8, features), "float32"))
    shape, names = tuple(getattr(outputs, "shape", ())), tuple(found["names"])
    if sorted(names) != sorted(widths) or len(shape) != 2 or shape[0] != 8:
        raise ValueError(
            "A network must call `linear` once with each name in `widths`, and return rows. "
            f"Received: calls of {sorted(names)} of {sorted(widths)}, outputs of shape {shape} "
            f"for rows of shape (8, {features})"
        )
    # A vector is a map of a constant: without its output no gradient reaches the rows.
    is_last = found["is_last"] and widths[names[-1]][0] > 1
    saved, last = (names[:-1], names[-1]) if is_last else (names, None)
    return Network(function, saved, last, shape[1], found["has_dropout"])


class _TracedPart:
    """A part whose products are zeros: a network is traced with it for its calls and shapes."""

    def __init__(self, rows):
        self.calls, self._num_rows = [], rows.shape[0]

    def row_numbers(self):
        return ops.arange(self._num_rows, dtype="int32")

    def product(self, rows, kernel, bias):
        name, fan_in, fan_out = kernel
        self.calls.append(name)
        if len(rows.shape) != 2 or rows.shape[1] != fan_in:
            rule = f"`linear({name!r}, rows)` must have rows of {fan_in} features"
            raise ValueError(f"{rule}. Received: rows.shape={tuple(rows.shape)}")
        return ops.zeros((ops.shape(rows)[0], fan_out), rows.dtype)
