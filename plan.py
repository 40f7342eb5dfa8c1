"""What fits where, before it is rented: `python plan.py --model llama-3.1-8b --topology v5e:4x8 …`."""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib.util
import io
import json as jsonlib
import os
import sys
from typing import Any

import jax
import rich.console
import rich.table
from jax.experimental import topologies

from trainers.planning.chips import Topology, parse_topology, roofline, slices
from trainers.planning.estimate import estimate_job
from trainers.planning.compile import compile_job
from trainers.planning.job import Job, Program, model_config
from trainers.planning.search import search_job
from utils import cli
from utils.errors import ConfigError
from utils.memory import human
from utils.sharding import default_mesh, make_mesh, mesh_sizes

DOES_NOT_FIT = 1

_ENVIRONMENT = {
    # libtpu compiles without a TPU, and would look for one and for the others of its slice.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def main(
    model: str,
    topology: str,
    job: str = "sft",
    mesh: str | None = None,
    batch: int | None = None,
    seq: int = 2048,
    prompt_len: int | None = None,
    group_size: int = 8,
    micro_batch_size: int | None = None,
    lora_rank: int | None = None,
    remat: str = "dots",
    dtype: str = "bfloat16",
    param_dtype: str = "float32",
    state_dtype: str = "float32",
    optimizer: str = "adamw",
    search: bool = False,
    estimate: bool = False,
    exact: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """What a job needs of each device, and the least time and money that a step of it can take.

    Compiles the real steps for TPUs, also where there is none (needs the extra `tpu`); for GPUs, and
    without it, estimates by closed forms. Exits with 0 if the job fits, with 1 if it does not.

    Args:
        model: a known one by its name, as llama-3.1-8b, or a checkpoint or its config.json; weights are
            not needed.
        topology: a kind of chip and how many, as v5e:4x8, v5p:4x4x4 or h100:8. A search takes a kind
            alone too, and finds the smallest slice.
        job: sft, lora, grpo or generate.
        mesh: as fsdp=16,tensor=2, or fsdp=4,context=8 for long rows; default: that of train.py; for
            generate all on tensor.
        batch: rows a step; for grpo completions. Default: one a device.
        seq: tokens of a row, prompt and completion together.
        prompt_len: tokens of a prompt, for grpo and generate; default: a quarter of seq.
        group_size: completions a prompt, for grpo.
        micro_batch_size: rows or completions computed at once, as in train.py, a row a device at least;
            default: all.
        lora_rank: of adapters; default: 16 for lora, else none.
        remat: what the backward pass computes again: none, dots or block.
        dtype: of activations.
        param_dtype: of the trained parameters.
        state_dtype: of the optimizer's first moments.
        optimizer: adamw, adafactor, lion or muon.
        search: find the cheapest mesh, batch, micro-batches and remat that fit; batch is then the most
            rows tried.
        estimate: do not compile.
        exact: compile training and prefill as a run does, in minutes: how many bytes they move is
            known only then. Otherwise in a hurry, with the same memory within a few percent.
        json: one JSON object instead of tables.
        debug: show the traceback of an error.
    """
    os.environ.update(_ENVIRONMENT | dict(os.environ))
    jax.config.update("jax_platforms", "cpu")
    cli.Signals()
    everywhere = search and ":" not in topology
    config, places = cli.all_of(
        lambda: model_config(model),
        lambda: slices(topology) if everywhere else [parse_topology(topology)],
    )
    where = places[-1]
    if job == "generate":
        mesh = mesh or "tensor=-1"
    wanted = Job(
        model=config,
        kind=job,
        batch=_rows(where.n_chips, job, group_size, search) if batch is None else batch,
        seq=seq,
        prompt_len=prompt_len,
        group_size=group_size,
        micro_batch_size=micro_batch_size,
        lora_rank=lora_rank,
        remat=remat,
        dtype=dtype,
        param_dtype=param_dtype,
        state_dtype=state_dtype,
        optimizer=optimizer,
    )
    compiles = where.chip.tpu and not estimate and importlib.util.find_spec("libtpu") is not None

    def programs_of(wanted: Job, where: Topology, sizes: dict[str, int]) -> list[Program]:
        if not compiles:
            return estimate_job(wanted, sizes)
        with cli.busy(f"compiling for {where.name}") as status:
            # On no terminal there is no status.
            say = lambda what: status and status.update(f"[dim]compiling the {what}[/]")
            return compile_job(wanted, make_mesh(sizes, tpu_devices(where)), exact, say)

    if search:
        wanted, where, sizes, programs = search_job(wanted, places, programs_of)
    else:
        sizes = mesh_sizes(mesh or default_mesh(config, where.n_chips), where.n_chips)
        wanted.check_shared(sizes)
        programs = programs_of(wanted, where, sizes)
    found = summary(wanted, where, sizes, programs)
    cli.write(jsonlib.dumps(found) + "\n" if json else report(found))
    if not found["fits"]:
        sys.exit(DOES_NOT_FIT)


def _rows(n_chips: int, job: str, group_size: int, search: bool) -> int:
    """One prompt or row a device; a search goes further."""
    return n_chips * (group_size if job == "grpo" else 1) * (64 if search else 1)


def tpu_devices(topology: Topology) -> list[Any]:
    """The devices of a topology that need not be there. Raises ConfigError if libtpu has none such."""
    sides = (*topology.grid, 1)[:3]
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}
    if topology.n_chips < 4:
        options["chips_per_host_bounds"] = sides
    try:
        return topologies.get_topology_desc(topology.name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as e:
        reason = str(e).partition("\n")[0]
        raise ConfigError(f"--topology {topology.name}: libtpu has none such: {reason}") from e


def summary(
    job: Job, topology: Topology, mesh: dict[str, int], programs: list[Program]
) -> dict[str, Any]:
    """All that is found, as one JSON object; bytes, FLOPs and seconds are of one device and step."""
    chip, worst = topology.chip, max(programs, key=lambda program: program.peak_bytes)
    rows = []
    for program in programs:
        cost = program.cost
        bounds = roofline(chip, cost.flops, cost.bytes_accessed, cost.collective_bytes)
        if program.hurried:
            del bounds["memory"]
        rows.append(
            {
                "name": program.name,
                "runs": program.runs,
                "parts": program.parts,
                "peak_bytes": program.peak_bytes,
                "flops": cost.flops,
                "bytes_accessed": cost.bytes_accessed,
                "collectives": cost.collectives,
                "bounds": bounds,
                "bound_by": max(bounds, key=bounds.get),
                "compile_seconds": program.compile_seconds,
                "hurried": program.hurried,
            }
        )
    total = lambda value: sum(row["runs"] * value(row) for row in rows)
    seconds = total(lambda row: max(row["bounds"].values()))
    price = chip.price and chip.price * topology.n_chips * seconds / 3600
    compiled = [p.compile_seconds for p in programs if p.compile_seconds is not None]
    return {
        "fits": worst.peak_bytes <= chip.memory_bytes,
        "spare_bytes": int(chip.memory_bytes) - worst.peak_bytes,
        "topology": topology.name,
        "mesh": mesh,
        "job": {
            name: getattr(job, name)
            for name in ("kind", "batch", "micro_batch_size", "seq", "remat")
        },
        "compiled": bool(compiled),
        "argument_bytes": worst.argument_bytes,
        "temp_bytes": worst.temp_bytes,
        "reserved_bytes": worst.reserved_bytes,
        "peak_bytes": worst.peak_bytes,
        "flops": total(lambda row: row["flops"]),
        "bytes_accessed": total(lambda row: row["bytes_accessed"]),
        "collective_bytes": total(lambda row: sum(row["collectives"].values())),
        "roofline_seconds": seconds,
        "tokens_per_second": job.tokens / seconds,
        "dollars_per_step": price,
        "compile_seconds": sum(compiled) if compiled else None,
        "programs": rows,
    }


def report(found: dict[str, Any]) -> str:
    """The same as tables."""
    rows, job = found["programs"], found["job"]
    axes = ",".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
    micro = job["micro_batch_size"]
    at_once = "" if micro is None else f", micro_batch_size {micro}"
    how = f"{job['kind']} of {job['batch']} x {job['seq']} tokens, remat {job['remat']}{at_once}"
    title = f"{found['topology']} ({axes or 'one device'}): {how}"
    memory = rich.table.Table()
    memory.add_column("of one device")
    for row in rows:
        memory.add_column(row["name"], justify="right")
    for part in dict.fromkeys(part for row in rows for part in row["parts"]):
        memory.add_row(part, *(human(row["parts"].get(part, 0)) for row in rows))
    memory.add_row("all at once", *(human(row["peak_bytes"]) for row in rows), style="bold")
    memory.add_section()
    memory.add_row("FLOPs", *(f"{row['flops']:.3g}" for row in rows))
    at_most = lambda row: "up to " * row["hurried"] + human(row["bytes_accessed"])
    memory.add_row("bytes moved", *map(at_most, rows))
    for kind in sorted({kind for row in rows for kind in row["collectives"]}):
        memory.add_row(f"{kind}, sent", *(human(row["collectives"].get(kind, 0)) for row in rows))
    memory.add_section()
    for bound in ("compute", "memory", "links"):
        found_by = [row["bounds"].get(bound) for row in rows]
        cells = ["--exact" if s is None else f"{s * 1e3:.4g} ms" for s in found_by]
        memory.add_row(f"at least, for {bound}", *cells)
    memory.add_row("times a step", *(str(row["runs"]) for row in rows))
    page = rich.console.Console(file=io.StringIO(), width=40 + 20 * len(rows), markup=False)
    page.print(memory)
    spare, seconds = found["spare_bytes"], found["roofline_seconds"]
    price = found["dollars_per_step"]
    verdict = (
        f"fits, {human(spare)} to spare" if found["fits"] else f"does not fit, by {human(-spare)}"
    )
    money = "" if price is None else f", ${price:.3g}"
    source = (
        f"compiled in {found['compile_seconds']:.0f} s"
        if found["compiled"]
        else "estimated, not compiled"
    )
    return (
        f"{title}\n{page.file.getvalue()}{verdict} ({source}). A step takes {seconds:.3g} s at least: "
        f"{found['tokens_per_second']:,.0f} tokens/s at most{money}\n"
    )


if __name__ == "__main__":
    cli.run(main)
