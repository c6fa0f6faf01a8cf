"""Engine that takes groups in slices of their exact sizes, where shapes may depend on data.

Neighbouring groups form a run: they share every operation but their products, which are computed
one by one.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.grouped.records import Gradients, Kernels
from keras_moe.ops.grouped.steps import products_of
from keras_moe.ops.groups import row_sums

# So many rows outweigh the overhead of a call on a CPU, and still fit into the cache.
CPU_RUN_ROWS = 512


def supports(setting):
    return not setting.static_shapes


def forward(setting, step, tokens, parameters, groups, keep):
    runs, num_behind = _runs(setting, groups)
    projections = stored(parameters, tokens.dtype)
    outputs, saved = [], []
    for run, rows in zip(runs, _gather(tokens, groups.token_of_row(), runs, num_behind)):
        output, of_run = step.forward(rows, run.products(projections), keep)
        outputs.append(output)
        saved.append(of_run)
    return _join(outputs, num_behind, step.output_width, tokens.dtype), saved


def backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient):
    runs, num_behind = _runs(setting, groups)
    projections = stored(parameters, tokens.dtype)
    row_weights = ops.expand_dims(ops.cast(row_weights, tokens.dtype), 1)
    token_of_row = groups.token_of_row()
    gathered = [_gather(values, token_of_row, runs, num_behind) for values in (tokens, gradient)]
    parts = [_split(values, runs, num_behind) for values in (row_weights, outputs)]
    of_rows, of_weights = [], []
    # Each run's gradients are put in place before those of the next one are computed.
    of_experts = backend.stacked_gradients(parameters.trained)
    for run, of_run, rows, of_outputs, weights, outputs in zip(runs, saved, *gathered, *parts):
        row_gradient, factors = step.backward(
            rows, run.products(projections), of_run, of_outputs * weights
        )
        of_rows.append(row_gradient)
        of_weights.append(row_sums(of_outputs, outputs))
        of_experts.add(run.sizes, run.experts, factors)
    return Gradients(
        _join(of_rows, num_behind, tokens.shape[1], tokens.dtype),
        groups.at_assignments(_join(of_weights, num_behind, 1, "float32")[:, 0]),
        of_experts.result(),
    )


def stored(parameters, dtype):
    """The `Kernels` and the bias, or None, of each projection."""
    return [(Kernels(kernel, dtype), bias) for kernel, bias, _ in parameters.projections]


def join_saved(setting, groups, saved):
    """What was saved of each run, as tensors of all rows."""
    _, num_behind = _runs(setting, groups)
    return [_join(parts, num_behind, parts[0].shape[1], setting.dtype) for parts in zip(*saved)]


def split_saved(setting, groups, saved):
    """Inverse of `join_saved`."""
    runs, num_behind = _runs(setting, groups)
    parts = [_split(values, runs, num_behind) for values in saved]
    return [[part[number] for part in parts] for number in range(len(runs))]


class Run(NamedTuple):
    """Neighbouring groups: the sizes and experts of all, and how many rows they have together."""

    sizes: list
    experts: list
    num_rows: Any

    def products(self, projections):
        """The `Products` of the rows of the run with what `stored` returns."""
        sizes, experts, _ = self

        def project(rows, number):
            return backend.multiply_groups(rows, sizes, experts, *projections[number])

        def pull(gradient, number):
            kernels, _ = projections[number]
            return backend.multiply_groups(gradient, sizes, experts, kernels, transposed=True)

        return products_of(project, pull)


def _runs(setting, groups):
    """All groups in runs, and the number of rows past them; groups of unknown size by themselves.

    On a CPU a run has up to `CPU_RUN_ROWS` rows, or one group. On a GPU all groups are one run: the
    fewer kernels are launched, the better.
    """
    longest = CPU_RUN_ROWS if setting.platform == "cpu" else float("inf")
    *all_sizes, num_behind = backend.unstack_sizes(groups.sizes, groups.num_rows())
    if not backend.knows_sizes():
        return [Run([size], [expert], size) for expert, size in enumerate(all_sizes)], num_behind
    runs: list = []
    for expert, size in enumerate(all_sizes):
        # An operation on zero rows would cost as much as on a few.
        if size == 0:
            continue
        if runs and runs[-1].num_rows + size <= longest:
            sizes, experts, num_rows = runs[-1]
            runs[-1] = Run([*sizes, size], [*experts, expert], num_rows + size)
        else:
            runs.append(Run([size], [expert], size))
    return runs, num_behind


def _gather(values, token_of_row, runs, num_behind):
    """The rows of each run, from values of all tokens; an iterable.

    Gathered run by run they stay in the cache. In a program of unknown sizes a run is one expert,
    and one operation for all is faster.
    """
    if not backend.knows_sizes():
        return _split(backend.gather_rows(values, token_of_row), runs, num_behind)
    parts = _split(token_of_row, runs, num_behind)
    return (backend.gather_rows(values, part) for part in parts[:-1])


def _split(values, runs, num_behind):
    """The part of each run, and that past all, of values of all rows."""
    return backend.split_rows(values, [*(run.num_rows for run in runs), num_behind])


def _join(parts, num_behind, width, dtype):
    """Values of all rows, where `parts` holds those of each run; padding is zero."""
    return backend.join_rows([*parts, ops.zeros((num_behind, width), dtype)])
