"""Products of rows with the int8 kernel of one expert, for PyTorch.

On a CPU PyTorch converts a kernel to floats before it multiplies. For a few rows this takes longer
than the product, so the rows are converted to integers instead.
"""

import functools
from typing import Any, NamedTuple

import torch

# This many integers of a kernel become floats at once, so that they are multiplied in the cache.
CPU_BLOCK = 2**18

# With more rows in a group, converting the kernel is faster.
MAX_DIGIT_ROWS = 16

# Values of the bytes of an integer of 32 bits, as digits in base 256. The highest byte is 0.
PLACES = (1, 2**8, 2**16, 0)

# Added to an integer, it adds 128 to each of the three digits.
OFFSET = 128 * sum(PLACES)

# The highest integer: its third digit is 127, whatever the lower digits are, from -128 to 127.
LARGEST = 127.49 * 2**16

# Sums of so many products of a digit and an integer stay below 2**31.
LONGEST_SUM = 2**16


def multiply(kernel, rows, bias, transposed, output):
    """See `torch_groups.multiply`. The kernel is int8 (D, H), and rows are a tensor or `Digits`."""
    kernel, scale = kernel
    scale = scale.to(rows.dtype if output is None else output.dtype)
    if transposed:
        return product(rows * scale, kernel, True, output)
    in_digits = isinstance(rows, Digits)
    products = rows.multiply(kernel) if in_digits else product(rows, kernel, False, output)
    if bias is None:
        return torch.mul(products, scale, out=output)
    return torch.addcmul(bias, products, scale, out=output)


def product(rows, kernel, transposed, output):
    """`rows @ kernel` into `output`, or with the transposed kernel."""
    # Sums over blocks are rounded after each, which bfloat16 and float16 would show.
    in_blocks = output is not None and rows.device.type == "cpu" and rows.dtype == torch.float32
    if not in_blocks:
        kernel = kernel.to(rows.dtype)
        return torch.mm(rows, kernel.mT if transposed else kernel, out=output)
    length = max(1, CPU_BLOCK // kernel.shape[1])
    blocks = _float_blocks(kernel, length, rows.dtype)
    if transposed:
        for block, columns in zip(blocks, output.split(length, 1)):
            torch.mm(rows, block.mT, out=columns)
        return output
    first, *others = rows.split(length, 1)
    torch.mm(first, next(blocks), out=output)
    for block, columns in zip(blocks, others):
        output.addmm_(columns, block)
    return output


def _float_blocks(kernel, length, dtype):
    """Yield blocks of rows of an integer kernel as floats, in one buffer that fits the cache."""
    floats = kernel.new_empty((min(length, kernel.shape[0]), kernel.shape[1]), dtype=dtype)
    for block in kernel.split(length):
        yield floats[: block.shape[0]].copy_(block)


class Digits(NamedTuple):
    """Rows as integers times a unit. The integers are stored as digits in base 256."""

    digits: Any  # (4 n, D) int8, four of each row, from the lowest
    unit: Any  # (n, 1) float32

    def multiply(self, kernel):
        """Return `rows @ kernel`, float32 (n, H); the kernel is int8 (D, H)."""
        places = _places(self.unit.shape[0]) * self.unit
        return torch.mm(places, torch._int_mm(self.digits, kernel).float())


def in_digits(rows, groups):
    """The `Digits` of groups of rows (R, D); a group that is faster as floats stays as it is.

    Errors are below 2**-22 of the largest number of a row, plus 3e-38.
    """
    suit = (
        rows.device.type == "cpu"
        and rows.dtype != torch.float64
        and rows.shape[1] <= LONGEST_SUM
        and min(map(len, groups)) <= MAX_DIGIT_ROWS
        and multiplies_integers()
    )
    if not suit:
        return groups
    rows, (tiny, offset) = rows.float(), _tensors()
    largest = torch.linalg.vector_norm(rows, torch.inf, 1, keepdim=True)
    unit = torch.add(tiny, largest, alpha=1 / LARGEST)  # not 0, nor a subnormal number
    # With the offset, bytes are digits from 0 to 255; flipping their highest bit takes 128 away.
    # The bytes of an integer lie side by side: transposed, they are rows.
    integers = torch.addcdiv(offset, rows, unit).mT.to(
        torch.int32, memory_format=torch.contiguous_format
    )
    digits = integers.bitwise_xor_(OFFSET).view(torch.int8).mT
    sizes = [len(group) for group in groups]
    digits, unit = digits.split([len(PLACES) * size for size in sizes]), unit.split(sizes)
    return [
        Digits(*each) if len(group) <= MAX_DIGIT_ROWS else group
        for group, *each in zip(groups, digits, unit)
    ]


@functools.cache
def multiplies_integers():
    """Return True if this processor multiplies int8 matrices fast and exactly.

    Without VNNI, which `ONEDNN_MAX_CPU_ISA` can disable, sums of two products saturate.
    """
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    if not (has_vnni() and torch.backends.mkldnn.is_available() and hasattr(torch, "_int_mm")):
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(largest[:4], largest) == 64 * 127**2).all())


@functools.cache
def _tensors():
    """Return the smallest unit and the offset of the digits."""
    numbers = (torch.finfo(torch.float32).tiny, float(OFFSET))
    return [torch.tensor(number, device="cpu") for number in numbers]


@functools.cache
def _places(num_rows):
    """Return the place values of the digits of n rows, (n, 4 n)."""
    places = torch.tensor([PLACES], dtype=torch.float32, device="cpu")
    return torch.kron(torch.eye(num_rows, device="cpu"), places)
