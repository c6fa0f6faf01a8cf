"""Sizes of groups on PyTorch, and products of neighbouring groups."""

import contextlib
import functools
import itertools
import operator

import torch

from keras_moe.backend.base import split_rows
from keras_moe.backend.layouts import AllRows, Layout

# So many values outweigh the overhead of a call on a CPU, and still fit into the cache.
CPU_CHUNK_VALUES = 2**20

# Freed at once, and never written: this raises the limit to 32 MB up to which glibc keeps freed
# memory for the process. Else the memory of each chunk goes to the system and back, which takes a
# fifth of a step.
torch.empty(2**23 - 2**12)


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


class Chunks(Layout):
    """A chunk is neighbouring groups: operations are on a chunk, products perhaps on a group.

    A chunk has up to `CPU_CHUNK_VALUES` values of the widest map, or one group with rows. A buffer
    is a list of the rows of each.
    """

    def __init__(self, backend, platform, problem):
        self.plan = plan = problem.plan
        *numbers, num_padding = sizes_on_host(plan.sizes, plan.num_rows())
        limit, first_experts, rows = most_rows(problem), [0], 0
        for expert, number in enumerate(numbers):
            if rows and rows + number > limit:
                first_experts.append(expert)
                rows = 0
            rows += number
        spans = [*itertools.pairwise([*first_experts, len(numbers)])]
        lengths = [sum(numbers[first:end]) for first, end in spans]
        # `index_add_` by int32 is slow.
        assignment, weight = plan.assignment_of_row.long(), plan.weight_of_row(problem.weights)
        of_rows = assignment % plan.num_tokens, assignment, weight.unsqueeze(1)
        pieces = zip(*(each.split([*lengths, num_padding]) for each in of_rows))
        starts = itertools.accumulate(lengths, initial=0)
        self._chunks = [
            _Chunk(number, slice(*span), plan.sizes, numbers, start, *own)
            for number, (span, start, own) in enumerate(zip(spans, starts, pieces))
        ]

    def for_each_part(self, function, maps, carry):
        for chunk in self._chunks:
            carry = function(chunk, maps, carry)
        return carry

    def sums(self, width):
        return self.plan.sizes.new_zeros((self.plan.num_tokens, width), dtype=torch.float32)

    def buffer(self, width):
        return []

    def gradient(self, trained):
        return torch.empty_like(trained) if trained.requires_grad else None


def most_rows(problem):
    """Return how many rows the largest chunk has."""
    return CPU_CHUNK_VALUES // problem.widest


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
        products = []
        for place, (group, own_bias) in enumerate(zip(groups, biases)):
            kernel = kernels.apply(operator.itemgetter(place))
            if not is_traced() and len(group) == 0:
                continue
            if own_bias is None or kernel.bits is not None:
                products.append(kernel.multiply(group, own_bias, transposed))
            else:  # as a part of the product
                products.append(torch.addmm(own_bias, group, kernel.values.to(rows.dtype)))
        if not is_traced() and len(products) == 1 and not len(others):
            return products[0]
        width = kernels.shape[1 if transposed else 2]
        return torch.cat([*products, others.new_zeros((others.shape[0], width))])

    def add_gradient(self, total, field, left, right):
        if total is None:
            return None
        left, right = left.contiguous(), right.contiguous()
        if not self.is_one_product(left, right):
            groups = left.split(self.numbers), right.split(self.numbers), total[self.experts]
            for rows, d_outputs, own in zip(*groups):
                is_bias = field == "bias"
                own.copy_(d_outputs.sum(0, dtype=own.dtype) if is_bias else rows.T @ d_outputs)
            return total
        if field == "bias":
            # Other rows are summed into an expert of their own.
            sums = right.new_zeros((len(self.sizes) + 1, right.shape[1]), dtype=torch.float32)
            gradients = sums.index_add_(0, self._group_of_row, right.float())[:-1]
        else:
            gradients = torch.nn.functional.grouped_mm(left.T, right, offs=self._ends)
        if len(gradients) == len(total):
            return gradients.to(total.dtype)
        total[self.experts] = gradients
        return total


class _Chunk(_Groups):
    def __init__(self, number, experts, sizes, numbers, start, token, assignment, weight):
        self.experts, self.sizes, self.numbers = experts, sizes[experts], [*numbers[experts], 0]
        self.num_rows, self._number, self._start = len(token), number, start
        self._token, self._assignment, self._weight = token, assignment, weight

    def row_numbers(self):
        end, device = self._start + self.num_rows, self.sizes.device
        return torch.arange(self._start, end, dtype=torch.int32, device=device)

    def is_one_product(self, *tensors, bias=None):
        # An operation on zero rows costs as much as on a few. Of large groups a bias is cheaper
        # as a part of their products.
        return bias is None and sum(map(bool, self.numbers)) > 1 and has_grouped_mm(*tensors)

    def gather(self, tokens):
        return tokens.index_select(0, self._token)

    def weights(self):
        return self._weight

    def read(self, buffer):
        return buffer[self._number]

    def write(self, buffer, rows):
        buffer.append(rows)
        return buffer

    def add_to_sums(self, sums, rows, weighted=False):
        # While they are in the cache.
        rows = rows.float() * self._weight if weighted else rows.float()
        return sums.index_add_(0, self._token, rows)

    def add_to_assignments(self, values, rows):
        return values.index_copy_(0, self._assignment, rows[:, 0])


class AllGroups(_Groups, AllRows):
    """One part. The host reads sizes of groups only where no kernel multiplies them all."""

    experts = slice(None)
    gradient = Chunks.gradient


class SmallProblem(AllGroups):
    """One part, whose operations PyTorch differentiates.

    This saves more rows, and takes less time in Python.
    """

    is_differentiable = True

    def for_each_part(self, function, maps, carry):
        with without_autocast(self.problem.tokens):
            return function(self, maps, carry)

    def gather(self, tokens):
        return self.plan.dispatch(tokens)

    def add_to_sums(self, sums, rows, weighted=False):
        return self.plan._replace(weights=self.problem.weights).combine(rows)


def is_small(problem):
    """Return True if one operation multiplies all rows, in the cache of a CPU."""
    frozen = (kernel.values for kernel in problem.frozen.values())
    is_one = has_grouped_mm(problem.tokens, *problem.trained.values(), *frozen)
    return is_one and problem.plan.num_rows() <= most_rows(problem)


def has_grouped_mm(*tensors):
    """Return True if `grouped_mm` is one operation here. Needs 16-byte alignment.

    In PyTorch 2.10 to 2.15, GPUs have a kernel for bf16 if their major capability is 9 or 10, as
    `_grouped_mm_cuda` in GroupedBlas.cpp checks. On others it is a loop that waits for the host:
    PyTorch's pull requests 194227, for 11, and 184334, for 11 and 12, are in none of these.
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
