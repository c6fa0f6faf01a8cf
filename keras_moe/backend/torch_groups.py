"""Sizes of groups on PyTorch, and products of neighbouring groups."""

import torch

from keras_moe.backend import torch_integers
from keras_moe.backend.base import split_rows

# So many rows outweigh the overhead of a call on a CPU, and still fit into the cache.
CPU_RUN_ROWS = 512


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


class Runs:
    """A layout of runs. A run is neighbouring groups that share all operations except products.

    On a CPU a run has up to `CPU_RUN_ROWS` rows, or one group. On a GPU one run has all groups, for
    the fewest kernels. In a program of unknown sizes each run has one group.
    """

    def __init__(self, sizes, num_rows, platform):
        is_known = not is_traced()
        self._in_one, self.sizes, self.parts = platform == "gpu" and is_known, sizes, []
        if self._in_one:
            self.parts = [_Run(None, range(sizes.shape[0]), num_rows, sizes)]
            return
        *numbers, self._num_padding = sizes_on_host(sizes, num_rows)
        start = 0
        for expert, size in enumerate(numbers):
            # An operation on zero rows would cost as much as on a few.
            if is_known and size == 0:
                continue
            last = self.parts[-1] if self.parts and is_known else None
            if last is not None and last.num_rows + size <= CPU_RUN_ROWS:
                last.add(size, expert)
            else:
                self.parts.append(_Run([size], [expert], size, start=start))
            start = start + size

    def gather(self, values, token_of_row):
        # Gathered run by run they stay in the cache. In a program of unknown sizes a run is one
        # expert, and one operation for all is faster.
        if self._in_one or is_traced():
            return self.split(values.index_select(0, token_of_row))
        return (values.index_select(0, part) for part in self.split(token_of_row))

    def split(self, values):
        if self._in_one:
            return [values]
        return split(values, [*(run.num_rows for run in self.parts), self._num_padding])[:-1]

    def join(self, parts, width, dtype):
        if self._in_one:
            return parts[0]
        # Keras would convert each part, an operation of a program.
        padding = self.sizes.new_zeros((self._num_padding, width), dtype=getattr(torch, dtype))
        return torch.cat([*parts, padding])

    def empty(self, trained):
        """Return zeros for experts without rows, or None if no gradient is needed."""
        if not trained.requires_grad:
            return None
        total = torch.empty_like(trained)
        for expert in set(range(len(total))).difference(*(run.experts for run in self.parts)):
            total[expert] = 0
        return total


class _Run:
    """A part with neighbouring groups. Sizes `on_device` are read only if needed."""

    def __init__(self, sizes, experts, num_rows, on_device=None, start=0):
        self._sizes, self.experts, self.num_rows = sizes, experts, num_rows
        self.on_device, self.start = on_device, start

    def add(self, size, expert):
        self._sizes.append(size)
        self.experts.append(expert)
        self.num_rows += size

    def row_numbers(self):
        device = None if self.on_device is None else self.on_device.device
        return torch.arange(self.num_rows, dtype=torch.int32, device=device) + self.start

    @property
    def sizes(self):
        if self._sizes is None:
            self._sizes = self.on_device.tolist()
        return self._sizes

    def split(self, rows):
        """Return the rows of each group."""
        sizes = self.sizes
        if len(sizes) == 1:
            return [rows]
        if self.on_device is None:
            return rows.split(sizes)
        return rows.split([*sizes, rows.shape[0] - sum(sizes)])[:-1]

    def gradient(self, field, left, right, total):
        if total is None:
            return None
        if self.on_device is not None and has_grouped_mm(left, right):
            return _total(field, left, right, self.on_device).to(total.dtype)
        for expert, rows, of_rows in zip(self.experts, self.split(left), self.split(right)):
            if is_traced() or rows.shape[0]:
                _set_gradient(field, rows, of_rows, total[expert])
            else:
                total[expert] = 0
        return total

    def product(self, rows, kernels, bias=None, transposed=False):
        if bias is not None and bias.dtype != rows.dtype:  # an operation, even if equal
            bias = bias.to(rows.dtype)
        if self.on_device is not None and has_grouped_mm(rows, kernels):
            kernels = kernels.to(rows.dtype)
            products = grouped_mm(rows, kernels.mT if transposed else kernels, self.on_device)
            return products if bias is None else products + bias[_experts(rows, self.on_device, -1)]
        if len(self.experts) == 1:  # also in a program, where nothing is written in place
            return _multiply(rows, kernels, bias, transposed, self.experts[0])
        outputs = rows.new_empty((rows.shape[0], kernels.shape[1 if transposed else 2]))
        digits = [None] * len(self.experts)
        if hasattr(kernels, "scale") and not hasattr(kernels, "group") and not transposed:
            digits = torch_integers.digits_of_groups(rows, self.sizes)
        for part, *each in zip(self.split(rows), self.experts, self.split(outputs), digits):
            if part.shape[0]:
                _multiply(part, kernels, bias, transposed, *each)
        return outputs


