"""Networks of experts, and the derivative of a network on some rows.

The network of an expert is a function `network(rows, linear)` of rows (n, D) that calls
`linear(name, rows)` once for each of its linear maps. The forward pass saves the outputs and
what `linear` returns. The backward pass is derived: the network runs again with each linear map
replaced by its saved output, and the framework differentiates the rest.

A part of the rows, from `Backend.layout` or a tile, has `product(rows, kernels, bias=None,
transposed=False)`, with the kernels of the rows' experts, and `row_numbers()`, (n,) int32.

Axes: T tokens, D features, n rows of a part.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe._internal.keras_internals import compute_output_spec
from keras_moe.backend import backend
from keras_moe.ops import linears
from keras_moe.ops.draws import hashed


class Network(NamedTuple):
    """The network of every expert, but for its weights. Hashable: equal networks compile once."""

    function: Callable  # `function(rows, linear)` returns the outputs of rows (n, D)
    names: tuple  # of its linear maps in the order of their calls
    saved_widths: tuple  # of what is saved besides the output
    output_width: int  # D'
    has_dropout: bool = False  # whether it calls `linear.dropout`
    scale: float | None = None  # of all corrections of low rank

    @property
    def ends_linear(self):
        """Whether the output is what the last of the linear maps returns."""
        return len(self.saved_widths) < len(self.names)


def network_of(function: Callable, features: int, widths: dict) -> Network:
    """The `Network` of a function with linear maps of these widths, {name: (D, H)}."""
    return _traced(function, features, tuple(sorted(widths.items())))


class Problem(NamedTuple):
    """The problem that an engine computes: the arguments of `run_network`, and a layout."""

    network: Network
    platform: str
    tokens: Any
    maps: dict
    plan: Any  # without weights
    key: Any = None
    layout: Any = None  # see `backend.layouts`; None for a loop over tiles

    def trained(self):
        return linears.split(self.maps)[0]


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


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
        return self._compute(name, _like(rows, self._rows))

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
    saved_widths = [widths[name][1] for name in found][: -1 if ends_linear else None]
    return Network(function, tuple(found), tuple(saved_widths), shape[1], has_dropout)


def forward_part(network, rows, part, maps, key=None):
    """The outputs of some rows, and a list of what is saved of them."""
    saved = []

    def compute(name, values):
        saved.append(linears.apply(maps[name], values, part, network.scale))
        return saved[-1]

    outputs = _like(network.function(rows, _Linear(rows, compute, part, key)), rows)
    return outputs, saved[:-1] if network.ends_linear else saved


def backward_part(problem, rows, part, maps, saved, outputs, gradient):
    """From the gradient of outputs: the gradient of rows, and the `factors` of each linear map."""
    network = problem.network
    names, scale = network.names, network.scale
    saved = [*saved, outputs] if network.ends_linear else saved

    def run(rows, *saved):
        given, inputs = dict(zip(names, saved)), {}

        def compute(name, values):
            inputs[name] = values
            transpose = functools.partial(linears.pull, maps[name], part=part, scale=scale)
            return backend.attach_gradient(given[name], values, transpose)

        linear = _Linear(rows, compute, part, problem.key)
        return _like(network.function(rows, linear), rows), [inputs[name] for name in names]

    inputs, pullback = backend.vjp(run, (rows, *saved))
    of_rows, *of_outputs = pullback(gradient)
    return of_rows, {
        name: linears.factors(maps[name], left, right, part, scale)
        for name, left, right in zip(names, inputs, of_outputs)
    }


def _like(values, rows):
    """Values in the dtype of the rows: an activation may compute in float32."""
    # A cast is an operation of a program, even if idle.
    return values if values.dtype == rows.dtype else ops.cast(values, rows.dtype)
