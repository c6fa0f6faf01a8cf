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


class Collective(NamedTuple):
    """One collective operation.

    - `kind`: its name in XLA, such as "all-gather".
    - `shapes`: of all its results on one device.
    - `bytes`: what one device receives, where devices pass data on in a ring.
    - `operation`: the name of the operation it was made for.
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
        size = sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in arrays)
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
        shapes = [shape for _, shape in arrays]
        found.append(Collective(kind, shapes, factor * size, name[1] if name else ""))
    return found


def bytes_by_kind(text):
    """Dict of kinds of collectives to what one device receives by all of a kind.

    Those of further passes are left out: with balanced loads their loops have no trips.
    """
    totals: dict = {}
    for collective in collectives(text):
        if "while/body" in collective.operation:
            continue
        totals[collective.kind] = totals.get(collective.kind, 0) + collective.bytes
    return totals


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
        elif under_way and (product := re.search(r'fusion\(.*op_name="([^"]*/dot_general)"', line)):
            products.append(product[1])
    return products


def _group_size(line):
    """How many devices take part together."""
    lists = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if lists:
        return lists[1].count(",") + 1
    table = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    if table:
        return int(table[1])
    mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    raise ValueError(f"A collective without groups that are known here: {line.strip()[:300]}")
