"""Engine that takes groups in slices of their exact sizes, where shapes may depend on data.

Neighbouring groups form a run: they share every operation but their products, which are computed
one by one.
"""

from typing import NamedTuple

from keras import ops

from keras_moe import backend
from keras_moe.ops.grouped.records import Gradients, Parameters, Quantized, floats
from keras_moe.ops.grouped.steps import products_of
from keras_moe.ops.groups import row_sums

# So many rows outweigh the overhead of a call on a CPU, and still fit into the cache.
CPU_RUN_ROWS = 512


def supports(setting):
    return not setting.static_shapes


def forward(setting, step, tokens, parameters, groups, keep):
    token_of_row, outputs, saved = groups.token_of_row(), [], []
    for run in _runs(setting, groups):
        output, of_run = step.forward(
            backend.gather_rows(tokens, token_of_row[run.rows]), run.products(parameters), keep
        )
        outputs.append(output)
        saved.append(of_run)
    return _all_rows(outputs, (step.output_width, tokens.dtype), groups), saved


def backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient):
    token_of_row, row_parts, weight_parts = groups.token_of_row(), [], []
    row_weights = ops.expand_dims(ops.cast(row_weights, tokens.dtype), 1)

    def factors_of_runs():
        for run, of_run in zip(_runs(setting, groups), saved):
            output_gradient = backend.gather_rows(gradient, token_of_row[run.rows])
            row_gradient, factors = step.backward(
                backend.gather_rows(tokens, token_of_row[run.rows]),
                run.products(parameters),
                of_run,
                output_gradient * row_weights[run.rows],
            )
            row_parts.append(row_gradient)
            weight_parts.append(row_sums(output_gradient, outputs[run.rows]))
            yield run.sizes, run.experts, factors

    num_frozen = len(parameters.frozen)
    # Each run's gradients can be put in place before the next one's are computed.
    gradients = backend.stack_gradients(
        factors_of_runs(), parameters.kernels, parameters.biases, num_frozen
    )
    return Gradients(
        _all_rows(row_parts, (tokens.shape[1], tokens.dtype), groups),
        groups.at_assignments(_all_rows(weight_parts, (1, "float32"), groups)[:, 0]),
        Parameters(
            gradients[: len(parameters.kernels)],
            gradients[len(parameters.kernels) :],
        ),
    )


class _Run(NamedTuple):
    """Neighbouring groups: the sizes and experts of all, and all their rows."""

    sizes: list
    experts: list
    rows: slice

    def products(self, parameters):
        def project(rows, number):
            kernel, bias = parameters.of(number)
            return self._multiply(rows, kernel, bias)

        def pull(gradient, number):
            return self._multiply(gradient, parameters.all_kernels[number], transposed=True)

        return products_of(project, pull)

    def _multiply(self, rows, kernel, bias=None, transposed=False):
        width, scale = kernel.shape[1 if transposed else 2], None
        if isinstance(kernel, Quantized):
            # Scaling rows is cheaper than scaling kernels.
            kernel, scale = kernel

        def kernel_of(expert):
            return floats(kernel, lambda stacked: stacked[expert], rows.dtype)

        return backend.multiply_groups(
            rows, self.sizes, self.experts, kernel_of, width, bias, transposed, scale
        )


def _runs(setting, groups):
    """All groups in runs; groups of unknown size by themselves.

    On a CPU a run has up to `CPU_RUN_ROWS` rows, or one group. On a GPU all groups are one run: the
    fewer kernels are launched, the better.
    """
    longest = CPU_RUN_ROWS if setting.platform == "cpu" else float("inf")
    start = end = 0
    sizes: list = []
    experts: list = []
    are_known = backend.knows_sizes()
    for expert, size in enumerate(backend.unstack_sizes(groups.sizes)):
        # An operation on zero rows would cost as much as on a few.
        if are_known and size == 0:
            continue
        if sizes and not (are_known and end - start + size <= longest):
            yield _Run(sizes, experts, slice(start, end))
            start, sizes, experts = end, [], []
        sizes.append(size)
        experts.append(expert)
        end = end + size
    if sizes:
        yield _Run(sizes, experts, slice(start, end))


def _all_rows(parts, width_and_dtype, groups):
    """All rows, where `parts` holds those of each run; padding is zero."""
    width, dtype = width_and_dtype
    computed = sum(ops.shape(part)[0] for part in parts)
    padding = ops.zeros((groups.num_rows() - computed, width), dtype)
    return ops.concatenate([*parts, padding])
