"""What devices send each other in a compiled program, read from its text."""

import math
import re
from typing import NamedTuple

from benchmarks import program

# What a device receives, as a share of the results, if devices pass data on in a ring of a number.
_FACTORS = {
    "all-gather": lambda number: (number - 1) / number,
    "all-reduce": lambda number: 2 * (number - 1) / number,
    "reduce-scatter": lambda number: number - 1,
    "all-to-all": lambda number: (number - 1) / number,
    "ragged-all-to-all": lambda number: 1,
    "collective-permute": lambda number: 1,
}
_COLUMNS = {
    "gather_mb": "all-gather",
    "scatter_mb": "reduce-scatter",
    "to_all_mb": "all-to-all",
    "permute_mb": "collective-permute",
    "reduce_mb": "all-reduce",
}


class Collective(NamedTuple):
    """Its name in XLA, the shapes of its results on one device, bytes that a device receives, and
    the operation it was made for.
    """

    kind: str
    shapes: list
    bytes: float
    operation: str


def collectives(text):
    """All `Collective`s of the text of a compiled program; those of one device are left out."""
    found, (computations, _) = [], program.read(text)
    for each in (each for part in computations.values() for each in part.values()):
        kind, arrays = each.opcode.removesuffix("-start"), each.results
        if kind not in _FACTORS:
            continue
        if kind != each.opcode and kind == "collective-permute":
            arrays = arrays[1:2]  # its operand, its result, two flags
        elif kind != each.opcode and kind != "all-reduce":
            arrays = [array for array in arrays if array.shape]  # without flags
            arrays = arrays[len(arrays) // 2 :]  # operands stand before results
        number = 2 if kind == "collective-permute" else _group_size(each.attributes)
        if number > 1:
            size = _FACTORS[kind](number) * sum(array.bytes for array in arrays)
            shapes = [array.shape for array in arrays]
            found.append(Collective(kind, shapes, size, _operation(each)))
    return found


def megabytes(text):
    """What one device receives by all collectives of a kind, a dict of columns.

    Those of further passes are left out: with balanced loads their loops have no trips.
    """
    found = [each for each in collectives(text) if "while/body" not in each.operation]
    return {
        column: sum(each.bytes for each in found if each.kind == kind) / 1e6
        for column, kind in _COLUMNS.items()
    }


def products_meanwhile(text):
    """Names of the products that the main program computes while an all-to-all is under way.

    A compiled program is printed in the order of its schedule.
    """
    computations, entry = program.read(text)
    under_way, products = set(), []
    for each in computations[entry].values():
        name = _operation(each)
        # Of XLA, or a kernel for grouped products.
        is_product = {"fusion": name.endswith("/dot_general"), "custom-call": "gmm" in name}
        if each.opcode == "all-to-all-start":
            under_way.add(each.name)
        elif each.opcode == "all-to-all-done":
            under_way -= {*each.operands}
        elif under_way and is_product.get(each.opcode):
            products.append(name)
    return products


def _operation(instruction):
    """The operation that an instruction was made for."""
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return name[1] if name else ""


def _group_size(attributes):
    """How many devices take part together."""
    if lists := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return lists[1].count(",") + 1
    if table := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(table[1])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    raise ValueError(f"A collective without groups that are known here: {attributes[:300]}")
