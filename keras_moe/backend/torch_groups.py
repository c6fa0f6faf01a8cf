"""Sizes of groups on PyTorch, and products of neighbouring groups."""

import functools
import operator
from typing import Any

import torch

from keras_moe.backend.base import split_rows
from keras_moe.backend.layouts import AllRows, Parts

# So many values outweigh the overhead of a call on a CPU, and still fit into the cache.
CPU_CHUNK_VALUES = 2**19


def is_traced():
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def sizes_on_host(sizes, num_rows):
    """Return the sizes (E,) of groups, then the number of other rows; symbols in traces."""
    if not is_traced():
        numbers = sizes.tolist()
        return [*numbers, num_rows - sum(numbers)]
    # One vector: a program would add symbolic sizes one by one.
    sizes = torch.cat([sizes, (num_rows - sizes.sum()).reshape(1).to(sizes.dtype)])
    if torch.jit.is_tracing():  # it would take numbers for constants
        return sizes.to(torch.int64).unbind()
    numbers = sizes.tolist()
    for number in numbers:
        torch._check(number >= 0)
    return numbers


def split(rows, sizes):
    """Split rows (R, ...) into consecutive parts of the given sizes."""
    return split_rows(rows, sizes) if torch.jit.is_tracing() else rows.split(sizes)


class Chunks(Parts):
    """Neighbouring groups form a chunk: they share all operations but their products.

    A chunk has up to `CPU_CHUNK_VALUES` values of the widest map, or one group. In a traced program
    each chunk is one group.
    """

    def __init__(self, problem):
        plan, self._is_traced = problem.plan, is_traced()
        self.plan = plan
        self.sizes, self.token_of_row = plan.sizes, plan.token_of_row()
        *numbers, self._num_padding = sizes_on_host(plan.sizes, plan.num_rows())
        self.parts: list[Any] = []
        start, chunk, most_rows = 0, None, 0
        if not self._is_traced:
            widths = (max(linear.kernel.shape[1:]) for linear in problem.maps.values())
            most_rows = CPU_CHUNK_VALUES // max(widths)
        for expert, size in enumerate(numbers):
            # An operation on zero rows would cost as much as on a few.
            if not self._is_traced and size == 0:
                continue
            if chunk is None or self._is_traced or chunk.num_rows + size > most_rows:
                chunk = _Chunk(plan.sizes, start)
                self.parts.append(chunk)
            chunk.add(expert, size)
            start = start + size
        self.parts = self.parts or [_Chunk(plan.sizes, 0, [0], [0])]

    def gather(self, tokens):
        # Gathered chunk by chunk they stay in the cache. In a program of unknown sizes a chunk is
        # one expert, and one operation for all is faster.
        if self._is_traced:
            return self.to_buffer(tokens.index_select(0, self.token_of_row))
        return (tokens.index_select(0, part) for part in self.to_buffer(self.token_of_row))

    def to_buffer(self, rows):
        return split(rows, [*(chunk.num_rows for chunk in self.parts), self._num_padding])[:-1]

    def to_rows(self, buffer):
        if not self._is_traced and len(buffer) == 1 and not self._num_padding:
            return buffer[0]
        # Keras would convert each part, an operation of a program.
        return torch.cat([*buffer, buffer[0].new_zeros((self._num_padding, buffer[0].shape[1]))])

    def empty(self, trained):
        """Return zeros for experts without rows, or None if no gradient is needed."""
        if not trained.requires_grad:
            return None
        total = torch.empty_like(trained)
        for expert in set(range(len(total))).difference(*(chunk.experts for chunk in self.parts)):
            total[expert] = 0
        return total


