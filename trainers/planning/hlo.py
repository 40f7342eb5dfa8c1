"""Cost of a compiled program on one device, read off its HLO text.

XLA's own `cost_analysis()` counts the body of a loop once and a Pallas kernel not at all. Here a loop's
body counts once per round, and kernels count by their own estimate or the caller's.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from trainers.planning.hlo_text import Array, Computation, Instruction, parse

# Kinds of collectives.
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
COLLECTIVES += ("ragged-all-to-all",)

# These name existing arrays, or cost what they call costs.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency", "get-dimension-size"}
# These read only as much of their first operand as they return.
_SLICES = {"dynamic-slice", "slice", "gather"}

_UNDER_WAY = "under way"

_WINDOW = {"size": 1, "stride": 1, "pad": "0_0", "lhs_dilate": 1, "rhs_dilate": 1}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one run of a program on one device.

    Attributes:
        flops: FLOPs of matrix products, convolutions and kernels, two per multiply-add.
        bytes_accessed: bytes read from and written to the device's main memory by instructions that
            are not fused into others.
        collectives: bytes that a device sends, by kind. In a ring of n devices it sends (n - 1) / n of
            the array that is gathered, exchanged or scattered, and twice that to reduce it everywhere.
        kernels: calls per kernel name.
        open_loops: names of loops whose number of rounds the program does not state.
    """

    flops: float
    bytes_accessed: float
    collectives: dict[str, float]
    kernels: dict[str, float]
    open_loops: tuple[str, ...]

    @property
    def collective_bytes(self) -> float:
        """Bytes that a device sends, of all kinds."""
        return sum(self.collectives.values())


# (a kernel's name, its operands and then its results) -> (FLOPs, bytes)
KernelCost = Callable[[str, list[Array]], tuple[float, float]]


def analyse(
    text: str,
    kernel: KernelCost | None = None,
    rounds: Callable[[str], float] = lambda loop: 1,
) -> Cost:
    """Adds up the cost of a compiled program.

    Args:
        text: `jax.jit(f).lower(…).compile().as_text()`.
        kernel: the cost of a kernel that brings no estimate; default: its operands and results are
            read and written, and it computes nothing.
        rounds: the rounds of a loop, by its name, where the program does not state them.
    """
    program = _Program(text, kernel, rounds)
    named = collections.defaultdict(dict)
    for (kind, name), n in program.cost(program.entry).items():
        named[kind][name] = n
    return Cost(
        flops=named["flops"].get("", 0.0),
        bytes_accessed=named["bytes"].get("", 0.0),
        collectives=named["collective"],
        kernels=named["kernel"],
        open_loops=tuple(named["open loop"]),
    )


