"""Search for the cheapest mesh, batch and rematerialisation with which a job fits on a topology."""

import dataclasses
import itertools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.llama.layout import param_axes
from models.llama.model import REMATS, init_params
from trainers.planning.chips import Chip, Topology, roofline
from trainers.planning.estimate import estimate_job
from trainers.planning.job import Job, Program
from utils import sharding
from utils.errors import ConfigError

_COMPILES = 4


class Candidate(NamedTuple):
    """One way to run a job, with its estimate."""

    job: Job
    mesh: dict[str, int]
    seconds_per_token: float
    peak_bytes: int


ProgramsOf = Callable[[Job, Topology, dict[str, int]], list[Program]]


def search_job(
    job: Job, topologies: Sequence[Topology], programs_of: ProgramsOf
) -> tuple[Job, Topology, dict[str, int], list[Program]]:
    """(job, topology, mesh, programs) of the first topology that the job fits on, in the cheapest way.

    All ways are estimated; those with the fewest seconds per token are compiled until one fits.

    Args:
        job: its batch is the largest that is tried.
        topologies: where it may run, in order.
        programs_of: compiles, or estimates where it cannot.

    Raises:
        ConfigError: nothing fits.
    """
    for topology in topologies:
        limit, wrong = topology.chip.memory_bytes, 1.0
        ways = sorted(_candidates(job, topology), key=_cost)
        for _ in range(_COMPILES):
            way = next((way for way in ways if way.peak_bytes * wrong <= limit), None)
            if way is None:
                break
            programs = programs_of(way.job, topology, way.mesh)
            peak = max(program.peak_bytes for program in programs)
            if peak <= limit:
                return way.job, topology, way.mesh, programs
            wrong = max(peak, limit * 1.05) / way.peak_bytes  # how far off the estimates are
    names = ", ".join(topology.name for topology in topologies)
    raise ConfigError(
        f"--search: no mesh, batch and remat of {job.kind} fits {names}; pass a larger topology, "
        "--param_dtype bfloat16, --state_dtype bfloat16, --optimizer adafactor or --job lora"
    )


def _cost(way: Candidate) -> tuple[int, bool, int]:
    """Sort key: seconds per token, rounded to 1 %; ties go to the largest batch or, among jobs with
    micro-batches, to the smallest.
    """
    cut = way.job.micro_batch_size is not None
    steps = round(math.log(way.seconds_per_token) / math.log(1.01))
    return steps, cut, way.job.batch if cut else -way.job.batch


def _candidates(job: Job, topology: Topology) -> Iterator[Candidate]:
    chip = topology.chip
    for mesh in _meshes(job, topology.n_chips):
        rows = mesh["data"] * (mesh["fsdp"] if job.trains else 1)
        for remat, micro in itertools.product(*_ways(job)):
            batch = rows * job.samples_a_prompt
            while batch <= job.batch:
                way = dataclasses.replace(job, batch=batch, remat=remat, micro_batch_size=micro)
                programs = estimate_job(way, mesh)
                seconds = sum(program.runs * _seconds(program, chip) for program in programs)
                peak = max(program.peak_bytes for program in programs)
                yield Candidate(way, mesh, seconds / way.tokens, peak)
                batch *= 2


def _ways(job: Job) -> tuple[Sequence[str], Sequence[int | None]]:
    """(rematerialisations, micro-batch sizes) to try; None computes the whole batch at once."""
    if not job.trains:
        return (job.remat,), (None,)
    if job.micro_batch_size is not None:
        return REMATS, (job.micro_batch_size,)
    n = job.samples_a_prompt
    return REMATS, (None, *(part for part in range(n, 0, -1) if n % part == 0))


def _seconds(program: Program, chip: Chip) -> float:
    """Lower bound on one run's seconds. All-gathers overlap with compute; all-reduces do not."""
    cost, reduced = program.cost, program.cost.collectives.get("all-reduce", 0)
    gathered = cost.collective_bytes - reduced
    bounds = roofline(chip, cost.flops, cost.bytes_accessed, gathered)
    return max(bounds.values()) + reduced / (chip.links_gb_per_s * 1e9)


def _meshes(job: Job, n_chips: int) -> Iterator[dict[str, int]]:
    """All meshes that divide the model's parameters."""
    params = jax.eval_shape(lambda: init_params(job.model, jax.random.key(0), jnp.bfloat16))
    rules = [sharding.TRAINING] * job.trains + [sharding.DECODING] * job.samples
    sides = [n for n in range(1, n_chips + 1) if n_chips % n == 0]
    # The first of several that cost the same is taken: rows are cut only where it helps.
    for context, fsdp, tensor in itertools.product(sides, repeat=3):
        data, rest = divmod(n_chips, fsdp * context * tensor)
        if rest or context > 1 and not _meets(job, context, tensor):
            continue
        mesh = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
        try:
            for rule in rules:
                like = types.SimpleNamespace(shape=mesh)
                sharding.param_specs(params, param_axes(job.model), rule, like)
        except ConfigError:
            continue
        yield mesh


def _meets(job: Job, context: int, tensor: int) -> bool:
    """Whether a training step's tokens and heads can be shared by these axes."""
    lengths = (job.prompt_len, job.length) if job.samples else (job.seq,)
    whole = all(length % context == 0 for length in lengths)
    return job.trains and whole and job.model.n_heads % (context * tensor) == 0
