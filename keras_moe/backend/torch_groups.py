"""Sizes of groups on PyTorch, and products of neighbouring groups."""

import contextlib
import functools
import itertools
import operator

import torch

from keras_moe.backend.base import refuse_second_derivative, split_rows
from keras_moe.backend.layouts import AllRows, Parts

# So many values outweigh the overhead of a call on a CPU, and still fit into the cache.
CPU_CHUNK_VALUES = 2**19


def is_traced():
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def sizes_on_host(sizes, num_rows):
    """Return the sizes (E,) of groups, then the number of other rows; symbols in traces."""
    if torch.jit.is_tracing():  # it would take numbers for constants
        sizes = torch.cat([sizes, (num_rows - sizes.sum()).reshape(1).to(sizes.dtype)])
        return sizes.to(torch.int64).unbind()
    numbers = sizes.tolist()
    for number in numbers if is_traced() else ():
        torch._check(number >= 0)
    return [*numbers, num_rows - sum(numbers)]


def split(rows, sizes):
    """Split rows (R, ...) into consecutive parts of the given sizes."""
    return split_rows(rows, sizes) if torch.jit.is_tracing() else rows.split(sizes)


class Chunks(Parts):
    """Neighbouring groups form a chunk: they share all operations but their products.

    A chunk has up to `CPU_CHUNK_VALUES` values of the widest map, or one group with rows.
    """

    def __init__(self, problem):
        self.plan, self._token_of_row = problem.plan, problem.plan.token_of_row()
        *numbers, self._num_padding = sizes_on_host(self.plan.sizes, self.plan.num_rows())
        limit = most_rows(problem)
        chunk = _Chunk(self.plan.sizes, 0, 0)
        self.parts = [chunk]
        for expert, number in enumerate(numbers):
            if chunk.num_rows and chunk.num_rows + number > limit:
                chunk = _Chunk(self.plan.sizes, expert, chunk.start + chunk.num_rows)
                self.parts.append(chunk)
            chunk.numbers.append(number)
            chunk.num_rows += number

    def gather(self, tokens):
        # Chunk by chunk they stay in the cache.
        return (tokens.index_select(0, part) for part in self.to_buffer(self._token_of_row))

    def to_buffer(self, rows):
        return rows.split([*(chunk.num_rows for chunk in self.parts), self._num_padding])[:-1]

    def to_rows(self, buffer):
        if len(buffer) == 1 and not self._num_padding:
            return buffer[0]
        return torch.cat([*buffer, buffer[0].new_zeros((self._num_padding, buffer[0].shape[1]))])

    def empty(self, trained):
        return torch.empty_like(trained) if trained.requires_grad else None


class OneChunk(Chunks):
    """A single chunk, all rows of a small problem.

    PyTorch differentiates its operations: this saves more rows, and takes less time in Python.
    """

    def run(self, function, maps, by_token, by_row, widths, trained, weights=None):
        (rows,) = self.to_buffer(self.plan.dispatch(*by_token))
        with without_autocast(rows):
            (outputs,), _ = function(self.parts[0], maps, rows)
        return self.plan._replace(weights=weights).combine(self.to_rows([outputs])), [], {}


def most_rows(problem):
    """Return how many rows the largest chunk has."""
    return CPU_CHUNK_VALUES // max(max(each.kernel.shape[1:]) for each in problem.maps.values())


class _Chunk:
    """The rows of neighbouring groups."""

    def __init__(self, all_sizes, expert, start):
        self._all_sizes, self._first, self.start = all_sizes, expert, start
        self.numbers: list[int] = []  # of the rows of each expert
        self.num_rows = 0

    def row_numbers(self):
        return torch.arange(self.num_rows, dtype=torch.int32) + self.start

    @functools.cached_property
    def _experts(self):
        return slice(self._first, self._first + len(self.numbers))

    @functools.cached_property
    def _ends(self):
        return torch.cumsum(self._all_sizes[self._experts], 0, dtype=torch.int32)

    def _has_grouped_mm(self, *tensors):
        # An operation on zero rows would cost as much as on a few.
        return sum(map(bool, self.numbers)) > 1 and has_grouped_mm(*tensors)

    def product(self, rows, kernels, bias=None, transposed=False):
        if torch.is_grad_enabled():
            return _Product.apply(self, kernels, rows, kernels.values, bias)
        if bias is None and self._has_grouped_mm(rows, kernels.values):
            values = kernels.values[self._experts].to(rows.dtype)
            values = values.mT if transposed else values
            return torch.nn.functional.grouped_mm(rows, values, offs=self._ends)
        bias = None if bias is None else bias.to(rows.dtype)
        outputs = rows.new_empty((rows.shape[0], kernels.shape[1 if transposed else 2]))
        parts = rows.split(self.numbers), outputs.split(self.numbers)
        for expert, part, output in zip(itertools.count(self._first), *parts):
            if len(output):
                kernel = kernels.apply(operator.itemgetter(expert))
                multiply(kernel, part, None if bias is None else bias[expert], transposed, output)
        return outputs

    def gradient(self, field, left, right, total):
        if total is None:
            return None
        if field != "bias" and self._has_grouped_mm(left, right):
            products = torch.nn.functional.grouped_mm(left.T, right, offs=self._ends)
            if len(products) == len(total):
                return products.to(total.dtype)
            total[self._experts] = products
        else:
            _set_gradients(field, left, right, self.numbers, total[self._experts])
        return total