class _Program:
    """A module, and its computations' costs as counters with keys (kind, name)."""

    def __init__(self, text: str, kernel: KernelCost | None, rounds: Callable[[str], float]):
        self._kernel, self._rounds = kernel, rounds
        self.entry, self._computations = parse(text)
        self._costs: dict[str, collections.Counter] = {}
        found = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
        self._devices = int(found[1]) if found else 1
        self._sort_collectives()

    def _sort_collectives(self) -> None:
        """Renames fused collectives of XLA for TPU by what they do, and counts each of them once."""
        for computation in list(self._computations.values()):
            seen = set()
            for fusion in filter(_fused, computation.values()):
                inside = self._computations[fusion.called]
                for i in [i for i in inside.values() if i.opcode in COLLECTIVES]:
                    if fusion.called.startswith("all-reduce-scatter"):  # whole; channels are reused
                        inside[i.name] = i._replace(opcode="reduce-scatter")
                        continue
                    # A collective that overlaps with other work is in every fusion from start to end.
                    channel = i.attribute("channel_id") or i.name
                    for name in [i.name, *inside.users[i.name]] if channel in seen else []:
                        if (j := inside[name]).opcode in (*COLLECTIVES, "custom-call"):
                            inside[name] = j._replace(opcode=_UNDER_WAY)
                    seen.add(channel)

    def cost(self, name: str) -> collections.Counter:
        """The cost of a computation that is not fused."""
        if name not in self._costs:
            computation, total = self._computations[name], collections.Counter()
            for instruction in computation.values():
                total.update(self._instruction(instruction, computation))
            self._costs[name] = total
        return self._costs[name]

    def _instruction(self, i: Instruction, within: Computation) -> collections.Counter:
        if i.opcode == "while":
            return self._loop(i)
        if i.opcode == "conditional":
            branches = re.findall(r"%([\w.-]+)", i.attribute("branch_computations"))
            branches = branches or [i.attribute(f"{b}_computation")[1:] for b in ("true", "false")]
            return max(map(self.cost, branches), key=lambda c: c["flops", ""] + c["bytes", ""])
        if i.opcode in ("call", "async-start"):
            return self.cost(i.called)
        if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
            return collections.Counter()
        total = self._work(i, within)
        if ("kernel", i.label) not in total:
            total["bytes", ""] += self._traffic(i, within)
        return total

    def _loop(self, i: Instruction) -> collections.Counter:
        total = self.cost(i.attribute("body")[1:]) + self.cost(i.attribute("condition")[1:])
        count = self._known_rounds(i)
        if count is None:
            count = self._rounds(i.label)
            total["open loop", i.label] += 1
        return collections.Counter({key: n * count for key, n in total.items()})

    def _known_rounds(self, i: Instruction) -> int | None:
        """Rounds that XLA states, else those of a counter that goes from 0 up to a constant."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.rest):
            return int(found[1])
        condition = self._computations[i.attribute("condition")[1:]]
        last = condition.root
        compare = self._computations[last.called].root if _fused(last) else last
        bounds = [condition[o] for o in last.operands if condition[o].opcode == "constant"]
        counters = [condition[o].attribute("index") for o in last.operands]
        if compare.attribute("direction") != "LT" or len(bounds) != 1 or not counters[0]:
            return None
        body = self._computations[i.attribute("body")[1:]]
        step = self._added(body[body.root.operands[int(counters[0])]], body)
        return -(-int(bounds[0].operands[0]) // (step or 1))

    def _added(self, i: Instruction, within: Computation) -> int:
        """Number that one round adds to a loop's counter: XLA unrolls some loops without changing their bound."""
        if i.opcode == "constant":
            return int(i.operands[0])
        operands = [within[name] for name in i.operands if name in within]
        if _fused(i):
            inside = self._computations[i.called]
            own = [o for o in inside.values() if o.opcode == "constant"]
            operands += own if inside.root.opcode == "add" else []
        if i.opcode in ("add", "copy", "bitcast") or _fused(i):
            return sum(self._added(operand, within) for operand in operands)
        return 0

    def _work(self, i: Instruction, within: Computation) -> collections.Counter:
        """FLOPs, collectives and kernels of an instruction, fused or not."""
        total, kind = collections.Counter(), i.opcode.removesuffix("-start")
        arrays = [within[name].arrays for name in i.operands if name in within]
        if _fused(i):
            inside = self._computations[i.called]
            for instruction in inside.values():
                total.update(self._work(instruction, inside))
        elif kind == "dot":
            total["flops", ""] = _dot_flops(i, arrays[0][0].dims)
        elif kind == "convolution":
            total["flops", ""] = _convolution_flops(i, arrays[0][0].dims, arrays[1][0].dims)
        elif kind in COLLECTIVES:
            size = sum(array.size for operand in arrays for array in operand)
            total["collective", kind] = size * self._share(i, kind)
        elif kind == "custom-call" and "tpu_custom_call" in i.attribute("custom_call_target"):
            total["kernel", i.label] = 1
            total["flops", ""], total["bytes", ""] = self._kernel_cost(i, sum(arrays, []))
        return total

    def _share(self, i: Instruction, kind: str) -> float:
        """The fraction of its operands' size that a device sends in a collective."""
        n = i.group_size or self._devices
        part = (n - 1) / n
        shares = {"all-gather": n - 1, "all-reduce": 2 * part, "collective-permute": 1}
        return shares.get(kind, part)

    def _kernel_cost(self, i: Instruction, operands: list[Array]) -> tuple[float, float]:
        if found := re.search(r'"cost_estimate":\{([^}]*)\}', i.rest):
            numbers = dict(re.findall(r'"(\w+)":"?(\d+)', found[1]))
            return float(numbers.get("flops", 0)), float(numbers.get("bytes_accessed", 0))
        if self._kernel is not None:
            return self._kernel(i.label, operands + i.arrays)
        return 0, sum(array.bytes for array in operands + i.arrays)

    def _traffic(self, i: Instruction, within: Computation) -> float:
        """Bytes that an instruction which is not fused reads and writes."""
        operands = [within[name] for name in i.operands if name in within]
        kind = i.opcode.removesuffix("-start")
        if "ConcatBitcast" in i.rest or (i.opcode == "custom-call" and not operands):
            return 0  # names of buffers
        if _fused(i):
            inside = self._computations[i.called]
            pairs = zip(operands, inside.parameters, strict=True)
            read = sum(min(o.bytes, self._read(p, inside)) for o, p in pairs)
            results = [inside.root]
            if inside.root.opcode == "tuple":
                results = [inside[name] for name in inside.root.operands]
            return read + sum(
                min(array.bytes, self._written(results[n % len(results)], inside))
                for n, array in enumerate(i.arrays)
            )
        if kind in _SLICES:
            result = i.arrays[0] if kind == i.opcode else i.arrays[1]
            return min(result.size, operands[0].bytes) + result.bytes
        if kind == "dynamic-update-slice":
            return operands[1].bytes + min(i.bytes, operands[1].arrays[0].size)
        if kind == "scatter":
            return operands[1].bytes + 3 * operands[2].bytes
        if kind != i.opcode != "all-reduce-start":  # it returns its operands, too
            return i.bytes
        return sum(o.bytes for o in operands) + i.bytes

    def _read(self, i: Instruction, within: Computation) -> float:
        """Bytes of an array that a fused computation reads, in main memory or on the chip."""
        whole, total = sum(array.size for array in i.arrays), 0.0
        for user in (within[name] for name in within.users[i.name]):
            first = user.operands[0] == i.name
            if user.opcode == "bitcast":
                total += self._read(user, within)
            elif user.opcode in _SLICES and first:
                total += sum(array.size for array in user.arrays)
            elif _fused(user):
                inside = self._computations[user.called]
                for name, parameter in zip(user.operands, inside.parameters, strict=True):
                    if name != i.name:
                        continue
                    total += self._read(parameter, inside)
                    if _names(inside.root, parameter, inside):
                        total += self._read(user, within)
            elif user.opcode not in (_UNDER_WAY, "tuple"):
                if not (user.opcode == "dynamic-update-slice" and first):  # which is in place
                    return whole
        return min(whole, total)

    def _written(self, root: Instruction, within: Computation) -> float:
        """Bytes that a fused computation writes, to main memory or on the chip."""
        if root.opcode in (_UNDER_WAY, "parameter"):
            return 0
        if root.opcode == "bitcast":
            return self._written(within[root.operands[0]], within)
        if root.opcode == "dynamic-update-slice":
            return sum(array.size for array in within[root.operands[1]].arrays)
        if _fused(root):
            inside = self._computations[root.called]
            return self._written(inside.root, inside)
        return sum(array.size for array in root.arrays)


