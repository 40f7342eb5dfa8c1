"""This project's rows of benchmarks/accelerator.py, in a process of their own.

Weights are random, and made on the card. A share is of the memory's bandwidth, as a copy of a large
array has it, or of the multipliers' peak, as a large matrix product has it, both in this process.
"""

import concurrent.futures
import functools
import gc
import json
import time
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accelerator_oracles
from benchmarks.accelerator_rows import Row, attempt, configs
from benchmarks.workers import serve
from models.llama.config import ModelConfig
from models.llama.decoding import DecodeState, GenerationConfig, RUNNING, cache_dtype
from models.llama.generation import Generation
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, Params, for_decoding, init_cache, init_params
from models.llama.quantize import quantize_params
from sampling import Greedy, TopP
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.packing import pack
from trainers.rollout import Layout, Prompt, Rollout
from trainers.runs.metrics import matmul_peak, train_flops_per_token
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils import memory

REPEATS = 3
HELD = 64  # tokens before those that a row decodes
BFLOAT16 = dict(param_dtype="bfloat16", state_dtype="bfloat16", learning_rate=1e-5)


class Altiplano:
    """Measures one row at a time.

    Args:
        tiny: shapes that a CPU computes in seconds.
    """

    def __init__(self, tiny: bool):
        self._tiny, self._configs = tiny, configs(tiny)
        self._new = 8 if tiny else 256

    def about(self) -> dict:
        """The card, and what it can do."""
        card = jax.devices()[0]
        found = {"device": card.device_kind, "platform": card.platform, "jax": jax.__version__}
        limits = card.memory_stats() or {}
        found["memory"] = limits.get("bytes_limit")
        found["bandwidth"] = _bandwidth(2**22 if self._tiny else 2**29)
        return found | {"peak": matmul_peak(jnp.dtype("bfloat16"))}

    def run(self, row: Row) -> Row:
        """What was found, or the error."""
        start = time.perf_counter()
        method = getattr(self, row["part"])
        found = attempt(method, row["dtype"], **row["settings"])
        gc.collect()
        return found | {"seconds": time.perf_counter() - start}

    def together(self, rows: list[Row]) -> list[Row]:
        """`run` of rows that are not timed: most of their time is XLA's, which compiles several at once.

        Dtypes of the same settings take turns, since they share what they are compared with.
        """
        keys = [json.dumps(row["settings"]) for row in rows]
        groups = {key: [row for row, k in zip(rows, keys) if k == key] for key in keys}
        with concurrent.futures.ThreadPoolExecutor(len(groups)) as pool:
            found = dict(
                zip(groups, pool.map(lambda group: list(map(self.run, group)), groups.values()))
            )
        return [found[key].pop(0) for key in keys]

    def oracles(self, dtype: str, oracle: str, **settings) -> Row:
        """See benchmarks/accelerator_oracles.py."""
        return getattr(accelerator_oracles, oracle)(dtype, **settings)

    def decode(self, dtype: str, size: str, rows: int) -> Row:
        """Decode steps of rows that hold `HELD` tokens, greedy; the share is of the bandwidth.

        A step reads all weights but the looked-up embedding, and each row's filled slots.
        """
        config, new = self._configs[size], self._new
        params = for_decoding(random_params(config, dtype), donate=True)
        model = LLaMa(config, jnp.bfloat16)
        run = Generation(model, params, Greedy(), GenerationConfig(max_new_tokens=new))
        run.rows = rows

        def once():
            run.state = jax.block_until_ready(_filled_state(config, params, rows, HELD + new))
            return _seconds(run.advance)

        seconds = _best(once) / (new - 1)
        read = memory.tree_bytes(params) - (not config.tie_embeddings) * memory.tree_bytes(
            params["embed"]
        )
        slots = (rows, config.n_kv_heads, HELD + new // 2, config.head_dim)
        read += memory.cache_bytes(slots, config.n_layers, run.state.cache.k[0].dtype)
        return {"tokens_per_s": rows / seconds, "bytes_per_s": read / seconds}

    def prefill(self, dtype: str, size: str, length: int) -> Row:
        """One prompt to its first token."""
        config = self._configs[size]
        params = for_decoding(random_params(config, dtype), donate=True)
        run = Generation(LLaMa(config), params, Greedy(), GenerationConfig(max_new_tokens=1))
        prompt = _tokens(1, length).tolist()
        seconds = _best(lambda: _seconds(lambda: run.start(prompt)))
        head = 2 * config.vocab_size * config.dim  # of the last token alone
        flops = length * train_flops_per_token(config, length) / 3 - (length - 1) * head
        return {"tokens_per_s": length / seconds, "flops_per_s": flops / seconds}

    def sft(self, dtype: str, size: str, rows: int, length: int, packed: bool = False) -> Row:
        """An AdamW step of all parameters; parameters and first moments have the dtype too."""
        return self._train_step(dtype, size, rows, length, packed=packed)

    def lora(self, dtype: str, size: str, rows: int, length: int, rank: int) -> Row:
        """A step of adapters over a frozen model."""
        return self._train_step(dtype, size, rows, length, lora=LoRAConfig(rank=rank))

    def _train_step(self, dtype, size, rows, length, packed=False, lora=None) -> Row:
        model = LLaMa(self._configs[size], jnp.dtype("bfloat16"), "dots")
        trainer = SFTTrainer(model, SFTConfig(**BFLOAT16, micro_batch_size=None), lora)
        params = random_params(model.config, dtype)
        state, frozen = trainer.init(params, jax.random.key(1), donate=True)
        del params
        batch = _packed(rows, length) if packed else _rows(rows, length)

        def once():
            nonlocal state
            start = time.perf_counter()
            state, metrics = trainer.train_step(state, frozen, batch)
            if not jax.device_get(metrics)["updated"]:
                raise ArithmeticError("the update was not finite")
            return time.perf_counter() - start

        seconds = _best(once)
        work = trainer.work(batch)
        flops = train_flops_per_token(model.config, work.mean_context, lora=lora is not None)
        speed = work.tokens / seconds
        return {"tokens_per_s": speed, "flops_per_s": speed * flops}

    def grpo(self, dtype: str, size: str, prompts: int, group: int, length: int) -> Row:
        """A rollout of prompts × group × length tokens and one update on it; the share is the update's."""
        config = GRPOConfig(**BFLOAT16, max_completion_len=length, micro_batch_size=min(4, prompts))
        trainer = GRPOTrainer(LLaMa(self._configs[size], jnp.dtype(dtype), "dots"), config)
        params = random_params(trainer.model.config, dtype)
        state, _ = trainer.init(params, jax.random.key(1), donate=True)
        del params
        ids, phases = _tokens(prompts, 2 * HELD).tolist(), {}

        def once():
            nonlocal state, batch
            start = time.perf_counter()
            rollout = _rollout(trainer, state.params, ids, group)
            sampled = time.perf_counter()
            batch = rollout.batch(Layout(prompt_width=2 * HELD, width=length, branches=group))
            state, metrics = trainer.train_step(state, {}, batch)
            if not jax.device_get(metrics)["updated"]:
                raise ArithmeticError("the update was not finite")
            end = time.perf_counter()
            phases[end - start] = (sampled - start, end - sampled)
            return end - start

        batch = None
        seconds = _best(once, 2)
        rollout, update = phases[seconds]
        work = trainer.work(batch)
        flops = work.tokens * train_flops_per_token(trainer.model.config, work.mean_context)
        note = f"rollout {rollout:.2f} s, update {update:.2f} s"
        speed = prompts * group * length / seconds
        return {"tokens_per_s": speed, "flops_per_s": flops / update, "note": note}


def random_params(config: ModelConfig, dtype: str) -> Params:
    """A stacked model on the card; never a float32 copy of the whole. int8: matrices by bfloat16's."""
    if dtype == "int8":
        return quantize_params(random_params(config, "bfloat16"))
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, shape):
        return 0.02 * jax.random.normal(key, shape, dtype)

    def make(path, leaf):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(leaf.shape, dtype)
        return draw(jax.random.key(zlib.crc32(name.encode())), leaf.shape)

    return jax.tree_util.tree_map_with_path(make, shapes)


