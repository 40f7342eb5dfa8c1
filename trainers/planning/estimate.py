"""Programs of a job by closed forms, without compiling: memory, FLOPs and bytes moved and sent.

Compared with the 25 compiled jobs of `trainers.planning.phases`, FLOPs are the same (Muon's 3 % more).
Bytes sent agree too, except where XLA's own cost model picks another schedule: a ring of n may take
n + 1 hops instead of n - 1 (rings of four: a quarter more in all), and on v5p 64 devices with 128
columns each gathered by adding up whole matrices, at twice the bytes. Bytes moved are those that must
be, half of what programs move.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from trainers.planning.hlo import Cost
from trainers.planning.job import Job, Program, without_zeros
from trainers.planning.phases import (
    F32,
    ONE_DEVICE,
    Phase,
    Sampling,
    Sizes,
    Step,
    StepOnCPU,
    reduced,
)
from trainers.rollout import RolloutConfig
from trainers.trainer import Trainer
from utils import sharding
from utils.cross_entropy import chunk_size
from utils.errors import ArtifactError
from utils.memory import available_bytes, human, memory_bytes, params_bytes

# A job's closed form is right to 6 %.
_MARGIN = 1.1

_LARGEST_CHUNK = 1 << 13  # tokens

# On a CPU, where they share the memory: programs, and what compiling them leaves behind. Measured 200 to
# 360 MB, of 12 to 30 layers, with and without sampling and adapters (x86-64, jax 0.10).
_PROGRAMS = 350 * 10**6


def estimate_job(job: Job, mesh: Mapping[str, int] | None) -> list[Program]:
    """The programs of a job.

    Args:
        job: what is planned.
        mesh: sizes of data, fsdp, context and tensor, of accelerators; None: this machine's CPU, where
            a cache is in float32 and all devices share the memory.
    """
    stays, programs = {}, []
    if job.trains:
        step = StepOnCPU(job) if mesh is None else Step(job, mesh)
        given = step.stays | {"batch": step.batch_bytes}
        programs = [_program("train step", 1, given, step.phases(), _train(step))]
        stays = step.stays  # stays in memory while the job samples, although no argument
    if job.samples:
        s = Sampling(job, mesh or ONE_DEVICE, "float32" if mesh is None else job.dtype)
        given = s.given | {"KV cache": s.cache(s.prompts)}
        prefill = _program("prefill", 1, given, s.prefill(), _prefill(s), stays)
        given, runs = s.given | {"KV cache": s.cache(s.rows)}, job.length - 1
        decode = _program("decode step", runs, given, s.decode(), _decode(s), stays)
        programs = [prefill, decode, *programs]
    return programs


def _program(
    name: str,
    runs: int,
    given: dict[str, int],
    phases: list[Phase],
    cost: Cost,
    beside: Mapping[str, int] = {},
) -> Program:
    """A program that holds its fullest phase next to what it is given; `beside` is no argument."""
    held = max(phases, key=lambda phase: phase.bytes)
    return Program(
        name=name,
        runs=runs,
        parts=without_zeros({**beside, **given, **held.parts}),
        argument_bytes=sum(given.values()),
        temp_bytes=int(held.bytes) - held.parts.get("results", 0),
        cost=cost,
    )


def _cost(flops: float, moved: float, sent: Mapping[str, float]) -> Cost:
    return Cost(
        flops=float(flops),
        bytes_accessed=float(moved),
        collectives={kind: n for kind, n in sent.items() if n},
        kernels={},
        open_loops=(),
    )


def _prefill(s: Sampling) -> Cost:
    model = s.model
    flops = 2 * s.tokens * s.matrices + 2 * s.prompts * s.head
    flops += 2 * model.n_layers * s.tokens * s.job.prompt_len * s.q_dim
    moved = s.frozen() + 6 * model.n_layers * (s.tokens * model.dim + s.wide) * s.size
    return _cost(flops / s.parts, moved, _sent_sampling(s, s.tokens, s.prompts))


def _decode(s: Sampling) -> Cost:
    flops = 2 * s.rows * (s.matrices + s.head)
    flops += 4 * s.rows * s.slots * s.model.n_layers * s.q_dim
    moved = s.frozen() + s.cache(s.rows)
    return _cost(flops / s.parts, moved, _sent_sampling(s, s.rows, s.rows))


def _sent_sampling(s: Sampling, tokens: int, rows: int) -> dict[str, float]:
    """Results of attention and feed-forward are added up; logits go to those who sample the rows."""
    return {
        "all-reduce": _row_sums(s, tokens, s.parts, 2),
        "all-to-all": s.logits(rows) * (1 - 1 / s.parts),
    }


def _row_sums(sizes: Sizes, tokens: int, parts: int, times: int) -> float:
    """Bytes sent to add up tokens' results in float32, `times` per layer."""
    return times * sizes.model.n_layers * reduced(tokens * sizes.model.dim * F32, parts)