def _fused(i: Instruction) -> bool:
    return i.opcode == "fusion"


def _names(root: Instruction, i: Instruction, within: Computation) -> bool:
    """Whether a computation returns its array `i` as it is, without reading it."""
    while root.opcode == "bitcast":
        root = within[root.operands[0]]
    return root.name == i.name


def _dot_flops(i: Instruction, lhs: tuple[int, ...]) -> float:
    contracted = re.findall(r"\d+", i.attribute("lhs_contracting_dims"))
    return 2 * math.prod(i.arrays[0].dims) * math.prod(lhs[int(d)] for d in contracted)


def _convolution_flops(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """XLA for TPU lowers matrix products to convolutions, with batch axes as dilated spatial axes."""
    in_labels, kernel_labels, out_labels = re.split(r"_|->", i.attribute("dim_labels"))
    window = dict(_WINDOW) | dict(re.findall(r"(\w+)=([\dx_-]+)", i.attribute("window")))
    out = i.arrays[0].dims
    total = 2.0 * rhs[kernel_labels.index("i")] * out[out_labels.index("f")]
    total *= out[out_labels.index("b")]
    for axis in filter(str.isdigit, out_labels):
        taps = 0  # taps on the input itself, not on its padding or holes
        option = {k: (str(v).split("x") * 9)[int(axis)] for k, v in window.items()}
        low = int(option["pad"].split("_")[0])
        stride, base, step = (int(option[k]) for k in ("stride", "lhs_dilate", "rhs_dilate"))
        ends = (lhs[in_labels.index(axis)] - 1) * base
        places = np.arange(out[out_labels.index(axis)]) * stride - low
        for tap in range(rhs[kernel_labels.index(axis)]):
            at = places + tap * step
            taps += int(np.count_nonzero((at >= 0) & (at <= ends) & (at % base == 0)))
        total *= taps
    return total
