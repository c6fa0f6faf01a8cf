"""Engine that takes groups in slices of their exact sizes, where shapes may depend on data.

Neighbouring groups form a run: they share every operation but their products, which are computed
one by one.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.grouped.records import Kernels
from keras_moe.ops.grouped.steps import Products
from keras_moe.ops.groups import row_sums

# So many rows outweigh the overhead of a call on a CPU, and still fit into the cache.
CPU_RUN_ROWS = 512


def supports(setting):
    return not setting.static_shapes


def forward(setting, step, tokens, parameters, groups, keep):
    layout, projections = _Layout(setting, groups), stored(parameters, tokens.dtype)
    outputs, saved = [], []
    for run, rows in zip(layout.runs, layout.gather(tokens)):
        output, of_run = step.forward(rows, run.products(projections), keep)
        outputs.append(output)
        saved.append(of_run)
    return layout.join(outputs, step.output_width, tokens.dtype), saved


def backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient):
    layout, projections = _Layout(setting, groups), stored(parameters, tokens.dtype)
    row_weights = ops.expand_dims(ops.cast(row_weights, tokens.dtype), 1)
    gathered = map(layout.gather, (tokens, gradient))
    parts = map(layout.split, (row_weights, outputs))
    of_rows, of_weights = [], []
    # Each run's gradients are put in place before those of the next one are computed.
    of_experts = backend.stacked_gradients(parameters.trained)
    for run, of_run, rows, of_outputs, weights, outputs in zip(
        layout.runs, saved, *gathered, *parts
    ):
        row_gradient, factors = step.backward(
            rows, run.products(projections), of_run, of_outputs * weights
        )
        of_rows.append(row_gradient)
        of_weights.append(row_sums(of_outputs, outputs))
        of_experts.add(run.sizes, run.experts, factors)
    return (
        layout.join(of_rows, tokens.shape[1], tokens.dtype),
        groups.at_assignments(layout.join(of_weights, 1, "float32")[:, 0]),
        of_experts.result(),
    )


def stored(parameters, dtype):
    """The `Kernels` and the bias, or None, of each projection."""
    return [(Kernels(kernel, dtype), bias) for kernel, bias, _ in parameters.projections]


def join_saved(setting, groups, saved):
    """The saved tensors of all rows, from those of each run."""
    layout = _Layout(setting, groups)
    return [layout.join(parts, parts[0].shape[1], setting.dtype) for parts in zip(*saved)]


def split_saved(setting, groups, saved):
    """Inverse of `join_saved`."""
    layout = _Layout(setting, groups)
    parts = [layout.split(values) for values in saved]
    return [[part[number] for part in parts] for number in range(len(layout.runs))]


class Run(NamedTuple):
    """Neighbouring groups: the sizes and experts of all, and how many rows they have together."""

    sizes: list
    experts: list
    num_rows: Any

    def products(self, projections):
        """The `Products` of the rows of the run with what `stored` returns."""
        groups, times = self[:2], backend.multiply_groups

        def multiply(rows, numbers, then):
            return then(*(times(rows, *groups, *projections[number]) for number in numbers))

        def pull(gradient, number, then, *extras):
            kernels, _ = projections[number]
            return then(times(gradient, *groups, kernels, transposed=True), *extras)

        return Products(multiply, pull)


class _Layout:
    """All groups in runs, and padding past them; a group of unknown size is a run by itself.

    On a CPU a run has up to `CPU_RUN_ROWS` rows, or one group. On a GPU all groups are one run: the
    fewer kernels are launched, the better.
    """

    def __init__(self, setting, groups):
        self._token_of_row = groups.token_of_row()
        *sizes, self._num_padding = backend.unstack_sizes(groups.sizes, groups.num_rows())
        self._are_known = backend.knows_sizes()
        self.runs: list = []
        longest = CPU_RUN_ROWS if setting.platform == "cpu" else float("inf")
        for expert, size in enumerate(sizes):
            # An operation on zero rows would cost as much as on a few.
            if self._are_known and size == 0:
                continue
            if self._are_known and self.runs and self.runs[-1].num_rows + size <= longest:
                of_run, experts, num_rows = self.runs[-1]
                self.runs[-1] = Run([*of_run, size], [*experts, expert], num_rows + size)
            else:
                self.runs.append(Run([size], [expert], size))

    def gather(self, values):
        """The rows of each run, from values of all tokens; an iterable.

        Gathered run by run they stay in the cache. In a program of unknown sizes a run is one
        expert, and one operation for all is faster.
        """
        if not self._are_known:
            return self.split(backend.gather_rows(values, self._token_of_row))
        parts = self.split(self._token_of_row)
        return (backend.gather_rows(values, part) for part in parts[:-1])

    def split(self, values):
        """The part of each run, and the padding, of values of all rows."""
        return backend.split_rows(values, [*(run.num_rows for run in self.runs), self._num_padding])

    def join(self, parts, width, dtype):
        """Values of all rows, from those of each run; padding is zero."""
        return backend.join_rows([*parts, ops.zeros((self._num_padding, width), dtype)])
