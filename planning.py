"""What a job asks of each device: its real steps, compiled for machines that need not be there."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import decoding
import sampling
from models.llama.config import ModelConfig
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, cache_shape, decoding_axes, for_decoding
from models.llama.model import init_params, param_axes
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.optimizer import DTYPES, OPTIMIZERS
from trainers.sft_trainer import SFTConfig, SFTTrainer
from trainers.trainer import Trainer
from utils import sharding
from utils.cross_entropy import chunk_size
from utils.errors import is_int, raise_all
from utils.hlo import Cost, analyse
from utils.hlo_text import Array
from utils.kvcache import KVCache, bucket

KINDS = ("sft", "lora", "grpo", "generate")
REMATS = ("none", "dots", "block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned.

    Attributes:
        model: the model.
        kind: one of KINDS; lora is sft with adapters, and lora_rank makes grpo train adapters too.
        batch: rows of a step; for grpo completions.
        seq: tokens of a row, prompt and completion together.
        prompt: tokens of the prompt, for grpo and generate.
        group: completions a prompt, for grpo.
        micro_batch: rows whose gradients are computed at once; None: all.
        lora_rank: 0 trains all parameters.
        remat, dtype, param_dtype, state_dtype, optimizer: as in train.py.
    """

    model: ModelConfig
    kind: str
    batch: int
    seq: int
    prompt: int
    group: int = 8
    micro_batch: int | None = None
    lora_rank: int = 0
    remat: str = "block"
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    state_dtype: str = "bfloat16"
    optimizer: str = "adamw"

    def __post_init__(self):
        bad = []
        known = dict(kind=KINDS, remat=REMATS, dtype=DTYPES, param_dtype=DTYPES)
        known |= dict(state_dtype=DTYPES, optimizer=OPTIMIZERS)
        for name, values in known.items():
            if getattr(self, name) not in values:
                got = getattr(self, name)
                bad.append(f"{name}={got!r:.40}, expected one of {', '.join(values)}")
        for name, least in dict(batch=1, seq=2, prompt=1, group=1, lora_rank=0).items():
            if not is_int(getattr(self, name)) or getattr(self, name) < least:
                bad.append(f"{name}={getattr(self, name)!r:.40}, expected an integer from {least}")
        micro = self.micro_batch
        if micro is not None and not (is_int(micro) and micro >= 1):
            bad.append(f"micro_batch={micro!r:.40}, expected an integer from 1, or None")
        raise_all("plan", bad)
        if self.seq > self.model.max_seq_len:
            bad.append(f"seq={self.seq} exceeds the model's context of {self.model.max_seq_len}")
        if self.samples and self.prompt >= self.seq:
            bad.append(f"prompt={self.prompt} leaves no room for a completion in seq={self.seq}")
        if self.kind == "grpo" and (self.batch % self.group or (micro or 0) % self.group):
            bad.append(f"batch={self.batch} and micro_batch={micro} are not multiples of a group")
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
    def tokens(self) -> int:
        """Of a step: those that are trained on or generated."""
        return self.batch * (self.seq - self.prompt if self.samples else self.seq)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program of a job, on one device.

    Attributes:
        name: train step, prefill or decode step.
        runs: in a step of the job.
        parts: bytes by what they are for; they add up to `peak_bytes`.
        argument_bytes, temp_bytes: as XLA accounts for them; what else is held beside the program
            is in `parts` alone.
        cost: of one run; None where it did not fit, and XLA ends without a program.
        compile_seconds: tracing included.
    """

    name: str
    runs: int
    parts: dict[str, int]
    argument_bytes: int
    temp_bytes: int
    cost: Cost | None
    compile_seconds: float

    @property
    def peak_bytes(self) -> int:
        """All that is held while it runs."""
        return sum(self.parts.values())


def compile_job(
    job: Job, mesh: Mesh, say: Callable[[str], None] = lambda what: None
) -> list[Program]:
    """Compiles a job's programs.

    Args:
        job: what to plan.
        mesh: over the devices of a topology.
        say: is told what is being compiled.
    """
    with jax.set_mesh(mesh):
        trainer = _trainer(job)
        state, frozen = _state(trainer, job, mesh)
        stays = {}
        if job.trains:
            stays = _part_bytes(_named_state(state, frozen))
        programs = []
        if job.samples:
            programs += _sampling(job, mesh, stays, say)
        if job.trains:
            say("train step")
            batch = _batch(job, mesh)
            programs.append(
                _compiled(
                    "train step",
                    1,
                    lambda: type(trainer).train_step.lower(trainer, state, frozen, batch),
                    stays | {"batch": _bytes(batch)},
                    _chunks(job, mesh),
                )[0]
            )
    return programs


def _trainer(job: Job) -> Trainer:
    llama = LLaMa(job.model, jnp.dtype(job.dtype), job.remat)
    lora = LoRAConfig(rank=job.lora_rank) if job.lora_rank else None
    rest = dict(optimizer=job.optimizer, param_dtype=job.param_dtype, state_dtype=job.state_dtype)
    if job.kind != "grpo":
        return SFTTrainer(llama, SFTConfig(micro_batch_size=job.micro_batch, **rest), lora)
    micro = None if job.micro_batch is None else job.micro_batch // job.group
    length = job.seq - job.prompt
    config = GRPOConfig(micro_batch_size=micro, max_completion_len=length, **rest)
    return GRPOTrainer(llama, config, lora)


def _state(trainer: Trainer, job: Job, mesh: Mesh) -> tuple[Any, Any]:
    """(state, frozen) as sharded shapes."""
    dtype = job.dtype if trainer.keeps_frozen else job.param_dtype
    params_of = lambda key: init_params(job.model, key, jnp.dtype(dtype))
    state, frozen = jax.eval_shape(lambda key: trainer.init(params_of(key), key), jax.random.key(0))
    frozen_specs = trainer.model_specs(frozen) if frozen else {}
    return _sharded(state, trainer.state_specs(state), mesh), _sharded(frozen, frozen_specs, mesh)


def _batch(job: Job, mesh: Mesh) -> dict[str, Any]:
    rows, groups, length = job.batch, job.batch // job.group, job.seq - job.prompt
    if job.kind != "grpo":
        shapes = {"tokens": ((rows, job.seq), jnp.int32), "target_mask": ((rows, job.seq), bool)}
    else:
        by_token, by_row = (groups, job.group, length), (groups, job.group)
        shapes = {
            "prompts": ((groups, job.prompt), jnp.int32),
            "prompt_lengths": ((groups,), jnp.int32),
            "tokens": (by_token, jnp.int32),
            "target_mask": (by_token, bool),
            "counts": (by_row, jnp.float32),
            "advantages": (by_row, jnp.float32),
            "sampler_logprobs": (by_token, jnp.float32),
        }
    batch = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
    rows = lambda x: PartitionSpec(
        sharding.fitting(sharding.TRAINING.batch, len(x.shape) and x.shape[0])
    )
    return _sharded(batch, jax.tree.map(rows, batch), mesh)


def _sampling(job: Job, mesh: Mesh, stays: dict[str, int], say) -> list[Program]:
    """Prefill and a decode step, on a copy of the parameters laid out for them."""
    n = job.group if job.kind == "grpo" else 1
    prompts, dtype = job.batch // n, jnp.dtype(job.dtype)
    model, capacity = LLaMa(job.model), bucket(job.seq, 64)
    whole = jax.eval_shape(lambda key: init_params(job.model, key, dtype), jax.random.key(0))
    params = jax.eval_shape(for_decoding, whole)
    specs = sharding.specs(params, decoding_axes(param_axes(job.model)), sharding.DECODING)
    params = _sharded(params, specs, mesh)
    everywhere = lambda tree: _sharded(tree, jax.tree.map(lambda _: PartitionSpec(), tree), mesh)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    sampler = jax.eval_shape(lambda: sampling.traced(sampling.TopP()))
    rules = everywhere(decoding.Rules(sampler, ints(8), ints()))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts))
    batch = everywhere((ints(prompts, job.prompt), ints(prompts), ints(prompts), keys))
    cache = _cache(job, prompts, capacity, mesh)
    known = stays | {"policy for sampling" if job.trains else "parameters": _bytes(params)}
    say("prefill")
    sizes = (n, capacity)
    prefill, program = _compiled(
        "prefill",
        1,
        lambda: decoding.prefill.lower(model, sizes, params, rules, cache, batch),
        known | {"KV cache": _bytes(cache)},
    )
    if program is None:
        return [prefill]
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        program[0].out_info,
        program[1].output_shardings,
    )
    say("decode step")
    decode, _ = _compiled(
        "decode step",
        job.seq - job.prompt - 1,
        lambda: decoding.decode.lower(model, params, rules, state, everywhere(ints())),
        known | {"KV cache": _bytes(state.cache)},
    )
    return [prefill, decode]


def _cache(job: Job, rows: int, capacity: int, mesh: Mesh) -> KVCache:
    """An empty one; made here, as `prefill` would ask this machine, and not the mesh, for its dtype."""
    shape = cache_shape(job.model, rows, capacity)
    create = lambda: KVCache.create(shape, job.model.n_layers, jnp.dtype(job.dtype))
    cache = jax.eval_shape(create)
    batch = sharding.fitting(sharding.DECODING.batch, rows)
    spec = PartitionSpec(batch + sharding.fitting(sharding.DECODING.heads, shape[1]))
    buffers = jax.tree.map(lambda _: spec, cache)
    return _sharded(cache, buffers.replace(lengths=PartitionSpec(batch)), mesh)


def _compiled(
    name: str, runs: int, lower: Callable[[], Any], parts: dict[str, int], chunks: int = 1
) -> tuple[Program, Any]:
    """(the program, (lowered, compiled)); the latter None where it does not fit.

    Args:
        parts: bytes of what is held already.
        chunks: how often loops run whose rounds the program does not say.
    """
    start = time.perf_counter()
    lowered = lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if (needed := _needed_bytes(str(e))) is None:
            raise
        seconds = time.perf_counter() - start
        held = sum(parts.values())
        parts = parts | {"temporaries": max(needed - held, 0)}
        return (
            Program(
                name=name,
                runs=runs,
                parts=parts,
                argument_bytes=held,
                temp_bytes=parts["temporaries"],
                cost=None,
                compile_seconds=seconds,
            ),
            None,
        )
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = parts | {"results": results, "temporaries": memory.temp_size_in_bytes}
    rounds = lambda loop: 1 if loop.startswith("jit(decode)") else chunks
    return Program(
        name=name,
        runs=runs,
        parts={part: n for part, n in parts.items() if n > 0},
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        cost=analyse(compiled.as_text(), attention_cost, rounds),
        compile_seconds=seconds,
    ), (lowered, compiled)


def _needed_bytes(message: str) -> int | None:
    """Of XLA's error for a program that does not fit: "Used 17.5G of 15.75G hbm"."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return found and int(float(found[1]) * 2 ** (10 * " KMGT".index(found[2] or " ")))