class AllGroups(AllRows):
    """All rows. The host reads how many each group has only where no kernel multiplies them all."""

    @functools.cached_property
    def _numbers(self):
        return sizes_on_host(self.sizes, self.num_rows)

    @functools.cached_property
    def _ends(self):
        return torch.cumsum(self.sizes, 0, dtype=torch.int32)

    def _experts(self):
        return torch.searchsorted(self._ends, self.row_numbers(), right=True)

    def product(self, rows, kernels, bias=None, transposed=False):
        if has_grouped_mm(rows, kernels.values):
            values = kernels.values.to(rows.dtype)
            values = values.mT if transposed else values
            products = torch.nn.functional.grouped_mm(rows, values, offs=self._ends)
            if bias is None:
                return products
            return products + bias.to(rows.dtype)[self._experts().clamp(max=len(bias) - 1)]
        *groups, padding = split(rows, self._numbers)
        products = []
        for expert, group in enumerate(groups):
            added = None if bias is None else bias[expert].to(rows.dtype)
            kernel = kernels.apply(operator.itemgetter(expert))
            products.append(multiply(kernel, group, added, transposed))
        zeros = padding.new_zeros((padding.shape[0], products[0].shape[1]))
        return torch.cat([*products, zeros])

    def gradient(self, field, left, right, trained):
        if not trained.requires_grad:
            return None
        if not has_grouped_mm(left, right):
            total = torch.empty_like(trained)
            _set_gradients(field, left, right, self._numbers, total)
            return total
        if field != "bias":
            products = torch.nn.functional.grouped_mm(left.T, right, offs=self._ends)
            return products.to(trained.dtype)
        # Rows after the last group are summed into a spare expert.
        totals = torch.zeros((len(trained) + 1, right.shape[1]), device=right.device)
        totals.index_add_(0, self._experts(), right.float())
        return totals[:-1].to(trained.dtype)


def multiply(kernel, rows, bias, transposed, output=None):
    """`Kernel.multiply`, perhaps into an output."""
    if kernel.bits is not None:
        product = kernel.multiply(rows, bias, transposed)
        return product if output is None else output.copy_(product)
    values = kernel.values.to(rows.dtype)
    if transposed:
        return torch.mm(rows, values.mT, out=output)
    if bias is None:
        return torch.mm(rows, values, out=output)
    return torch.addmm(bias, rows, values, out=output)


def _set_gradients(field, left, right, sizes, totals):
    # The last size may be that of other rows, without a total.
    for rows, d_outputs, total in zip(left.split(sizes), right.split(sizes), totals):
        if field == "bias":
            torch.sum(d_outputs, 0, dtype=total.dtype, out=total)
        elif total.dtype == rows.dtype:
            torch.mm(rows.T, d_outputs, out=total)
        else:  # `out` must have the dtype of the factors.
            total.copy_(torch.mm(rows.T, d_outputs))


def has_grouped_mm(*tensors):
    """Return True if `grouped_mm` is one operation here. Needs 16-byte alignment.

    On GPUs of other capabilities it is a loop that waits for the host (PyTorch's issue 194227).
    """
    if tensors[0].is_cuda:
        dtype, serves = torch.bfloat16, torch.cuda.get_device_capability()[0] in (9, 10)
    else:
        dtype, serves = torch.float32, tensors[0].is_cpu and not is_traced()
    return (
        serves
        and tensors[0].dtype == dtype
        and all(each.is_contiguous() and each.is_floating_point() for each in tensors)
        and all(width * dtype.itemsize % 16 == 0 for each in tensors for width in each.shape[1:])
        and hasattr(torch.nn.functional, "grouped_mm")
    )


def without_autocast(tensor):
    """A context of `torch.autocast` in which operations compute in the dtype of their tensors."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


class _Product(torch.autograd.Function):
    """The product of the rows of a chunk."""

    @staticmethod
    def forward(ctx, chunk, kernels, rows, values, bias):
        ctx.chunk, ctx.kernels = chunk, kernels._replace(values=None)
        ctx.save_for_backward(rows, values, bias)
        return chunk.product(rows, kernels, bias)

    @staticmethod
    @torch.compiler.disable
    def backward(ctx, upstream):
        rows, values, bias = ctx.saved_tensors
        kernels, chunk = ctx.kernels._replace(values=values), ctx.chunk
        totals = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip((values, bias), ctx.needs_input_grad[3:])
        ]
        with torch.no_grad(), without_autocast(upstream):
            d_rows = None
            if ctx.needs_input_grad[2]:
                d_rows = chunk.product(upstream, kernels, transposed=True)
            of_fields = zip(("kernel", "bias"), totals)
            others = [chunk.gradient(field, rows, upstream, total) for field, total in of_fields]
        return None, None, *once([d_rows, *others], upstream, rows, values)


def once(gradients, *sources):
    """Return gradients whose derivative, if a second one may follow, is an error."""
    return _Once.apply(gradients, *sources) if torch.is_grad_enabled() else gradients


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients, *sources):
        return tuple(gradients)

    backward = staticmethod(refuse_second_derivative)
