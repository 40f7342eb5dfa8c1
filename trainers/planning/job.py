"""What a job asks of each device: its real steps, compiled for machines that need not be there."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

import sampling
from models.llama import decoding
from models.llama.config import ModelConfig
from models.llama.layout import decoding_axes, param_axes
from models.llama.lora import LoRAConfig
from models.llama.model import (
    REMATS,
    LLaMa,
    for_decoding,
    init_cache,
    init_params,
)
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.optimizer import DTYPES, OPTIMIZERS
from trainers.planning.estimate import estimate_job
from trainers.planning.hlo import Program, analyse
from trainers.planning.hlo_text import Array
from trainers.rollout import rows_at_once
from trainers.sft_trainer import SFTConfig, SFTTrainer
from trainers.trainer import Trainer
from utils import sharding
from utils.cross_entropy import chunk_size
from utils.errors import ConfigError, is_int, raise_all
from utils.kvcache import KVCache, bucket, buffer_spec

KINDS = ("sft", "lora", "grpo", "generate")

# Compiles a training step in a sixth of the time: the same collectives, FLOPs, and within a few percent
# the same memory, but arrays that could stay on the chip go to main memory and back.
_HURRY = {"exec_time_optimization_effort": -1.0}

# Programs of which a trainer's state is no argument: it is held beside them.
_SAMPLING = ("prefill", "decode step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned.

    Attributes:
        model: the model.
        kind: one of KINDS; lora is sft with adapters, and lora_rank makes grpo train adapters too.
        batch: rows of a step; for grpo completions.
        seq: tokens of a row, prompt and completion together.
        prompt_len: tokens of the prompt, for grpo and generate.
        group_size: completions a prompt, for grpo.
        micro_batch_size: rows whose gradients are computed at once, a row a device at least; for grpo
            completions, of fewer than a group each computes the prompt again. None: all.
        lora_rank: 0 trains all parameters.
        remat, dtype, param_dtype, state_dtype, optimizer: as in train.py.
    """

    model: ModelConfig
    kind: str
    batch: int
    seq: int
    prompt_len: int
    group_size: int = 8
    micro_batch_size: int | None = None
    lora_rank: int = 0
    remat: str = "dots"
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    state_dtype: str = "float32"
    optimizer: str = "adamw"

    def __post_init__(self):
        bad = []
        known = dict(kind=KINDS, remat=REMATS, dtype=DTYPES, param_dtype=DTYPES)
        known |= dict(state_dtype=DTYPES, optimizer=OPTIMIZERS)
        for name, values in known.items():
            if getattr(self, name) not in values:
                got = getattr(self, name)
                bad.append(f"{name}={got!r:.40}, expected one of {', '.join(values)}")
        for name, least in dict(batch=1, seq=2, prompt_len=1, group_size=1, lora_rank=0).items():
            if not is_int(getattr(self, name)) or getattr(self, name) < least:
                bad.append(f"{name}={getattr(self, name)!r:.40}, expected an integer from {least}")
        micro = self.micro_batch_size
        if micro is not None and not (is_int(micro) and micro >= 1):
            bad.append(f"micro_batch_size={micro!r:.40}, expected an integer from 1, or None")
        raise_all("plan", bad)
        if self.seq > self.model.max_seq_len:
            bad.append(f"seq={self.seq} exceeds the model's context of {self.model.max_seq_len}")
        if self.samples and self.prompt_len >= self.seq:
            bad.append(
                f"prompt_len={self.prompt_len} leaves no room for a completion in seq={self.seq}"
            )
        if self.kind == "grpo" and self.batch % self.group_size:
            bad.append(f"batch={self.batch} is not a multiple of group_size={self.group_size}")
        if self.kind == "lora" and not self.lora_rank:
            bad.append("lora_rank=0 for a lora job, expected an integer from 1")
        raise_all("plan", bad)

    @property
    def trains(self) -> bool:
        """Whether it has a training step."""
        return self.kind != "generate"

    @property
    def samples(self) -> bool:
        """Whether it generates."""
        return self.kind in ("grpo", "generate")

    @property
    def samples_a_prompt(self) -> int:
        """Completions that share a prefill."""
        return self.group_size if self.kind == "grpo" else 1

    @property
    def branches(self) -> int:
        """Completions in a row of a training step, which share the computation of their prompt."""
        return self._at_once[1] or self.samples_a_prompt

    @property
    def rows_at_once(self) -> int | None:
        """Rows of a micro-batch; None: all."""
        return self._at_once[0]

    @property
    def _at_once(self) -> tuple[int | None, int | None]:
        return rows_at_once(self.micro_batch_size, self.samples_a_prompt)

    @property
    def tokens(self) -> int:
        """Of a step: those that are trained on or generated."""
        return self.batch * (self.seq - self.prompt_len if self.samples else self.seq)


