"""What devices send each other in a compiled program, read from its text."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_LINE = re.compile(
    r"= (?P<type>.+?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all"
    r"|collective-permute)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COLUMNS = {
    "gather_mb": "all-gather",
    "scatter_mb": "reduce-scatter",
    "to_all_mb": "all-to-all",
    "permute_mb": "collective-permute",
    "reduce_mb": "all-reduce",
}


class Collective(NamedTuple):
    """One collective operation: its name in XLA, the shapes of its results on one device, the bytes
    that a device receives if devices pass data on in a ring, and the operation it was made for.
    """

    kind: str
    shapes: list
    bytes: float
    operation: str


def collectives(text):
    """All `Collective`s of the text of a compiled program; those of one device are left out."""
    found = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        arrays = [
            (dtype, tuple(int(size) for size in sizes.split(",") if size))
            for dtype, sizes in _ARRAY.findall(match["type"])
        ]
        kind = match["kind"]
        if match["start"] and kind == "collective-permute":
            arrays = arrays[1:2]  # its operand, its result, two flags
        elif match["start"] and kind != "all-reduce":
            arrays = [(dtype, shape) for dtype, shape in arrays if shape]  # without flags
            arrays = arrays[len(arrays) // 2 :]  # operands stand before results
        number = 2 if kind == "collective-permute" else _group_size(line)
        if number == 1:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        factor = {
            "all-gather": (number - 1) / number,
            "all-reduce": 2 * (number - 1) / number,
            "reduce-scatter": number - 1,
            "all-to-all": (number - 1) / number,
        }.get(kind, 1)
        size = factor * sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in arrays)
        shapes = [shape for _, shape in arrays]
        found.append(Collective(kind, shapes, size, name[1] if name else ""))
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


# A product of XLA, or a kernel for grouped products.
_PRODUCT = (
    r'(?:fusion\(.*op_name="(?=[^"]*/dot_general")'
    r'|custom-call\(.*op_name="(?=[^"]*gmm))([^"]*)"'
)


def products_meanwhile(text):
    """Names of the products that the main program computes while an all-to-all is under way.

    A compiled program is printed in the order of its schedule.
    """
    under_way, products = set(), []
    for line in text[text.index("\nENTRY") :].splitlines():
        if start := re.match(r"\s*(%\S+) = .* all-to-all-start\(", line):
            under_way.add(start[1])
        elif done := re.search(r" all-to-all-done\((%\S+)\)", line):
            under_way.discard(done[1])
        elif under_way and (product := re.search(_PRODUCT, line)):
            products.append(product[1])
    return products


def _group_size(line):
    """How many devices take part together."""
    if lists := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return lists[1].count(",") + 1
    if table := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(table[1])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    raise ValueError(f"A collective without groups that are known here: {line.strip()[:300]}")
