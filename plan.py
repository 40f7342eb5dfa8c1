"""Plans what fits where, before it is rented: `python plan.py --model llama-3.1-8b --topology v5e:4x8 …`."""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import importlib.util
import json as jsonlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from trainers.planning.chips import Topology, parse_topologies, roofline
from trainers.planning.compile import compile_job
from trainers.planning.estimate import estimate_job
from trainers.planning.job import Job, Program
from trainers.planning.search import search_job
from utils.console import cli
from utils.fields import Config, field
from utils.memory import human
from utils.sharding import default_mesh, make_mesh, mesh_sizes

DOES_NOT_FIT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFlags(Config):
    """Where a job is planned for, and how."""

    topology: tuple[Topology, ...] = field(
        help="kind of chip and how many: v5e:4x8, v5p:4x4x4, h100:8; with --search the kind alone "
        "stands for all its slices, and the smallest that fits is found",
        parse=parse_topologies,
    )
    mesh: str | None = field(
        None,
        "fsdp=16,tensor=2 for example, or fsdp=4,context=8 for long rows; default: train.py's, for "
        "generate tensor=-1",
    )
    search: bool = field(
        False,
        "find the cheapest mesh, batch, micro-batches and remat that fit; --batch is the largest tried",
    )
    estimate: bool = field(False, "use closed forms instead of compiling")
    exact: bool = field(
        False,
        "compile training and prefill as a run does, which takes minutes: only then the bytes that they "
        "move are known; the default, a faster compilation, finds the same memory within a few percent",
    )
    json: bool = field(False, "print one JSON object instead of tables")

    def problems(self) -> list[str]:
        """Problems with the values, one text each."""
        bad = super().problems()
        if not bad and not self.search and len(self.topology) > 1:
            kind = self.topology[0].kind
            bad.append(f"topology={kind!r} is a kind of chip; pass how many too, or --search")
        return bad