class _Chunk:
    """The rows of neighbouring groups."""

    def __init__(self, all_sizes, start, experts=(), sizes=()):
        self.all_sizes, self.start = all_sizes, start
        self.experts, self.sizes = [*experts], [*sizes]
        self.num_rows = sum(sizes)

    def add(self, expert, size):
        self.experts.append(expert)
        self.sizes.append(size)
        self.num_rows = self.num_rows + size

    def row_numbers(self):
        return torch.arange(self.num_rows, dtype=torch.int32) + self.start

    @functools.cached_property
    def _span(self):
        """All experts from the first to the last; between them there may be some without rows."""
        return slice(self.experts[0], self.experts[-1] + 1)

    @functools.cached_property
    def ends(self):
        return torch.cumsum(self.all_sizes[self._span], 0, dtype=torch.int32)

    def has_grouped_mm(self, rows, kernels):
        return kernels.bits is None and self._multiplies_at_once(rows, kernels.values)

    def _multiplies_at_once(self, *tensors):
        return len(self.experts) > 1 and has_grouped_mm(*tensors)

    def product(self, rows, kernels, bias=None, transposed=False):
        if bias is None and self.has_grouped_mm(rows, kernels):
            values = kernels.values[self._span].to(rows.dtype)
            values = values.mT if transposed else values
            return torch.nn.functional.grouped_mm(rows, values, offs=self.ends)
        bias = None if bias is None else bias.to(rows.dtype)
        if len(self.sizes) == 1:  # also in a program, where nothing is written in place
            of_expert = operator.itemgetter(self.experts[0])
            bias = None if bias is None else of_expert(bias)
            return multiply(kernels.apply(of_expert), rows, bias, transposed)
        outputs = rows.new_empty((rows.shape[0], kernels.shape[1 if transposed else 2]))
        parts = rows.split(self.sizes)
        for expert, part, output in zip(self.experts, parts, outputs.split(self.sizes)):
            if len(output):
                kernel = kernels.apply(operator.itemgetter(expert))
                added = None if bias is None else bias[expert]
                multiply(kernel, part, added, transposed, output)
        return outputs

    def gradient(self, field, left, right, total):
        if total is None:
            return None
        if field != "bias" and self._multiplies_at_once(left, right):
            products = torch.nn.functional.grouped_mm(left.T, right, offs=self.ends)
            if len(products) == len(total):
                return products.to(total.dtype)
            total[self._span] = products
            return total
        if len(self.sizes) == 1:
            _set_gradient(field, left, right, total[self.experts[0]])
            return total
        groups = zip(self.experts, left.split(self.sizes), right.split(self.sizes))
        for expert, rows, d_outputs in groups:
            if len(rows):
                _set_gradient(field, rows, d_outputs, total[expert])
            else:
                total[expert] = 0
        return total


class _AllGroups(_Chunk):
    """All groups. Their sizes are read where no kernel multiplies all groups."""

    def __init__(self, all_sizes, num_rows):
        super().__init__(all_sizes, 0, range(len(all_sizes)))
        del self.sizes
        self.num_rows = num_rows

    @functools.cached_property
    def sizes(self):  # type: ignore[override]
        return sizes_on_host(self.all_sizes, self.num_rows)  # the last one is the padding's


class AllOnDevice(AllRows):
    """All rows, for the fewest kernels."""

    @functools.cached_property
    def _groups(self):
        return _AllGroups(self.sizes, self.num_rows)

    def product(self, rows, kernels, bias=None, transposed=False):
        if bias is None or not self._groups.has_grouped_mm(rows, kernels):
            return self._groups.product(rows, kernels, bias, transposed)
        products = self._groups.product(rows, kernels, transposed=transposed)
        return products + bias.to(rows.dtype)[self._experts().clamp(max=len(self.sizes) - 1)]

    def _experts(self):
        return torch.searchsorted(self._groups.ends, self.row_numbers(), right=True)

    def gradient(self, field, left, right, trained):
        if not trained.requires_grad:
            return None
        if field != "bias" or not has_grouped_mm(left, right):
            return self._groups.gradient(field, left, right, torch.empty_like(trained))
        # Rows after the last group are summed into a spare expert.
        totals = torch.zeros((len(self.sizes) + 1, right.shape[1]), device=right.device)
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


def _set_gradient(field, left, right, total):
    if field == "bias":
        torch.sum(right, 0, dtype=total.dtype, out=total)
    elif total.dtype == left.dtype:
        torch.mm(left.T, right, out=total)
    else:  # `out` must have the dtype of the factors.
        total.copy_(torch.mm(left.T, right))


def has_grouped_mm(*tensors):
    """Return True if `grouped_mm` is one operation here. Needs 16-byte alignment.

    On GPUs of other capabilities it is a loop that waits for the host (PyTorch's issue 194227).
    """
    if tensors[0].is_cuda:
        dtype, serves = torch.bfloat16, torch.cuda.get_device_capability()[0] in (9, 10)
    else:
        dtype, serves = torch.float32, tensors[0].is_cpu
    return (
        serves
        and tensors[0].dtype == dtype
        and all(each.is_contiguous() for each in tensors)
        and all(width * dtype.itemsize % 16 == 0 for each in tensors for width in each.shape[1:])
        and hasattr(torch.nn.functional, "grouped_mm")
    )