def _train(step: Step) -> Cost:
    # Weights in each pass (forward, and both products of the backward one), activations, the state.
    passes = 3 + (step.job.remat == "block")
    weights = (step.matrices + step.head) // step.tensor * step.size
    moved = passes * (weights + step.model.n_layers * step.saved("none"))
    moved = step.micro * moved + 2 * sum(step.stays.values())
    return _cost(_train_flops(step), moved, _train_sent(step))


def _train_flops(step: Step) -> float:
    """FLOPs of matrix products and attention kernels."""
    job, model, lora = step.job, step.model, bool(step.job.lora_rank)
    again = job.remat == "block"
    down = model.n_layers * model.dim * model.ffn_dim  # its product is not needed again
    layers = (4 if lora else 6) * step.matrices + 2 * again * (step.matrices - down)
    sides = sum(sum(step.shapes[name]) for name in job.lora_targets)
    layers += (6 + 2 * again) * model.n_layers * job.lora_rank * sides
    # GRPO computes logits again: the gradient of a log-prob is known only after all of them.
    head = ((4 if lora else 6) + 2 * job.samples) * step.head
    # Products of all pairs, half of which are seen: two forward; backward seven in two kernels, both of
    # which compute the scores again.
    attention = (2 + 2 * again + 7) * step.seen * step.q_dim * model.n_layers
    total = step.tokens * layers + step.targets * head + attention
    return step.micro * total / step.tensor + step.muon().flops


def _train_sent(step: Step) -> dict[str, float]:
    """Bytes that a device sends, by kind; sums are in float32."""
    job, D = step.job, step.model.dim
    lora, micro, f = bool(job.lora_rank), step.micro, step.fsdp
    others = 1 - 1 / f
    layers, head = step.matrices // step.tensor, step.head // step.tensor
    # Each layer's matrices for the forward and for the backward pass.
    gathered = 2 * others * layers * step.size
    # A chunk's hidden states go to all that share the vocabulary, their gradients come back.
    gathered += (1 + job.samples) * (f - 1) * step.targets * D * step.size
    added = 0 if lora else others * layers * F32
    added += (f - 1) * step.targets * D * F32
    exchanged = (1 if lora else 2) * others * step.tokens * D * step.size
    to_meet, gathered_to_meet = _train_sent_to_meet(step)
    exchanged, gathered = exchanged + to_meet, gathered + gathered_to_meet
    if lora:
        exchanged += others * head // f * step.size
        sums = reduced(step.adapters * F32, step.data * f)
    else:
        exchanged += 2 * others * head // f * step.param_size
        copied = (layers + head) // f * F32 + head // f * step.param_size
        sums = reduced(copied, step.data)
    if step.tensor > 1:  # o and down; backward q, k, v as one, gate, up as one; o again
        sums += _row_sums(step, step.tokens, step.tensor, 4 + (job.remat == "block"))
        sums += reduced(step.targets * D * F32 + step.tokens * D * step.size, step.tensor)
    return {
        "all-gather": micro * gathered,
        "reduce-scatter": micro * added,
        "all-to-all": micro * exchanged,
        "all-reduce": micro * sums + step.muon().sent,
    }


def _train_sent_to_meet(step: Step) -> tuple[float, float]:
    """Bytes (exchanged, gathered) for a row's tokens to meet in attention: queries, keys, values,
    results, and their gradients.
    """
    met = step.tokens * step.model.n_layers * step.size // step.tensor
    again, away = step.job.remat == "block", 1 - 1 / step.context
    exchanged = (2 + again) * away * 2 * step.q_dim * met
    if step.model.n_kv_heads % (step.context * step.tensor) == 0:
        return exchanged + (2 + again) * away * 2 * step.kv_dim * met, 0
    # Several devices need the same keys and values: all go to all.
    exchanged += away * 2 * step.q_dim * met
    return exchanged, (1 + again) * (step.context - 1) * 2 * step.kv_dim * met


def sft_bytes(
    trainer: Trainer, rows: int, seq_len: int, quantize: str | None = None
) -> dict[str, int]:
    """Bytes of supervised training by parts, at its peak: of this machine's memory, or of each accelerator's.

    Args:
        trainer: the trainer.
        rows: of a batch.
        seq_len: tokens of the longest row.
        quantize: "int8" for a frozen base in eight bits.
    """
    shape = dict(kind="sft" if trainer.lora is None else "lora", batch=rows, seq=seq_len)
    return _peak_parts(trainer, trainer.config.micro_batch_size, quantize=quantize, **shape)