def main(job: Job, plan: PlanFlags) -> None:
    """Reports what a job needs of each device, and the least time and money that a step of it can take.

    Compiles the real steps for TPUs, without owning one (needs the extra `tpu`); for GPUs, and without
    that extra, estimates by closed forms. Exits with 0 if the job fits, with 1 if it does not.

    Example: python plan.py --model llama-3.1-8b --topology v5e:4x8 --batch 32 --remat block
    """
    os.environ.update(cli.NO_TPU | dict(os.environ))
    jax.config.update("jax_platforms", "cpu")
    cli.Signals()
    where = plan.topology[-1]
    if job.batch is None:  # one prompt or row per device; a search goes further
        rows = where.n_chips * job.samples_a_prompt * (64 if plan.search else 1)
        job = dataclasses.replace(job, batch=rows)
    compiles = where.is_tpu and not plan.estimate
    compiles = compiles and importlib.util.find_spec("libtpu") is not None

    def programs_of(job: Job, where: Topology, sizes: dict[str, int]) -> list[Program]:
        if not compiles:
            return estimate_job(job, sizes)
        with cli.busy(f"compiling for {where.name}") as status:
            mesh = make_mesh(sizes, where.tpu_devices())
            # Without a terminal there is no status.
            return compile_job(
                job,
                mesh,
                plan.exact,
                lambda name: status and status.update(f"[dim]compiling the {name}[/]"),
            )

    if plan.search:
        job, where, sizes, programs = search_job(job, plan.topology, programs_of)
    else:
        default = default_mesh(job.model, where.n_chips) if job.trains else "tensor=-1"
        sizes = mesh_sizes(plan.mesh or default, where.n_chips)
        job.check_shared(sizes)
        programs = programs_of(job, where, sizes)
    summary = Summary(job=job, topology=where, mesh=sizes, programs=programs)
    cli.write(jsonlib.dumps(summary.json()) + "\n" if plan.json else summary.text())
    if not summary.fits:
        sys.exit(DOES_NOT_FIT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Findings about a job; bytes, FLOPs and seconds are per device and step."""

    job: Job
    topology: Topology
    mesh: dict[str, int]
    programs: list[Program]

    @property
    def peak_bytes(self) -> int:
        """Bytes of the fullest program."""
        return max(program.peak_bytes for program in self.programs)

    @property
    def fits(self) -> bool:
        """Whether a device can hold it."""
        return self.peak_bytes <= self.topology.chip.memory_bytes

    @property
    def seconds(self) -> float:
        """A lower bound of the seconds per step."""
        return sum(max(self.bounds(p).values()) * p.runs for p in self.programs)

    @property
    def price(self) -> float | None:
        """A lower bound of the dollars per step, where the chip's price is known."""
        price = self.topology.chip.price
        return price and price * self.topology.n_chips * self.seconds / 3600

    @property
    def compile_seconds(self) -> float | None:
        """None: nothing was compiled."""
        seconds = [p.compile_seconds for p in self.programs if p.compile_seconds is not None]
        return sum(seconds) if seconds else None

    def bounds(self, program: Program) -> dict[str, float]:
        """Seconds that a run takes at least for each demand; memory's only if the bytes moved are known."""
        cost = program.cost
        found = roofline(self.topology.chip, cost.flops, cost.bytes_accessed, cost.collective_bytes)
        return {name: s for name, s in found.items() if not (program.hurried and name == "memory")}

    def total(self, attribute: str) -> float:
        """A cost per step: over all runs of all programs."""
        return sum(p.runs * getattr(p.cost, attribute) for p in self.programs)

    def json(self) -> dict[str, Any]:
        """All numbers, as one JSON object."""
        worst, job = max(self.programs, key=lambda program: program.peak_bytes), self.job
        named = ("kind", "batch", "micro_batch_size", "seq", "remat")
        return {
            "fits": self.fits,
            "spare_bytes": int(self.topology.chip.memory_bytes) - self.peak_bytes,
            "topology": self.topology.name,
            "mesh": self.mesh,
            "job": {name: getattr(job, name) for name in named},
            "compiled": self.compile_seconds is not None,
            "argument_bytes": worst.argument_bytes,
            "temp_bytes": worst.temp_bytes,
            "reserved_bytes": worst.reserved_bytes,
            "peak_bytes": worst.peak_bytes,
            "flops": self.total("flops"),
            "bytes_accessed": self.total("bytes_accessed"),
            "collective_bytes": self.total("collective_bytes"),
            "roofline_seconds": self.seconds,
            "tokens_per_second": job.tokens / self.seconds,
            "dollars_per_step": self.price,
            "compile_seconds": self.compile_seconds,
            "programs": [
                {
                    "name": program.name,
                    "runs": program.runs,
                    "parts": program.parts,
                    "peak_bytes": program.peak_bytes,
                    "flops": program.cost.flops,
                    "bytes_accessed": program.cost.bytes_accessed,
                    "collectives": program.cost.collectives,
                    "bounds": self.bounds(program),
                    "bound_by": max(bounds := self.bounds(program), key=bounds.get),
                    "compile_seconds": program.compile_seconds,
                    "hurried": program.hurried,
                }
                for program in self.programs
            ],
        }

    def rows(self) -> Iterator[list[str] | None]:
        """The table's rows: memory by parts, the cost of a run, and its bounds; None is a line."""

        def row(title: str, cell: Callable[[Program], str]) -> list[str]:
            return [title, *map(cell, self.programs)]

        for part in dict.fromkeys(part for p in self.programs for part in p.parts):
            yield row(part, lambda p: human(p.parts.get(part, 0)))
        yield row("total at peak", lambda p: human(p.peak_bytes))
        yield None
        yield row("FLOPs", lambda p: f"{p.cost.flops:.3g}")
        yield row("bytes moved", lambda p: "up to " * p.hurried + human(p.cost.bytes_accessed))
        for kind in sorted({kind for p in self.programs for kind in p.cost.collectives}):
            yield row(f"{kind}, sent", lambda p: human(p.cost.collectives.get(kind, 0)))
        yield None
        for bound in ("compute", "memory", "links"):
            found = [self.bounds(p).get(bound) for p in self.programs]
            cells = ("needs --exact" if s is None else f"{s * 1e3:.4g} ms" for s in found)
            yield [f"{bound} bound", *cells]
        yield row("calls per step", lambda p: str(p.runs))

    def text(self) -> str:
        """The numbers as a table, between what was asked and the verdict."""
        job, spare = self.job, int(self.topology.chip.memory_bytes) - self.peak_bytes
        axes = ",".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1)
        micro = job.micro_batch_size
        at_once = "" if micro is None else f", micro_batch_size {micro}"
        asked = f"{job.kind} of {job.batch} x {job.seq} tokens, remat {job.remat}{at_once}"
        heads = ["per device", *(program.name for program in self.programs)]
        verdict = (
            f"fits, {human(spare)} to spare" if self.fits else f"does not fit, by {human(-spare)}"
        )
        source = "estimated, not compiled"
        if self.compile_seconds is not None:
            source = f"compiled in {self.compile_seconds:.0f} s"
        step = "A step" if job.trains else "Generating the batch"
        price = "" if self.price is None else f" and costs ${self.price:.3g}"
        return (
            f"{self.topology.name} ({axes or 'one device'}): {asked}\n"
            f"{cli.table(heads, self.rows())}{verdict} ({source}). {step} takes at least "
            f"{self.seconds:.3g} s{price}: at most {job.tokens / self.seconds:,.0f} tokens/s\n"
        )


if __name__ == "__main__":
    cli.run(main)
