"""Products of rows with the int8 kernel of one expert, for PyTorch.

On a CPU PyTorch converts a kernel to floats before it multiplies, which takes longer than the
product of few rows. Few rows become integers instead.
"""

import functools

import torch

# So many integers of a kernel become floats at a time, which are multiplied while in the cache.
CPU_BLOCK = 2**18

# Up to so many rows of an expert become integers. With more, converting the kernel is faster.
MOST_ROWS = 16

# What the bytes of an integer of 32 bits are worth as digits in base 256; the highest is always 0.
PLACES = (1, 2**8, 2**16, 0)

# The digit below it is at most 127, whatever the lower ones are, from -128 to 127.
LARGEST = 127.49 * 2**16

# Sums of products of digits and integers stay below 2**31.
LONGEST_SUM = 2**16


def multiply(rows, kernel, transposed, output):
    """`rows @ kernel` into `output`, or with the transposed kernel; the kernel is int8 (D, H)."""
    # Sums over blocks are rounded after each, which bfloat16 and float16 would show.
    in_blocks = output is not None and rows.device.type == "cpu" and rows.dtype == torch.float32
    if not in_blocks:
        kernel = kernel.to(rows.dtype)
        return torch.mm(rows, kernel.mT if transposed else kernel, out=output)
    if not kernel.is_contiguous():  # blocks are parts of the memory
        kernel, transposed = kernel.mT, not transposed
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
    """Blocks of rows of an integer matrix, each valid until the next one.

    They share one buffer, because new memory is not in the cache.
    """
    floats = kernel.new_empty((min(length, kernel.shape[0]), kernel.shape[1]), dtype=dtype)
    for block in kernel.split(length):
        yield floats[: block.shape[0]].copy_(block)


def are_few(rows, sizes):
    """Whether `multiply_few` is for groups of these sizes."""
    return (
        rows.device.type == "cpu"
        and rows.shape[1] <= LONGEST_SUM
        and max(sizes) <= MOST_ROWS
        and multiplies_integers()
    )


@functools.cache
def multiplies_integers():
    """Whether this processor multiplies int8 matrices, fast and without error.

    Without VNNI instructions sums of two products saturate in PyTorch's kernels, also where
    `ONEDNN_MAX_CPU_ISA` forbids those that the processor has.
    """
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(largest, largest[:, :4]) == 64 * 127**2).all())


def zeros(shape):
    """Kernels (E, D, H) in the layout that `multiply_few` is fastest with: D changes first."""
    num_experts, features, width = shape
    return torch.zeros((num_experts, width, features), dtype=torch.int8).mT


def multiply_few(rows, sizes, kernels, width):
    """Groups of rows that stand one behind another, each times the int8 kernel of its expert.

    Each number of a row is written in three digits, which leaves an error of 2**-22 of the largest
    number of the row at most. Few operations, because each takes longer to start than to compute.

    Args:
        rows: (R, D) float.
        sizes: list of the sizes of the groups.
        kernels: iterable of the kernel of each group, int8 (D, H).
        width: H.

    Returns:
        (R, H) float32.
    """
    digits, unit = to_digits(rows.float())
    of_groups = digits.split([len(PLACES) * size for size in sizes], 1)
    products = unit.new_empty((rows.shape[0], width))
    for part, size, kernel, product in zip(of_groups, sizes, kernels, products.split(sizes)):
        torch.mm(_places(size), torch._int_mm(kernel.mT, part).float().mT, out=product)
    return products.mul_(unit)


def to_digits(rows):
    """Digits in base 256 of integers, which times a unit are the rows.

    Args:
        rows: (R, D) float32.

    Returns:
        digits: (D, 4 R) int8, those of a number from the lowest, then 0.
        unit: (R, 1) float32.
    """
    unit = torch.linalg.vector_norm(rows, torch.inf, 1, keepdim=True).mul_(1 / LARGEST)
    # With 128 added to each digit, bytes are digits from 0 to 255, and flipping their highest bit
    # takes 128 away. A row of zeros has any digits, and the unit 0.
    integers = torch.addcdiv(_offset(), rows, unit).mT.to(
        torch.int32, memory_format=torch.contiguous_format
    )
    return integers.bitwise_xor_(128 * sum(PLACES)).view(torch.int8), unit


@functools.cache
def _offset():
    return torch.tensor(128.0 * sum(PLACES), device="cpu")


@functools.cache
def _places(num_rows):
    """What the digits of some rows are worth, (R, 4 R)."""
    places = torch.tensor([PLACES], dtype=torch.float32, device="cpu")
    return torch.kron(torch.eye(num_rows, device="cpu"), places)