def grpo_bytes(
    trainer: Trainer,
    rollout: RolloutConfig,
    prompt_len: int,
    rows_at_once: int | None,
    quantize: str | None = None,
) -> dict[str, int]:
    """The same for GRPO: of a step, or of a rollout next to all that a step starts from.

    Args:
        trainer: the trainer.
        rollout: what is sampled.
        prompt_len: tokens of the longest prompt.
        rows_at_once: rows of a micro-batch, as asked for: a mesh may make them more.
        quantize: see `sft_bytes`.
    """
    return _peak_parts(
        trainer,
        rows_at_once and rows_at_once * (rollout.branches or rollout.group_size),
        kind="grpo",
        batch=rollout.prompts_per_step * rollout.group_size,
        seq=prompt_len + trainer.config.max_completion_len,
        prompt_len=prompt_len,
        group_size=rollout.group_size,
        quantize=quantize,
    )


def teacher_bytes(trainer: Trainer, quantize: str | None) -> dict[str, int]:
    """Bytes that a trainer's teacher adds: its parameters, and two more arrays of a chunk's logits.

    Compared with compiled steps on a CPU, what it adds is right to 3 % of the step.
    """
    model, dtype = trainer.teacher.config, jnp.dtype(trainer.model.dtype).name
    on_mesh = sharding.current_mesh() is not None and jax.default_backend() != "cpu"
    mesh = sharding.current_mesh().shape if on_mesh else ONE_DEVICE
    sizes = Sizes(Job(model=model, kind="generate", seq=2, dtype=dtype, quantize=quantize), mesh)
    vocab = model.vocab_size // sizes.parts
    logits = 2 * chunk_size(_LARGEST_CHUNK, vocab) * vocab * F32
    head = 0 if quantize is None else sizes.head // sizes.parts * F32  # in float32 for the product
    return {"teacher": sizes.frozen(), "logits of both": logits + head}


def _peak_parts(trainer: Trainer, micro_batch_size: int | None, **shape) -> dict[str, int]:
    """The parts of the fullest program of a trainer's job, on this machine or the context mesh."""
    config, lora, model = trainer.config, trainer.lora, trainer.model.config
    context = max(model.max_seq_len, shape["seq"])  # rows may be longer, with a warning
    job = Job(
        model=dataclasses.replace(model, max_seq_len=context),
        micro_batch_size=micro_batch_size,
        lora_rank=0 if lora is None else lora.rank,
        remat=trainer.model.remat,
        dtype=jnp.dtype(trainer.model.dtype).name,
        param_dtype=config.param_dtype,
        state_dtype=config.state_dtype,
        optimizer=config.optimizer,
        **({} if lora is None else {"lora_targets": lora.targets}),
        **shape,
    )
    mesh = sharding.current_mesh()
    sizes = ONE_DEVICE if mesh is None else mesh.shape
    on_cpu, reference = jax.default_backend() == "cpu", {}
    programs = estimate_job(job, None if on_cpu else sizes)
    if config.needs_reference and lora is None:
        parts = 1 if on_cpu else sharding.axis_size(sharding.DECODING.heads)
        reference["reference"] = params_bytes(model.n_params, jnp.dtype(job.dtype)) // parts
    return reference | max(programs, key=lambda program: program.peak_bytes).parts


def check_memory(parts: dict[str, int], say: Callable[[str], None], *, saved: int = 0) -> None:
    """Says what a run will hold at its fullest. Raises ArtifactError if that does not fit.

    A save copies the state to the host's memory and writes it while the next steps run.

    Args:
        parts: of a step, from `sft_bytes` or `grpo_bytes`.
        say: is told the line.
        saved: bytes of that copy.
    """
    mesh, free, own = sharding.current_mesh(), available_bytes(), 0
    if on_cpu := jax.default_backend() == "cpu":
        limit, own = free, memory_bytes() or 0
        parts = parts | {"a save": saved, "compiled programs": _PROGRAMS, "this program": own}
    else:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if free is not None and free < saved:
            raise ArtifactError(
                f"out of memory: a save copies {human(saved)} to the host, and {human(free)} are "
                "available; try --lora_rank 16"
            )
    needed = human(sum(parts.values()))
    what = (
        "training"
        if on_cpu
        else "a step" + (f" on each of {mesh.size} devices" if mesh is not None else "")
    )
    listed = ", ".join(f"{name} {human(n)}" for name, n in without_zeros(parts).items())
    say(f"memory of {what}: {needed} ({listed})")
    # The program itself has its memory already.
    if limit is None or sum(parts.values()) - own <= limit * (1 if on_cpu else _MARGIN):
        return
    has = f"and {human(limit)} are available" if on_cpu else f"which has {human(limit)} per device"
    more = "" if on_cpu else ", or use more devices: plan.py --search finds what fits"
    raise ArtifactError(
        f"out of memory: {what} needs about {needed} ({listed}), {has}; try a smaller "
        f"--micro_batch_size, shorter rows, --remat block or --lora_rank 16{more}"
    )