def _multiply(rows, kernels, bias, transposed, expert, output=None, digits=None):
    """Multiply rows of one expert by its kernel, into `output` or a new tensor."""
    if hasattr(kernels, "group"):  # int4
        kernel = kernels.entry(lambda stack: stack[expert])
        product = kernel.multiply(rows, transposed)
        product = product if bias is None else product + bias[expert]
        return product if output is None else output.copy_(product)
    if hasattr(kernels, "scale"):  # int8
        scale, kernel = kernels.scale[expert].to(rows.dtype), kernels.values[expert]
        if transposed:
            return torch_integers.multiply(rows * scale, kernel, transposed, output)
        if digits is None:
            product = torch_integers.multiply(rows, kernel, transposed, output)
        else:
            product = digits.multiply(kernel)
        if bias is None:
            return torch.mul(product, scale, out=output)
        return torch.addcmul(bias[expert], product, scale, out=output)
    kernel = kernels[expert]
    if kernel.dtype != rows.dtype:
        kernel = kernel.to(rows.dtype)
    if transposed:
        return torch.mm(rows, kernel.mT, out=output)
    if bias is None:
        return torch.mm(rows, kernel, out=output)
    return torch.addmm(bias[expert], rows, kernel, out=output)


def _set_gradient(field, left, right, total):
    if field == "bias":
        torch.sum(right, 0, dtype=total.dtype, out=total)
    elif total.dtype == left.dtype:
        torch.mm(left.T, right, out=total)
    else:  # `out` must have the dtype of the factors.
        total.copy_(torch.mm(left.T, right))


def _total(field, left, right, sizes):
    if field != "bias":
        return grouped_mm(left.T, right, sizes)
    # Rows after the last group are summed into a spare expert.
    totals = torch.zeros((sizes.shape[0] + 1, right.shape[1]), device=right.device)
    return totals.index_add_(0, _experts(right, sizes, 0), right.float())[:-1]


def has_grouped_mm(*tensors):
    """Return True if `grouped_mm` is one kernel here, not a loop. Needs 16-byte alignment."""
    return (
        tensors[0].is_cuda
        and tensors[0].dtype == torch.bfloat16
        and all(isinstance(each, torch.Tensor) for each in tensors)
        and all(width % 8 == 0 for each in tensors for width in each.shape[1:])
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability() >= (9, 0)
    )


def grouped_mm(left, right, sizes):
    ends = torch.cumsum(sizes, 0, dtype=torch.int32)
    return torch.nn.functional.grouped_mm(left, right, offs=ends)


def _experts(rows, sizes, last):
    """Return the expert of each row, (R,); past the last group E + `last`."""
    ends = torch.cumsum(sizes, 0, dtype=torch.int32)
    numbers = torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype)
    return torch.searchsorted(ends, numbers, right=True).clamp_(max=sizes.shape[0] + last)
