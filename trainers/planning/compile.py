"""The real steps of a job, compiled for machines that need not be there."""

import functools
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
from models.llama.layout import decoding_axes, param_axes
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, Params, for_decoding, init_cache, init_params
from models.llama.quantize import quantize_params
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.planning.estimate import estimate_job
from trainers.planning.hlo_text import Array
from trainers.planning.job import Job, Program
from trainers.sft_trainer import SFTConfig, SFTTrainer
from trainers.trainer import Trainer, model_specs
from utils import sharding
from utils.cross_entropy import chunk_size
from utils.kvcache import KVCache, bucket, buffer_spec

# Compiles a training step in a sixth of the time: the same collectives, FLOPs, and within a few percent
# the same memory, but arrays that could stay on the chip go to main memory and back.
_HURRY = {"exec_time_optimization_effort": -1.0}


def compile_job(
    job: Job, mesh: Mesh, exact: bool = False, say: Callable[[str], Any] = lambda what: None
) -> list[Program]:
    """Compiles a job's programs.

    Args:
        job: what is planned.
        mesh: over the devices of a topology.
        exact: whether training and prefill are compiled as a run does, and not in a hurry.
        say: is told the name of each program.

    Raises:
        ConfigError: the mesh does not divide the model.
    """
    with jax.set_mesh(mesh):
        compiler = Compiler(job, mesh, exact, say)
        programs = compiler.sampling() if job.samples else []
        return programs + ([compiler.training()] if job.trains else [])


