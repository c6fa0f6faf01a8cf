"""Matrix products in an optimised program: their sizes and FLOPs, from shapes alone."""

import itertools
import math
import re
from typing import NamedTuple

_LIBRARY = re.compile(r'custom_call_target="__cublas\$')
_FLOATS = ("bf16", "f16", "f32")


class Product(NamedTuple):
    """One matrix product, or several of one shape in one instruction.

    Attributes:
        flops: of all of them.
        dtype: XLA's name of what is multiplied, such as "bf16".
        sizes: sizes of the axes of the result, and of the axes summed over.
        exact: whether float32 is multiplied in full precision.
    """

    flops: int
    dtype: str
    sizes: tuple
    exact: bool


def products(instruction, computation, computations):
    """The products of an instruction, those inside of a fusion included."""
    if instruction.opcode in _READERS:
        product = _READERS[instruction.opcode](instruction, computation.arrays(instruction))
        return [product] if product else []
    if instruction.opcode != "fusion":
        return []
    inner = computations[instruction.called("calls")]
    return [product for each in inner.values() for product in products(each, inner, computations)]


def _dot(instruction, operands):
    axes = _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    return _product(instruction, operands, [operands[0][0].shape[axis] for axis in axes])


def _convolution(instruction, operands):
    """On TPUs every product is one: the axis of a batch is a spatial one with a dilated window."""
    left, right, result = operands[0][0], operands[1][0], instruction.results[0]
    of_left, of_right, of_result = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes
    ).groups()
    window = re.search(r"\bwindow=\{([^}]*)\}", instruction.attributes)
    options = dict(re.findall(r"(\w+)=([\dx_]+)", window.group(1))) if window else {}
    spatial = {name: sizes.split("x") for name, sizes in options.items()}
    share = 1.0
    for axis in range(len(spatial.get("size", ()))):
        inside = left.shape[of_left.index(str(axis))]
        outside = result.shape[of_result.index(str(axis))]
        share *= _taps(inside, outside, {n: s[axis] for n, s in spatial.items()}) / outside
    return _product(instruction, operands, [right.shape[of_right.index("i")]], share)


def _taps(inside, outside, window):
    """How often the window of one spatial axis meets an element that is neither padding nor gap."""
    size, stride, gap, spread = (
        int(window.get(name, 1)) for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    first = -int(window.get("pad", "0_0").split("_")[0])
    positions = (
        first + output * stride + tap * spread
        for output, tap in itertools.product(range(outside), range(size))
    )
    return sum(0 <= at <= (inside - 1) * gap and at % gap == 0 for at in positions)


def _custom_call(instruction, operands):
    """A product of a library, or a kernel that multiplies grouped rows."""
    if _LIBRARY.search(instruction.attributes):
        axes = _numbers(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        return _product(instruction, operands, [operands[0][0].shape[axis] for axis in axes])
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
    widest = max(found, key=lambda product: product.flops)
    return widest._replace(flops=sum(product.flops for product in found))


def _rows_of(stack, arrays):
    """The longest array (R, A) for which there is an (R, B) too, of a stack (E, A, B)."""
    num_experts, *widths = stack.shape
    rows = [array for array in arrays if len(array.shape) == 2 and array.dtype in _FLOATS]
    shapes = {array.shape for array in rows}
    rows = [
        array
        for array in rows
        if array.shape[1] in widths and all((array.shape[0], width) in shapes for width in widths)
    ]
    # Biases (E, B) look like rows, unless there are as many rows as experts.
    rows = [array for array in rows if array.shape[0] != num_experts] or rows
    return max(rows, key=lambda array: array.shape[0], default=None)


def _product(instruction, operands, summed, share=1.0):
    result, dtypes = instruction.results[0], [operand[0].dtype for operand in operands[:2]]
    return Product(
        round(2 * math.prod(result.shape) * math.prod(summed) * share),
        "f32" if "f32" in dtypes else dtypes[0],
        (*result.shape, *summed),
        "operand_precision={highest" in instruction.attributes,
    )


def _numbers(pattern, text):
    return [int(number) for number in re.findall(r"\d+", re.search(pattern, text).group(1))]


_READERS = {"dot": _dot, "convolution": _convolution, "custom-call": _custom_call}
