"""Published numbers of accelerators, and the least time that a program can take on one."""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from utils.errors import ConfigError


class Chip(NamedTuple):
    """One accelerator, as its maker describes it.

    Attributes:
        tflops: bfloat16 matrix products at peak, TFLOP/s.
        memory_bytes: size of the main memory.
        gb_per_s: bandwidth of the main memory, GB/s.
        links_gb_per_s: what it can send to others within a slice, all links together, GB/s.
        price: list price on demand, $ per hour; None: not listed per chip, as for GPUs.
    """

    tflops: float
    memory_bytes: float
    gb_per_s: float
    links_gb_per_s: float
    price: float | None = None


# TPUs: cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e}: peak bf16, HBM, its bandwidth, "interchip
# interconnect" in Gbit/s one way (the "bidirectional" GB/s there count both ways). Memory: what XLA
# lets a program use, which it names when one does not fit. Prices: cloud.google.com/tpu/pricing, on
# demand in US regions, as published in 2025.
# GPUs: NVIDIA's data sheets of the A100 80GB SXM and the H100 SXM: dense bf16; half of NVLink's total.
CHIPS = {
    "v4": Chip(275, 32 * 2**30, 1228, 2400 / 8, 3.22),
    "v5e": Chip(197, 15.75 * 2**30, 819, 1600 / 8, 1.20),
    "v5p": Chip(459, 95.74 * 2**30, 2765, 4800 / 8, 4.20),
    "v6e": Chip(918, 31.25 * 2**30, 1640, 3584 / 8, 2.70),
    "a100": Chip(312, 80e9, 2039, 300),
    "h100": Chip(989, 80e9, 3350, 450),
}


class Topology(NamedTuple):
    """Chips of one kind; TPUs form a grid.

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
        """The numbers of one of its chips."""
        return CHIPS[self.kind]

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles programs for it."""
        return self.kind.startswith("v")

    @property
    def n_chips(self) -> int:
        """The number of chips; a program sees each as one device."""
        return math.prod(self.grid)

    def tpu_devices(self) -> list[jax.Device]:
        """JAX devices of the slice, which need not be there. Raises ConfigError if libtpu does not know them."""
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
    topology = Topology(text, kind, tuple(map(int, sides.split("x"))))
    n_sides = SLICES[kind].split()[0].count("x") + 1
    if topology.is_tpu and len(topology.grid) != n_sides:
        raise ConfigError(f"topology {text!r:.40}: {kind} is a grid of {n_sides} sides")
    return topology


def roofline(
    chip: Chip, flops: float, bytes_accessed: float, collective_bytes: float
) -> dict[str, float]:
    """Seconds that each demand of a program takes at the chip's peak; the largest is a lower bound.

    Args:
        flops, bytes_accessed, collective_bytes: per device, see `trainers.planning.hlo.Cost`.

    Returns:
        {"compute", "memory", "links"}: seconds.
    """
    return {
        "compute": flops / (chip.tflops * 1e12),
        "memory": bytes_accessed / (chip.gb_per_s * 1e9),
        "links": collective_bytes / (chip.links_gb_per_s * 1e9),
    }