class Compiler:
    """Compiles a job on a mesh on which nothing can run: all arrays are shapes.

    Attributes:
        stays: bytes of the trainer's state on one device, by what they are for. Programs that sample
            do not take it as an argument, but it stays in memory beside them.
    """

    def __init__(self, job: Job, mesh: Mesh, exact: bool, say: Callable[[str], Any]):
        self.job, self.mesh, self.exact, self.say = job, mesh, exact, say
        self.estimates = {program.name: program for program in estimate_job(job, mesh.shape)}
        self.stays: dict[str, int] = {}
        if job.trains:
            self.trainer = make_trainer(job)
            self.state, self.frozen = self._state()
            self.stays = {
                "parameters": device_bytes(self.state.params),
                "frozen parameters": device_bytes(self.frozen),
                "optimizer": device_bytes(self.state.opt_state),
            }

    def training(self) -> Program:
        """The training step."""
        trainer, batch = self.trainer, self.batch()
        program, _ = self.compile(
            "train step",
            lambda: type(trainer).train_step.lower(trainer, self.state, self.frozen, batch),
            self.stays | {"batch": device_bytes(batch)},
        )
        return program

    def sampling(self) -> list[Program]:
        """Prefill and a decode step, on parameters laid out for them."""
        job, n, dtype = self.job, self.job.samples_a_prompt, jnp.dtype(self.job.dtype)
        prompts, capacity, model = job.batch // n, bucket(job.seq, 64), LLaMa(job.model, dtype)
        params = jax.eval_shape(
            lambda: for_decoding(self._quantized(init_params(job.model, jax.random.key(0), dtype)))
        )
        table = decoding_axes(param_axes(job.model))
        specs = sharding.param_specs(params, table, sharding.DECODING)
        params = self._sharded(params, specs)
        ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        sampler = jax.eval_shape(lambda: sampling.traced(sampling.TopP()))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts))
        batch = ints((prompts, job.prompt_len)), ints((prompts,)), ints((prompts,)), keys
        whole = decoding.Rules(sampler, ints((8,)), ints(())), batch, ints(())
        rules, batch, steps = self._sharded(whole, jax.tree.map(lambda _: PartitionSpec(), whole))
        cache = self.cache(prompts, capacity)
        weights = {"policy for sampling" if job.trains else "parameters": device_bytes(params)}
        prefill, compiled = self.compile(
            "prefill",
            lambda: decoding.prefill.lower(model, (n, capacity), params, rules, cache, batch),
            weights | {"KV cache": device_bytes(cache)},
            self.stays,
        )
        if compiled is None:  # what does not fit here does not fit there
            return [prefill, self.estimates["decode step"]]
        state = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            compiled.out_info,
            compiled.output_shardings,
        )
        decode, _ = self.compile(
            "decode step",
            lambda: decoding.decode.lower(model, params, rules, state, steps),
            weights | {"KV cache": device_bytes(state.cache)},
            self.stays,
        )
        return [prefill, decode]

    def _state(self) -> tuple[Any, Any]:
        """Shapes of the trainer's state and of the frozen parameters."""
        trainer, job = self.trainer, self.job
        dtype = jnp.dtype(job.dtype if trainer.keeps_frozen else job.param_dtype)

        def init() -> tuple[Any, Any]:
            key = jax.random.key(0)
            return trainer.init(self._quantized(init_params(job.model, key, dtype)), key)

        state, frozen = jax.eval_shape(init)
        frozen_specs = model_specs(trainer.model, frozen) if frozen else {}
        return (
            self._sharded(state, trainer.specs(state)),
            self._sharded(frozen, frozen_specs),
        )

    def _quantized(self, params: Params) -> Params:
        return quantize_params(params) if self.job.quantize else params

    def batch(self) -> dict[str, Any]:
        """Shapes of a training step's batch."""
        job = self.job
        rows = job.batch // job.branches
        by_token = (rows, job.branches, job.length) if job.kind == "grpo" else (rows, job.seq)
        shapes = {"tokens": (by_token, jnp.int32), "target_mask": (by_token, bool)}
        if job.kind == "grpo":
            shapes |= {
                "prompts": ((rows, job.prompt_len), jnp.int32),
                "prompt_lengths": ((rows,), jnp.int32),
                "counts": (by_token[:2], jnp.float32),
                "advantages": (by_token[:2], jnp.float32),
                "sampler_logprobs": (by_token, jnp.float32),
            }
        batch = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
        spec = PartitionSpec(sharding.fitting(sharding.TRAINING.batch, rows))
        return self._sharded(batch, dict.fromkeys(batch, spec))

    def cache(self, rows: int, capacity: int) -> KVCache:
        """Shapes of an empty cache: `prefill` itself would ask this machine, not the mesh, for its dtype."""
        model, dtype = self.job.model, jnp.dtype(self.job.dtype)
        cache = jax.eval_shape(lambda: init_cache(model, rows, capacity, dtype, "tpu"))
        spec = buffer_spec(rows, len(cache.k[0]) // rows, cache.rules)
        lengths = PartitionSpec(sharding.fitting(sharding.DECODING.batch, rows))
        specs = jax.tree.map(lambda _: spec, cache).replace(lengths=lengths)
        return self._sharded(cache, specs)

    def compile(
        self,
        name: str,
        lower: Callable[[], jax.stages.Lowered],
        given: dict[str, int],
        beside: Mapping[str, int] = {},
    ) -> tuple[Program, jax.stages.Compiled | None]:
        """The program, and its executable, or None if XLA refused it for want of memory.

        Args:
            name: the program's name.
            lower: traces it.
            given, beside: bytes of its arguments, and of what else is in memory while it runs.
        """
        self.say(name)
        start, estimate = time.perf_counter(), self.estimates[name]
        # A decode step's time is the bytes that it moves; and libtpu aborts in its hurry where a mesh
        # shares rows alone.
        rows_alone = self.mesh.shape["data"] == self.mesh.size > 1
        hurried = not (self.exact or name == "decode step" or rows_alone)
        held = {**beside, **given}
        try:
            compiled = lower().compile(_HURRY if hurried else None)
        except jax.errors.JaxRuntimeError as e:
            needed, seconds = needed_bytes(str(e)), time.perf_counter() - start
            if needed is None:
                raise
            return estimate.refused(needed, held, sum(given.values()), seconds), None
        seconds = time.perf_counter() - start
        how = dict(compile_seconds=seconds, hurried=hurried)
        return estimate.compiled(compiled, held, attention_cost, self._rounds, **how), compiled

    def _rounds(self, loop: str) -> int:
        """Rounds of a loop of unknown length: a decode step is one, other loops go over the loss's chunks."""
        return 1 if loop.startswith("jit(decode)") else self.loss_chunks()

    def loss_chunks(self) -> int:
        """Rounds of the loss's loop: devices that share its tokens and vocabulary go over both."""
        job, V = self.job, self.job.model.vocab_size
        parts = sharding.axis_size(sharding.TRAINING.batch + sharding.TRAINING.tokens)
        rows = self.trainer.config.micro_batch_size or job.batch
        tokens = -(-min(rows * job.branches, job.batch) * job.length // parts)
        vocab_axes = sharding.fitting(sharding.DECODING.vocab, V)
        sharers = sharding.axis_size(sharding.TRAINING.embed) if vocab_axes else 1
        chunk = chunk_size(tokens * sharers, V // sharding.axis_size(vocab_axes)) // sharers or 1
        return -(-tokens // chunk)

    def _sharded(self, tree: Any, specs: Any) -> Any:
        return sharding.shapes_on(self.mesh, tree, specs)


def make_trainer(job: Job) -> Trainer:
    """The trainer of a job that trains, on the context mesh."""
    llama = LLaMa(job.model, jnp.dtype(job.dtype), job.remat)
    lora = LoRAConfig(rank=job.lora_rank, targets=job.lora_targets) if job.lora_rank else None
    rest = dict(optimizer=job.optimizer, param_dtype=job.param_dtype, state_dtype=job.state_dtype)
    rest["micro_batch_size"] = sharding.whole_rounds(job.rows_at_once)
    if job.kind != "grpo":
        return SFTTrainer(llama, SFTConfig(**rest), lora)
    config = GRPOConfig(max_completion_len=job.length, **rest)
    return GRPOTrainer(llama, config, lora)


def needed_bytes(message: str) -> int | None:
    """The bytes in XLA's error for a program that does not fit; None: it is another error.

    It says "Used 17.5G of 15.75G hbm" or "the total memory required for … (17.5G) exceeds available HBM",
    rounded to hundredths; this is the most that it can be.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    found = found or re.search(r"required for [^(]*\(([\d.]+)([KMGT]?)\) exceeds", message)
    return found and int((float(found[1]) + 0.005) * 2 ** (10 * " KMGT".index(found[2] or " ")))


def attention_cost(name: str, arrays: list[Array]) -> tuple[float, float]:
    """FLOPs and bytes of a kernel of JAX's splash attention; other kernels count their arrays' bytes alone.

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


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of sharded shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
