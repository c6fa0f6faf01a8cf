"""Matrix products in an optimised program: their sizes and FLOPs, from shapes alone."""

import math
import re
from typing import NamedTuple


class Product(NamedTuple):
    """One matrix product, or several of one shape in one instruction.

    `sizes` are those of the axes of the result and of the axes summed over; `exact` is whether
    float32 is multiplied in full precision.
    """

    flops: int
    dtype: str
    sizes: tuple
    exact: bool


def products(instruction, computation, computations):
    """The products of an instruction, those in a fusion included."""
    if instruction.opcode == "fusion":
        inner = computations[instruction.called("calls")]
        return [
            product for each in inner.values() for product in products(each, inner, computations)
        ]
    read = {"dot": _dot, "convolution": _convolution, "custom-call": _custom_call}
    if instruction.opcode not in read:
        return []
    product = read[instruction.opcode](instruction, computation.arrays(instruction))
    return [product] if product else []


def _dot(instruction, operands, axes=r"lhs_contracting_dims=\{([\d,]*)\}"):
    axes = re.findall(r"\d+", re.search(axes, instruction.attributes)[1])
    return _product(instruction, operands, [operands[0][0].shape[int(axis)] for axis in axes])


def _convolution(instruction, operands):
    """On TPUs every product is one.

    A spatial axis may be one of rows, one that is summed over, or that of a batch, with a window
    whose taps are void but for one: in each case the largest of its sizes is what it multiplies by.
    """
    left, right, result = operands[0][0], operands[1][0], instruction.results[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    sizes = [
        dict(zip(*pair)) for pair in zip(labels, (array.shape for array in (left, right, result)))
    ]
    summed = sizes[1]["i"]
    flops = 2 * sizes[2]["b"] * sizes[2]["f"] * summed
    for axis in filter(str.isdigit, labels[2]):
        flops *= max(size[axis] for size in sizes)
    return _product(instruction, operands, [summed])._replace(flops=flops)


def _custom_call(instruction, operands):
    """A product of a library, or a kernel that multiplies grouped rows."""
    if 'custom_call_target="__cublas$' in instruction.attributes:
        return _dot(instruction, operands, r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    arrays = [array for operand in operands for array in operand]
    everything = [*arrays, *instruction.results]
    return _grouped(instruction.results, everything) or _grouped(arrays, everything)


def _grouped(stacks, arrays):
    """Products of rows (R, A) and (R, B) with each stack (E, A, B), or whose gradient it is.

    All rows count, those that pad a kernel's tiles as well.
    """
    found = []
    for stack in stacks:
        rows = _rows_of(stack, arrays) if len(stack.shape) == 3 else None
        if rows:
            sizes = (rows.shape[0], *stack.shape[1:])
            found.append(Product(2 * math.prod(sizes), rows.dtype, sizes, True))
    if not found:
        return None
    return max(found)._replace(flops=sum(product.flops for product in found))


def _rows_of(stack, arrays):
    """The longest array (R, A) for which there is an (R, B) too, of a stack (E, A, B)."""
    num_experts, *widths = stack.shape
    rows = [a for a in arrays if len(a.shape) == 2 and a.dtype in ("bf16", "f16", "f32")]
    shapes = {array.shape for array in rows}
    rows = [
        array
        for array in rows
        if array.shape[1] in widths and all((array.shape[0], width) in shapes for width in widths)
    ]
    # Biases (E, B) look like rows, unless there are as many rows as experts.
    rows = [array for array in rows if array.shape[0] != num_experts] or rows
    return max(rows, key=lambda array: array.shape[0], default=None)


def _product(instruction, operands, summed):
    result, dtypes = instruction.results[0], [operand[0].dtype for operand in operands[:2]]
    return Product(
        2 * math.prod(result.shape) * math.prod(summed),
        "f32" if "f32" in dtypes else dtypes[0],
        (*result.shape, *summed),
        "operand_precision={highest" in instruction.attributes,
    )
