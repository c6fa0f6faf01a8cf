"""An optimised program of XLA, read from its text.

A program is a set of computations: named lists of instructions, one of them the entry. Loops,
branches and fusions call others.
"""

import math
import re
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
# The first word after a blank with a parenthesis is the operation; types and layouts have none.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c64|c128)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Array(NamedTuple):
    """Type of an array: `dtype` is XLA's name of it, such as "bf16" or "f32".

    `in_memory` is False where a TPU holds it in memory of its core, not in main memory (HBM).
    """

    dtype: str
    shape: tuple
    in_memory: bool

    @property
    def bytes(self):
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8


class Instruction(NamedTuple):
    """One instruction: its results flattened to arrays, and what stands in and after `()`."""

    name: str
    opcode: str
    results: tuple
    inside: str
    attributes: str
    is_root: bool

    @property
    def operands(self):
        return re.findall(r"%([\w.\-]+)", self.inside)

    @property
    def bytes(self):
        return sum(array.bytes for array in self.results)

    def called(self, role):
        """The name of the computation called as "calls", "body", ..., or None."""
        return dict(_CALLED.findall(self.attributes)).get(role)

    @property
    def branches(self):
        """Names of the computations of which a `conditional` runs one."""
        if listed := _BRANCHES.search(self.attributes):
            return re.findall(r"[\w.\-]+", listed[1])
        return [name for role, name in _CALLED.findall(self.attributes) if "_computation" in role]

    @property
    def trips(self):
        """How often a loop runs, or None where that depends on data."""
        known = _TRIPS.search(self.attributes)
        return known and int(known[1])


class Computation(dict):
    """Instructions by name, in the order of the text."""

    def arrays(self, instruction):
        """The arrays of each operand, a list of tuples."""
        return [self[name].results if name in self else () for name in instruction.operands]

    def parameter(self, number):
        parameters = (each for each in self.values() if each.opcode == "parameter")
        return next(each for each in parameters if each.inside == str(number))

    @property
    def root(self):
        return next(instruction for instruction in self.values() if instruction.is_root)

    def users(self, name):
        """Pairs (instruction, position among its operands) that read an instruction."""
        return [
            (instruction, position)
            for instruction in self.values()
            for position, operand in enumerate(instruction.operands)
            if operand == name
        ]


def read(text):
    """The computations of a program by name, and the name of the entry."""
    computations, entry, current = {}, None, None
    # The metadata of a kernel, which is JSON, goes over several lines.
    for line in re.sub(r"/\*.*?\*/|\n(?=\"|\}\})", "", text).splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = Computation()
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, name, types, opcode, inside, attributes = found.groups()
            arrays = tuple(_array(*found) for found in _ARRAY.findall(types))
            current[name] = Instruction(name, opcode, arrays, inside, attributes, bool(root))
    return computations, entry


def _array(dtype, sizes, layout):
    shape = tuple(int(size) for size in sizes.split(",") if size)
    # Memory spaces above 0 are those of the core: `S(1)` is VMEM.
    return Array(dtype, shape, not re.search(r"S\([1-9]", layout))