def _filled_state(config: ModelConfig, params: Params, rows: int, capacity: int) -> DecodeState:
    """Rows that hold tokens and have sampled one, without the prefill, which would be compiled too."""
    cache = init_cache(config, rows, capacity, cache_dtype(params))
    return DecodeState(
        cache=cache.replace(lengths=jnp.full(rows, HELD, jnp.int32), empty=False),
        keys_R=jax.random.split(jax.random.key(0), rows),
        tokens_RS=jnp.zeros((rows, capacity), jnp.int32),
        logprobs_RS=jnp.zeros((rows, capacity), jnp.float32),
        counts_R=jnp.ones(rows, jnp.int32),
        limits_R=jnp.full(rows, capacity - HELD, jnp.int32),
        reason_R=jnp.full(rows, RUNNING, jnp.int32),
        seen_RV=None,
    )


def _rollout(trainer: GRPOTrainer, params: Params, ids: list[list[int]], group: int) -> Rollout:
    """A group per prompt; random rewards, all completions as long as they may be."""
    length = trainer.config.max_completion_len
    config = GenerationConfig(max_new_tokens=length, n=group)
    run = Generation(trainer.model, for_decoding(params), TopP(), config)
    run.start(ids)
    run.advance()
    done, shape = run.completions(), (len(ids), group)
    rewards = np.random.default_rng(0).normal(size=shape)
    return Rollout(
        prompts=[Prompt(text="", ids=tuple(prompt), columns={}) for prompt in ids],
        texts=[[""] * group] * len(ids),
        functions=(),
        tokens=done.tokens.reshape(*shape, length),
        lengths=done.lengths.reshape(shape),
        stopped=np.zeros(shape, bool),
        logprobs=done.logprobs.reshape(*shape, length),
        scores=np.zeros((*shape, 0)),
        rewards=rewards,
        advantages=np.zeros(shape, np.float32),
    ).with_advantages("group")