def _chunks(job: Job, mesh: Mesh) -> int:
    """Rounds of the loss's loop over chunks of tokens."""
    parts = math.prod(mesh.shape[axis] for axis in sharding.TRAINING.batch)
    tokens = -(-min(job.micro_batch or job.batch, job.batch) * job.seq // parts)
    return -(-tokens // chunk_size(tokens, job.model.vocab_size))


def attention_cost(name: str, arrays: list[Array]) -> tuple[float, float]:
    """FLOPs and bytes of a kernel of JAX's splash attention; of another, only what it takes and gives.

    A block of queries reads the keys and values that it sees, half of them for a causal mask.
    """
    moved = sum(array.bytes for array in arrays)
    found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", name)
    heads = [array for array in arrays if len(array.dims) == 4]
    if found is None or len(heads) < 3:
        return 0, moved
    q, k = heads[:2]
    T, S = max(q.dims[2:]), max(k.dims[2:])
    # Products: q·k and weights·v; backward q·k again, dv, dp and dq or dk.
    products = {"fwd": 2, "dq": 3, "dkv": 4}[found[1]]
    return products * math.prod(q.dims) * (2 * S - T), moved


def _sharded(tree: Any, specs: Any, mesh: Mesh) -> Any:
    put = lambda spec, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(put, specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _bytes(tree: Any) -> int:
    """Of one device's part of sharded shapes."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(map(size, jax.tree.leaves(tree)))


def _named_state(state: Any, frozen: Any) -> dict[str, Any]:
    named = {"parameters": state.params, "frozen parameters": frozen}
    return named | {"optimizer": state.opt_state}


def _part_bytes(named: dict[str, Any]) -> dict[str, int]:
    return {name: size for name, tree in named.items() if (size := _bytes(tree))}
