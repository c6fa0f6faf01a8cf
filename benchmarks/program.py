"""An optimised program of XLA, read from its text.

A program is a set of computations: named lists of instructions, one of them the entry. Loops,
branches and fusions call others.
"""

import math
import re
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
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
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype).group())
        return math.prod(self.shape) * bits // 8


class Instruction(NamedTuple):
    """One instruction: its results flattened to arrays, and `attributes`, text behind operands."""

    name: str
    opcode: str
    results: tuple
    operands: tuple
    attributes: str
    is_root: bool

    @property
    def bytes(self):
        return sum(array.bytes for array in self.results)

    def called(self, role):
        """The name of the computation called as "calls", "body", ..., or None."""
        return dict(_CALLED.findall(self.attributes)).get(role)

    @property
    def branches(self):
        """Names of the computations of which a `conditional` runs one."""
        listed = _BRANCHES.search(self.attributes)
        if listed:
            return re.findall(r"[\w.\-]+", listed.group(1))
        return [name for role, name in _CALLED.findall(self.attributes) if "_computation" in role]

    @property
    def trips(self):
        """How often a loop runs, or None where that depends on data."""
        known = _TRIPS.search(self.attributes)
        return known and int(known.group(1))


class Computation(dict):
    """Instructions by name, in the order of the text."""

    def arrays(self, instruction):
        """The arrays of each operand, a list of tuples."""
        return [self[name].results if name in self else () for name in instruction.operands]

    def parameter(self, number):
        return next(
            instruction
            for instruction in self.values()
            if instruction.opcode == "parameter" and instruction.attributes.startswith(f"{number})")
        )

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
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations[head.group(2)] = Computation()
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    return computations, entry


def _instruction(line):
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    root, name, rest = match.groups()
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    opcode, parenthesis, tail = rest[end:].strip().partition("(")
    close = _closing(parenthesis + tail, 0) - 1
    operands, attributes = tail[:close], tail[close + 1 :]
    if opcode in ("parameter", "constant"):
        operands, attributes = "", tail
    return Instruction(
        name,
        opcode,
        _arrays(rest[:end]),
        tuple(re.findall(r"%([\w.\-]+)", operands)),
        attributes,
        bool(root),
    )


def _arrays(text):
    return tuple(
        Array(
            dtype,
            tuple(int(size) for size in sizes.split(",") if size),
            # Memory spaces above 0 are those of the core: `S(1)` is VMEM.
            not re.search(r"S\([1-9]", layout),
        )
        for dtype, sizes, layout in _ARRAY.findall(text)
    )


def _closing(text, start):
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")