def _tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 500, (rows, length)).astype(np.int32)


def _rows(rows: int, length: int) -> dict[str, np.ndarray]:
    """A batch in which all tokens are targets."""
    tokens = _tokens(rows, length)
    return {"tokens": tokens, "target_mask": np.broadcast_to(np.arange(length) > 0, tokens.shape)}


def _packed(rows: int, length: int) -> dict[str, np.ndarray]:
    """Documents of log-normal lengths, a quarter of a row at most, in full rows."""
    drawn = np.exp(np.random.default_rng(0).normal(np.log(length / 16), 0.8, 64 * rows))
    lengths = np.clip(drawn, 2, length // 4).astype(int)
    members, offsets = pack(lengths, length)
    batch = {"tokens": _tokens(rows, length), "segment_ids": np.zeros((rows, length), np.int32)}
    batch["positions"] = np.zeros((rows, length), np.int32)
    for i, (start, stop) in enumerate(zip(offsets[:rows], offsets[1:])):
        held = lengths[members[start:stop]]
        batch["segment_ids"][i, : held.sum()] = np.repeat(np.arange(1, len(held) + 1), held)
        batch["positions"][i, : held.sum()] = np.concatenate([np.arange(n) for n in held])
    return batch | {"target_mask": batch["positions"] > 0}


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _best(once: Callable[[], float], repeats: int = REPEATS) -> float:
    """The fewest seconds of some calls, after one that compiles."""
    once()
    return min(once() for _ in range(repeats))


def _bandwidth(size: int) -> float:
    """Bytes a second that a copy of `size` float32 reads and writes."""
    x = jnp.ones(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds = (_seconds(lambda: copy(x).block_until_ready()) for _ in range(8))
    next(seconds)
    return 2 * x.nbytes / min(seconds)


if __name__ == "__main__":
    serve(Altiplano)
