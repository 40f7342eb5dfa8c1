"""Published numbers of accelerators, and the least time that a program can take on one."""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.experimental import topologies

from utils.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator, as its maker describes it.

    Attributes:
        flops: bfloat16 matrix products at peak, FLOP/s.
        memory_bytes: of main memory.
        bandwidth: of main memory, bytes/s.
        links: what it can send to others within a slice, all links together, bytes/s.
        price: list price, on demand, $ an hour; None: not listed by the chip.
        tpu: whether programs are compiled for it by libtpu.
    """

    flops: float
    memory_bytes: float
    bandwidth: float
    links: float
    price: float | None
    tpu: bool


def _tpu(tflops: float, gib: float, gb_per_s: float, gbit_per_s: float, price: float) -> Chip:
    return Chip(
        flops=tflops * 1e12,
        memory_bytes=gib * 2**30,
        bandwidth=gb_per_s * 1e9,
        links=gbit_per_s * 1e9 / 8,
        price=price,
        tpu=True,
    )


def _gpu(tflops: float, gb: float, gb_per_s: float, links_gb_per_s: float) -> Chip:
    return Chip(
        flops=tflops * 1e12,
        memory_bytes=gb * 1e9,
        bandwidth=gb_per_s * 1e9,
        links=links_gb_per_s * 1e9,
        price=None,
        tpu=False,
    )


# TPUs: cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e}: peak bf16, HBM, its bandwidth, "interchip
# interconnect" in Gbit/s one way (the "bidirectional" GB/s there count both ways). Memory: what XLA
# lets a program use, which it names when one does not fit. Prices: cloud.google.com/tpu/pricing, on
# demand in US regions, as published in 2025.
# GPUs: NVIDIA's data sheets of the A100 80GB SXM and the H100 SXM: dense bf16; half of NVLink's total.
CHIPS = {
    "v4": _tpu(275, 32, 1228, 2400, 3.22),
    "v5e": _tpu(197, 15.75, 819, 1600, 1.20),
    "v5p": _tpu(459, 95.74, 2765, 4800, 4.20),
    "v6e": _tpu(918, 31.25, 1640, 3584, 2.70),
    "a100": _gpu(312, 80, 2039, 300),
    "h100": _gpu(989, 80, 3350, 450),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """So many chips of one kind, for TPUs in a grid.

    Attributes:
        name: as given, v5e:4x8.
        kind: a key of CHIPS.
        grid: chips along each side.
    """

    name: str
    kind: str
    grid: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """Its numbers."""
        return CHIPS[self.kind]

    @property
    def n_chips(self) -> int:
        """All chips; a program sees each as one device."""
        return math.prod(self.grid)

    def tpu_devices(self) -> list[jax.Device]:
        """Its devices, which need not be there. Raises ConfigError if libtpu does not know them."""
        sides = (*self.grid, 1)[:3]
        options: dict[str, Any] = {"chip_config_name": "megacore"} if self.kind == "v4" else {}
        if self.n_chips < 4:
            options["chips_per_host_bounds"] = sides
        try:
            return topologies.get_topology_desc(self.name, platform="tpu", **options).devices
        except jax.errors.JaxRuntimeError as e:
            reason = str(e).partition("\n")[0]
            raise ConfigError(f"--topology {self.name}: unknown to libtpu: {reason}") from e


# Slices that can be rented: the same documentation's "supported configurations".
_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16"
SLICES = {
    "v5e": _FLAT,
    "v6e": _FLAT,
    "v5p": _CUBES,
    "v4": _CUBES,
    "a100": "1 2 4 8",
    "h100": "1 2 4 8",
}


def parse_topologies(text: str) -> tuple[Topology, ...]:
    """The topology, or all slices of a kind of chip, smallest first. Raises ConfigError."""
    names = [f"{text}:{grid}" for grid in SLICES.get(text, "").split()]
    return tuple(map(parse_topology, names or [text]))


def parse_topology(text: str) -> Topology:
    """v5e:4x8 or h100:8. Raises ConfigError that says what is known."""
    kind, _, sides = text.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,2}", sides):
        raise ConfigError(
            f"topology {text!r:.40}, expected a chip ({', '.join(CHIPS)}) and how many, as v5e:4x8, "
            "v5p:4x4x4 or h100:8"
        )
    grid = tuple(map(int, sides.split("x")))
    n_sides = SLICES[kind].split()[0].count("x") + 1
    if CHIPS[kind].tpu and len(grid) != n_sides:
        raise ConfigError(f"topology {text!r:.40}: {kind} is a grid of {n_sides} sides")
    return Topology(name=text, kind=kind, grid=grid)


def roofline(
    chip: Chip, flops: float, bytes_accessed: float, collective_bytes: float
) -> dict[str, float]:
    """Seconds that each of a program's demands takes at the chip's peak; the largest is a lower bound.

    Args:
        flops, bytes_accessed, collective_bytes: of one device, see `utils.hlo.Cost`.

    Returns:
        {"compute", "memory", "links"}: seconds.
    """
    return {
        "compute": flops / chip.flops,
        "memory": bytes_accessed / chip.bandwidth,
        "links": collective_bytes / chip.links,
    }