def check_shared(job: Job, mesh: Mapping[str, int]) -> None:
    """Raises ConfigError if a mesh of these sizes cannot share a training step's rows, as train.py does."""
    parts, rows = mesh["data"] * mesh["fsdp"], job.batch // job.branches
    if job.trains and rows % parts:
        of = f" of {job.branches} completions" * (job.kind == "grpo")
        raise ConfigError(
            f"batch={job.batch} is {rows} rows{of}, which data={mesh['data']} x fsdp={mesh['fsdp']} "
            f"devices cannot share; use a multiple of {parts * job.branches}"
        )


def compile_job(
    job: Job, mesh: Mesh, exact: bool = False, say: Callable[[str], Any] = lambda what: None
) -> list[Program]:
    """A job's programs, compiled.

    Args:
        job: what to plan.
        mesh: over the devices of a topology.
        exact: compile all as a run does. Otherwise training and prefill are compiled in a hurry.
        say: is told what is being compiled.

    Raises:
        ConfigError: the mesh does not divide the model.
    """
    with jax.set_mesh(mesh):
        one = _Compiler(job, mesh, exact, say)
        programs = one.sampling() if job.samples else []
        return programs + ([one.training()] if job.trains else [])


class _Compiler:
    """Compiles on a mesh on which nothing can run: all arrays are shapes."""

    def __init__(self, job: Job, mesh: Mesh, exact: bool, say: Callable[[str], Any]):
        self.job, self.mesh, self.exact, self.say = job, mesh, exact, say
        self.estimates = {program.name: program for program in estimate_job(job, mesh.shape)}
        self.stays: dict[str, int] = {}
        if job.trains:
            self.trainer = make_trainer(job)
            self.state, self.frozen = self._state()
            self.stays = {
                "parameters": _bytes(self.state.params),
                "frozen parameters": _bytes(self.frozen),
                "optimizer": _bytes(self.state.opt_state),
            }

    def training(self) -> Program:
        """The training step."""
        trainer, batch = self.trainer, self._batch()
        lower = lambda: type(trainer).train_step.lower(trainer, self.state, self.frozen, batch)
        return self._compiled("train step", lower, self.stays | {"batch": _bytes(batch)})[0]

    def sampling(self) -> list[Program]:
        """Prefill and a decode step, on parameters laid out for them."""
        job, n = self.job, self.job.samples_a_prompt
        prompts, dtype = job.batch // n, jnp.dtype(job.dtype)
        model, capacity = LLaMa(job.model), bucket(job.seq, 64)
        whole = jax.eval_shape(lambda key: init_params(job.model, key, dtype), _key())
        params = jax.eval_shape(for_decoding, whole)
        specs = sharding.specs(
            params, lambda: decoding_axes(param_axes(job.model)), sharding.DECODING
        )
        params = self._sharded(params, specs)
        ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        sampler = jax.eval_shape(lambda: sampling.traced(sampling.TopP()))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts))
        rules, batch, steps = self._everywhere(
            (
                decoding.Rules(sampler, ints(8), ints()),
                (ints(prompts, job.prompt_len), ints(prompts), ints(prompts), keys),
                ints(),
            )
        )
        cache = self._cache(prompts, capacity)
        held = self.stays | {"policy for sampling" if job.trains else "parameters": _bytes(params)}
        prefill, compiled = self._compiled(
            "prefill",
            lambda: decoding.prefill.lower(model, (n, capacity), params, rules, cache, batch),
            held | {"KV cache": _bytes(cache)},
        )
        if compiled is None:  # what does not fit here does not fit there
            return [prefill, self.estimates["decode step"]]
        results = jax.tree.leaves(compiled.out_info), jax.tree.leaves(compiled.output_shardings)
        leaves = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
            for x, where in zip(*results, strict=True)
        ]
        state = jax.tree.unflatten(jax.tree.structure(compiled.out_info), leaves)
        decode, _ = self._compiled(
            "decode step",
            lambda: decoding.decode.lower(model, params, rules, state, steps),
            held | {"KV cache": _bytes(state.cache)},
        )
        return [prefill, decode]

    def _state(self) -> tuple[Any, Any]:
        trainer, job = self.trainer, self.job
        dtype = jnp.dtype(job.dtype if trainer.keeps_frozen else job.param_dtype)
        init = lambda key: trainer.init(init_params(job.model, key, dtype), key)
        state, frozen = jax.eval_shape(init, _key())
        frozen_specs = trainer.model_specs(frozen) if frozen else {}
        return (
            self._sharded(state, trainer.state_specs(state)),
            self._sharded(frozen, frozen_specs),
        )

    def _batch(self) -> dict[str, Any]:
        job = self.job
        rows, length = job.batch // job.branches, job.seq - job.prompt_len
        if job.kind == "grpo":
            by_token, by_row = (rows, job.branches, length), (rows, job.branches)
            shapes = {
                "prompts": ((rows, job.prompt_len), jnp.int32),
                "prompt_lengths": ((rows,), jnp.int32),
                "tokens": (by_token, jnp.int32),
                "target_mask": (by_token, bool),
                "counts": (by_row, jnp.float32),
                "advantages": (by_row, jnp.float32),
                "sampler_logprobs": (by_token, jnp.float32),
            }
        else:
            by_token = (job.batch, job.seq)
            shapes = {"tokens": (by_token, jnp.int32), "target_mask": (by_token, bool)}
        batch = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
        rows = sharding.fitting(sharding.TRAINING.batch, batch["tokens"].shape[0])
        return self._sharded(batch, {name: PartitionSpec(rows) for name in batch})

    def _cache(self, rows: int, capacity: int) -> KVCache:
        """An empty one: `prefill` itself would ask this machine for its dtype, and not the mesh."""
        model, dtype = self.job.model, jnp.dtype(self.job.dtype)
        cache = jax.eval_shape(lambda: init_cache(model, rows, capacity, dtype, "tpu"))
        spec = buffer_spec(rows, len(cache.k[0]) // rows, cache.rules)
        lengths = PartitionSpec(sharding.fitting(sharding.DECODING.batch, rows))
        specs = jax.tree.map(lambda _: spec, cache).replace(lengths=lengths)
        return self._sharded(cache, specs)

    def _compiled(
        self, name: str, lower: Callable[[], Any], held: dict[str, int]
    ) -> tuple[Program, Any]:
        """(the program, what was compiled, or None if it did not fit), next to what is held."""
        self.say(name)
        start, estimate = time.perf_counter(), self.estimates[name]
        # A decode step's time is the bytes that it moves; and libtpu aborts in its hurry where a mesh
        # shares rows alone.
        rows_alone = self.mesh.shape["data"] == self.mesh.size > 1
        hurried = not (self.exact or name == "decode step" or rows_alone)
        try:
            compiled = lower().compile(_HURRY if hurried else None)
        except jax.errors.JaxRuntimeError as e:
            if (needed := _needed_bytes(str(e))) is None:
                raise
            given = sum(held.values()) - (name in _SAMPLING) * sum(self.stays.values())
            temp = max(needed - given, 0)
            return (
                dataclasses.replace(
                    estimate,
                    parts=_some(held | {"temporaries": temp}),
                    argument_bytes=given,
                    temp_bytes=temp,
                    compile_seconds=time.perf_counter() - start,
                ),
                None,
            )
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        # What lives at once: that much a program must have, or XLA refuses it. `temp_size_in_bytes` has
        # holes between arrays on top, more than once, and XLA compiles within less than that.
        temp = max(memory.peak_memory_in_bytes - memory.argument_size_in_bytes - results, 0)
        # A decode step's loop is one step; others of unknown rounds go over the loss's chunks.
        rounds = lambda loop: 1 if loop.startswith("jit(decode)") else self._chunks()
        return (
            Program(
                name=name,
                runs=estimate.runs,
                parts=_some(held | {"results": results, "temporaries": temp}),
                argument_bytes=memory.argument_size_in_bytes,
                temp_bytes=temp,
                reserved_bytes=memory.temp_size_in_bytes,
                cost=analyse(compiled.as_text(), attention_cost, rounds),
                compile_seconds=seconds,
                hurried=hurried,
            ),
            compiled,
        )

    def _chunks(self) -> int:
        """Rounds of the loss's loop: devices that share its tokens and vocabulary go over both."""
        job, V = self.job, self.job.model.vocab_size
        parts = sharding.axis_size(sharding.TRAINING.batch + sharding.TRAINING.tokens)
        length = job.seq - job.prompt_len if job.samples else job.seq
        rows = self.trainer.config.micro_batch_size or job.batch
        tokens = -(-min(rows * job.branches, job.batch) * length // parts)
        vocab_axes = sharding.fitting(sharding.DECODING.vocab, V)
        sharers = sharding.axis_size(sharding.TRAINING.embed) if vocab_axes else 1
        chunk = chunk_size(tokens * sharers, V // sharding.axis_size(vocab_axes)) // sharers or 1
        return -(-tokens // chunk)

    def _sharded(self, tree: Any, specs: Any) -> Any:
        return sharding.shapes_on(self.mesh, tree, specs)

    def _everywhere(self, tree: Any) -> Any:
        return self._sharded(tree, jax.tree.map(lambda _: PartitionSpec(), tree))


def make_trainer(job: Job) -> Trainer:
    """The trainer of a job that trains, on the context mesh."""
    llama = LLaMa(job.model, jnp.dtype(job.dtype), job.remat)
    lora = LoRAConfig(rank=job.lora_rank) if job.lora_rank else None
    rest = dict(optimizer=job.optimizer, param_dtype=job.param_dtype, state_dtype=job.state_dtype)
    rest["micro_batch_size"] = sharding.whole_rounds(job.rows_at_once)
    if job.kind != "grpo":
        return SFTTrainer(llama, SFTConfig(**rest), lora)
    config = GRPOConfig(max_completion_len=job.seq - job.prompt_len, **rest)
    return GRPOTrainer(llama, config, lora)


def _needed_bytes(message: str) -> int | None:
    """Of XLA's error for a program that does not fit: "Used 17.5G of 15.75G hbm", or "the total memory
    required for … (17.5G) exceeds available HBM". It is rounded to hundredths; this is the most it can be.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    found = found or re.search(r"required for [^(]*\(([\d.]+)([KMGT]?)\) exceeds", message)
    return found and int((float(found[1]) + 0.005) * 2 ** (10 * " KMGT".index(found[2] or " ")))


def attention_cost(name: str, arrays: list[Array]) -> tuple[float, float]:
    """FLOPs and bytes of a kernel of JAX's splash attention; of another, only what it takes and gives.

    A causal mask halves the products of new tokens with each other.
    """
    moved = sum(array.bytes for array in arrays)
    found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", name)
    # Masks come first, as integers; a batch of one row has no axis of its own.
    heads = [array for array in arrays if "f" in array.kind and len(array.dims) >= 3]
    if found is None or len(heads) < 3:
        return 0, moved
    q, k = heads[:2]
    T, S = max(q.dims[-2:]), max(k.dims[-2:])
    # Products: q·k and weights·v; backward q·k again, dv, dp and dq or dk.
    products = {"fwd": 2, "dq": 3, "dkv": 4}[found[1]]
    return products * math.prod(q.dims) * (2 * S - T), moved


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _bytes(tree: Any) -> int:
    """Of one device's part of sharded shapes."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(map(size, jax.tree.leaves(tree)))


def _some(parts: dict[str, int]) -> dict[str, int]:
    return {part: n for part, n in parts.items() if n > 0}
