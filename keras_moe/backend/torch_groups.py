"""Sizes of groups on PyTorch, and products of neighbouring groups."""

import contextlib
import functools
import itertools
import operator

import torch

from keras_moe.backend.base import split_rows
from keras_moe.backend.layouts import AllRows, Parts

# So many values outweigh the overhead of a call on a CPU, and still fit into the cache.
CPU_CHUNK_VALUES = 2**20


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
    """Neighbouring groups form a chunk: they share all operations, perhaps but their products.

    A chunk has up to `CPU_CHUNK_VALUES` values of the widest map, or one group with rows.
    """

    def __init__(self, problem):
        self.plan = problem.plan
        *numbers, self._num_padding = sizes_on_host(self.plan.sizes, self.plan.num_rows())
        limit, first_experts, rows = most_rows(problem), [0], 0
        for expert, number in enumerate(numbers):
            if rows and rows + number > limit:
                first_experts.append(expert)
                rows = 0
            rows += number
        starts = [*itertools.accumulate(numbers, initial=0)]
        self.parts = [
            _Chunk(self.plan.sizes, first, numbers[first:end], starts[first])
            for first, end in itertools.pairwise([*first_experts, len(numbers)])
        ]
        self._tokens = self.to_buffer(self.plan.token_of_row().long())  # Sums by int32 are slow.

    def gather(self, tokens):
        # Chunk by chunk they stay in the cache.
        return (tokens.index_select(0, part) for part in self._tokens)

    def to_buffer(self, rows):
        return rows.split([*(chunk.num_rows for chunk in self.parts), self._num_padding])[:-1]

    def to_rows(self, buffer):
        return torch.cat([*buffer, buffer[0].new_zeros((self._num_padding, buffer[0].shape[1]))])

    def sum_rows(self, rows_of_parts, width, weights):
        # Each chunk's rows are added while they are in the cache, and then freed.
        sums = self._tokens[0].new_zeros((self.plan.num_tokens, width), dtype=torch.float32)
        weights = itertools.repeat(None) if weights is None else self.of_assignments(weights)
        for rows, token, weight in zip(rows_of_parts, self._tokens, weights):
            sums.index_add_(0, token, rows.float() if weight is None else rows.float() * weight)
        return sums

    def empty(self, trained):
        return torch.empty_like(trained) if trained.requires_grad else None


def most_rows(problem):
    """Return how many rows the largest chunk has."""
    return CPU_CHUNK_VALUES // max(max(each.kernel.shape[1:]) for each in problem.maps.values())


class _Groups:
    """Abstract: a part with the rows of neighbouring groups, and perhaps other rows after them."""

    experts: slice  # of the groups
    sizes: torch.Tensor  # of the groups
    num_rows: int

    @functools.cached_property
    def numbers(self):
        return sizes_on_host(self.sizes, self.num_rows)

    @functools.cached_property
    def _ends(self):
        return torch.cumsum(self.sizes, 0, dtype=torch.int32)

    @functools.cached_property
    def _group_of_row(self):
        numbers = torch.arange(self.num_rows, dtype=torch.int32, device=self._ends.device)
        return torch.searchsorted(self._ends, numbers, right=True)

    def is_one_product(self, *tensors, bias=None):
        """Return True if `grouped_mm` multiplies these tensors."""
        return has_grouped_mm(*tensors)

    def product(self, rows, kernels, bias=None, transposed=False):
        rows, kernels = rows.contiguous(), kernels.apply(operator.itemgetter(self.experts))
        bias = None if bias is None else bias[self.experts].to(rows.dtype)
        if self.is_one_product(rows, kernels.values, bias=bias):
            values = kernels.values.to(rows.dtype)
            values = values.mT if transposed else values
            products = torch.nn.functional.grouped_mm(rows, values, offs=self._ends)
            if products.requires_grad:  # Its backward pass refuses expanded gradients.
                products.register_hook(torch.Tensor.contiguous)
            if bias is None:
                return products
            # Other rows get a bias of their own.
            bias = torch.nn.functional.pad(bias, (0, 0, 0, 1))
            return products + bias.index_select(0, self._group_of_row)
        *groups, others = split(rows, self.numbers)
        biases = itertools.repeat(None) if bias is None else bias.unbind()
        products = [
            _multiply(kernels.apply(operator.itemgetter(place)), group, own_bias, transposed)
            for place, (group, own_bias) in enumerate(zip(groups, biases))
            if is_traced() or len(group)
        ]
        if not is_traced() and len(products) == 1 and not len(others):
            return products[0]
        width = kernels.shape[1 if transposed else 2]
        return torch.cat([*products, others.new_zeros((others.shape[0], width))])

    def gradient(self, field, left, right, total):
        if total is None:
            return None
        if not self.is_one_product(left, right):
            groups = left.split(self.numbers), right.split(self.numbers), total[self.experts]
            for rows, d_outputs, own in zip(*groups):
                is_bias = field == "bias"
                own.copy_(d_outputs.sum(0, dtype=own.dtype) if is_bias else rows.T @ d_outputs)
            return total
        if field == "bias":
            # Other rows are summed into an expert of their own.
            sums = torch.zeros((len(self.sizes) + 1, right.shape[1]), device=right.device)
            gradients = sums.index_add_(0, self._group_of_row, right.float())[:-1]
        else:
            gradients = torch.nn.functional.grouped_mm(left.T, right, offs=self._ends)
        if len(gradients) == len(total):
            return gradients.to(total.dtype)
        total[self.experts] = gradients
        return total


class _Chunk(_Groups):
    def __init__(self, all_sizes, first, numbers, start):
        self.experts = slice(first, first + len(numbers))
        self.sizes, self.num_rows, self._start = all_sizes[self.experts], sum(numbers), start
        self.numbers = [*numbers, 0]

    def row_numbers(self):
        rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.sizes.device)
        return rows + self._start

    def is_one_product(self, *tensors, bias=None):
        # An operation on zero rows costs as much as on a few. Of large groups a bias is cheaper
        # as a part of their products.
        return bias is None and sum(map(bool, self.numbers)) > 1 and has_grouped_mm(*tensors)


class AllGroups(_Groups, AllRows):
    """One part. The host reads sizes of groups only where no kernel multiplies them all."""

    experts = slice(None)
    empty = Chunks.empty


class SmallProblem(AllGroups):
    """One part, whose operations PyTorch differentiates.

    This saves more rows, and takes less time in Python.
    """

    @staticmethod
    def serves(problem):
        """Return True if one operation multiplies all rows, in the cache of a CPU."""
        frozen = (kernel.values for kernel in problem.frozen.values())
        is_one = has_grouped_mm(problem.tokens, *problem.trained.values(), *frozen)
        return is_one and problem.plan.num_rows() <= most_rows(problem)

    def run(self, function, maps, by_token, by_row, widths, trained, weights=None):
        rows = self.plan.dispatch(*by_token)
        with without_autocast(rows):
            (outputs,), _ = function(self, maps, rows)
        return self.plan._replace(weights=weights).combine(outputs), [], {}


def _multiply(kernel, rows, bias, transposed):
    """`Kernel.multiply`, with the bias as a part of the product."""
    if bias is None or kernel.bits is not None:
        return kernel.multiply(rows, bias, transposed)
    return torch.addmm(bias, rows, kernel.values.to(rows.dtype))


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
