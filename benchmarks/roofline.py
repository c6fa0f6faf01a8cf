"""Lower bounds on the time and memory traffic of an optimised program, from its text.

`benchmarks.ahead` says what they mean.
"""

from typing import NamedTuple

from benchmarks import program
from benchmarks.products import products

_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("opt-barrier", "add-dependency", "partition-id", "replica-id"),
)
# Calls that only tell the compiler something.
_FREE_CALLS = ("ConcatBitcast", "AssumeGatherIndicesInBound")
_VIEWS = ("bitcast", "reshape")
_SLICES = ("slice", "dynamic-slice", "gather")


class Work(NamedTuple):
    """What a program, or a part of it, does. Kernels are bound by their products or their traffic.

    `bytes` are read from and written to main memory, also by copies that run beside kernels.
    `waits` is how often the host must see data of the device, `loops` how many loops of
    products have trips that depend on data.
    """

    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0
    kernels: int = 0
    waits: int = 0
    loops: int = 0
    products: tuple = ()

    def __add__(self, other):
        return Work(*(mine + theirs for mine, theirs in zip(self, other)))

    def times(self, trips):
        """The work of so many trips; what stands in the program is not more for it."""
        return Work(*(trips * amount for amount in self[:5]), *self[5:])

    def bound(self, chip):
        """Seconds below which the program cannot come: copies fill what kernels leave of memory."""
        return max(self.seconds, self.bytes / chip.memory)


def work(text, chip):
    """The `Work` of the text of an optimised program on one of `benchmarks.chips.CHIPS`."""
    computations, entry = program.read(text)
    return _Reader(computations, chip).total(entry)


class _Reader:
    def __init__(self, computations, chip):
        self.computations = computations
        self.chip = chip

    def total(self, name):
        computation = self.computations[name]
        return sum((self._work(each, computation) for each in computation.values()), Work())

    def _work(self, instruction, computation):
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return Work()
        if opcode == "while":
            return self._loop(instruction)
        if opcode == "conditional":
            branches = map(self.total, instruction.branches)
            return self._host_waits(1) + max(branches, key=lambda branch: branch.bound(self.chip))
        if opcode in ("call", "async-start"):
            return self.total(instruction.called("to_apply") or instruction.called("calls"))
        if opcode.endswith("-start"):  # an asynchronous copy or slice
            ends = instruction.results[:2]
            return Work(bytes=min(end.bytes for end in ends) * sum(end.in_memory for end in ends))
        if any(f'"{target}"' in instruction.attributes for target in _FREE_CALLS):
            return Work()
        return self._kernel(instruction, computation)

    def _loop(self, instruction):
        body, trips, is_dynamic = self.total(instruction.called("body")), instruction.trips, False
        condition = self.total(instruction.called("condition"))
        if trips is None:
            is_dynamic = body.flops > 0 or body.loops > 0
            trips = 0 if is_dynamic else 1
            condition += self._host_waits(1)
        return body.times(trips) + condition.times(trips + 1) + Work(loops=int(is_dynamic))

    def _host_waits(self, times):
        """Only where the host starts each kernel does it look at conditions."""
        return Work(seconds=times * self.chip.wait, waits=times if self.chip.wait else 0)

    def _kernel(self, instruction, computation):
        found = tuple(products(instruction, computation, self.computations))
        if '"__cublas$' in instruction.attributes:  # after the result stands scratch memory
            instruction = instruction._replace(results=instruction.results[:1])
        traffic = self._written(instruction, computation)
        for position, operand in enumerate(computation.arrays(instruction)):
            if any(array.in_memory for array in operand):
                traffic += self._read(instruction, position, computation)
        computing = sum(product.flops / self._peak(product) for product in found)
        seconds = max(computing, traffic / self.chip.memory, self.chip.launch)
        flops = sum(product.flops for product in found)
        return Work(seconds, traffic, flops, kernels=1, products=found)

    def _peak(self, product):
        if product.dtype != "f32":
            return self.chip.half
        return self.chip.float32_highest if product.exact else self.chip.float32_default

    def _read(self, instruction, position, computation):
        """Bytes of an operand that an instruction needs: of what it slices only the slice."""
        whole = computation[instruction.operands[position]].bytes
        if instruction.opcode in _SLICES and position == 0:
            return min(instruction.bytes, whole)
        if instruction.opcode == "dynamic-update-slice" and position == 0:
            return 0
        if instruction.opcode == "fusion":
            inner = self._fused(instruction)
            return min(self._used(inner.parameter(position).name, inner), whole)
        return whole

    def _used(self, name, computation):
        """Bytes that all users of an instruction in a fusion need of it."""
        return sum(
            self._used(user.name, computation)
            if user.opcode in _VIEWS
            else self._read(user, position, computation)
            for user, position in computation.users(name)
        )

    def _written(self, instruction, computation):
        """Bytes of the results in main memory: of what is updated in place only the update."""
        parts = [(instruction, computation)] * len(instruction.results)
        if instruction.opcode == "fusion":
            inner = self._fused(instruction)
            names = inner.root.operands if inner.root.opcode == "tuple" else [inner.root.name]
            parts = [(inner[name], inner) for name in names]
        return sum(
            min(self._changed(*part), array.bytes)
            for part, array in zip(parts, instruction.results)
            if array.in_memory
        )

    def _changed(self, instruction, computation):
        """Bytes that an instruction writes of its result."""
        if instruction.opcode == "dynamic-update-slice":
            return computation[instruction.operands[1]].bytes
        if instruction.opcode in _VIEWS:
            return self._changed(computation[instruction.operands[0]], computation)
        if instruction.opcode == "fusion":
            inner = self._fused(instruction)
            return self._changed(inner.root, inner)
        return instruction.bytes

    def _fused(self, instruction):
        return self.computations[instruction.called("calls")]
