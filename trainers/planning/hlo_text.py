"""HLO text: computations of instructions, as `compiled.as_text()` prints them."""

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")


class Array(NamedTuple):
    """One array of a shape: kind f with 32 bits is f32. Only memory space 0 is not on the chip."""

    dims: tuple[int, ...]
    kind: str
    bits: int
    on_chip: bool

    @property
    def bytes(self) -> float:
        """Bytes in main memory."""
        return 0 if self.on_chip else self.size

    @property
    def size(self) -> float:
        """Bytes, in main memory or on the chip."""
        return math.prod(self.dims) * self.bits / 8


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    opcode: str
    arrays: list[Array]
    operands: list[str]
    rest: str

    @property
    def bytes(self) -> float:
        """Bytes of its results in main memory."""
        return sum(array.bytes for array in self.arrays)

    def attribute(self, name: str) -> str:
        """The text after `name=`, up to a comma, a space or the end; empty without one."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]*)", self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> str:
        """Name of the computation that it calls."""
        return (self.attribute("calls") or self.attribute("to_apply")).removeprefix("%")

    @property
    def group_size(self) -> int | None:
        """Devices per group of a collective; None: all. The three forms are {{0,1},{2,3}}, [2,2]<=[4]
        (groups, devices per group) and mesh['x'=2,'y'=2] {'x'}.
        """
        groups = self.rest.partition("replica_groups=")[2]
        if found := re.match(r"\{\{([\d,]+)\}", groups):
            return found[1].count(",") + 1
        if found := re.match(r"\[\d+,(\d+)\]", groups):
            return int(found[1])
        if found := re.match(r"mesh\[([^\]]*)\].*?\{([^}]*)\}", groups):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
            axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return None

    @property
    def label(self) -> str:
        """Name of the instruction in JAX."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else self.name


class Computation(dict[str, Instruction]):
    """Instructions by name."""

    root_name = ""

    @property
    def root(self) -> Instruction:
        """The instruction whose result the computation returns."""
        return self[self.root_name]

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The computation's parameters, in order."""
        found = [i for i in self.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.operands[0]))

    @functools.cached_property
    def users(self) -> dict[str, list[str]]:
        """Names of the instructions that read each instruction's result."""
        users = collections.defaultdict(list)
        for instruction in self.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction.name)
        return users


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """Parses a module. Returns (the entry's name, all computations by name)."""
    entry, computations = "", {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = computations[match[2]] = Computation()
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            computation[match[2]] = _instruction(match[2], match[3])
            if match[1]:
                computation.root_name = match[2]
    return entry, computations


def _instruction(name: str, text: str) -> Instruction:
    """Parses `f32[2]{0} add(%a, %b), metadata={…}`."""
    end = _closing(text, 0) if text[0] == "(" else text.index(" ")
    opening = text.index("(", end)
    close = _closing(text, opening)
    operands = re.findall(r"%?([\w.+-]+)(?=,|$)", text[opening + 1 : close - 1])
    return Instruction(
        name, text[end:opening].strip(), list(_arrays(text[:end])), operands, text[close:]
    )


def _arrays(shape: str) -> Iterator[Array]:
    for kind, bits, dims, layout in _ARRAY.findall(shape):
        width = int(bits) if bits else 8 * (kind == "pred")
        yield Array(tuple(map(int, filter(None, dims.split(",")))), kind, width, "S(" in layout)


def _closing(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)
