"""What a job's programs ask of one device, by closed forms: nothing is traced or compiled.

For accelerators: activations stay in their dtype, and attention keeps no scores. Jobs and models are
duck-typed (`planning.Job`, `ModelConfig`). Dimension key: D model dim, V vocab, L layers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from utils.cross_entropy import chunk_size
from utils.hlo import Cost

_F32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One program of a job, on one device.

    Attributes:
        name: train step, prefill or decode step.
        runs: in a step of the job.
        parts: bytes by what they are for; they add up to `peak_bytes`.
        argument_bytes, temp_bytes: what it is given and what it holds meanwhile. What else is held
            beside it is in `parts` alone.
        cost: of one run.
        compile_seconds: tracing included; None: it was not compiled, and all this is estimated.
        hurried: compiled without the passes that keep arrays on the chip: a run moves fewer bytes.
    """

    name: str
    runs: int
    parts: dict[str, int]
    argument_bytes: int
    temp_bytes: int
    cost: Cost
    compile_seconds: float | None = None
    hurried: bool = False

    @property
    def peak_bytes(self) -> int:
        """All that is held while it runs."""
        return sum(self.parts.values())


def estimate_job(job: Any, mesh: Mapping[str, int]) -> list[Program]:
    """The programs of a job.

    Args:
        job: see `planning.Job`.
        mesh: sizes of data, fsdp and tensor.
    """
    one = _Estimate(job, mesh)
    programs = [one.prefill(), one.decode()] if job.samples else []
    return programs + ([one.train()] if job.trains else [])


class _Estimate:
    def __init__(self, job: Any, mesh: Mapping[str, int]):
        self.job, self.model = job, job.model
        self.data, self.fsdp, self.tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
        self.size = jnp.dtype(job.dtype).itemsize
        shapes = self.model.matrix_shapes
        self.layer = sum(a * b for a, b in shapes.values())  # numbers of a layer's matrices
        self.head = self.model.vocab_size * self.model.dim
        self.stays: dict[str, int] = {}
        if job.trains:
            self.adapters = self.model.n_layers * sum(
                job.lora_rank * sum(shape) for shape in shapes.values()
            )
            self.trained = self.adapters or self.model.n_params
            self.stays = self._state()

    def _state(self) -> dict[str, int]:
        job, parts = self.job, self.fsdp * self.tensor
        # Of an adapter's pair only one matrix has each of the mesh's axes.
        share = self.trained // (math.isqrt(parts) if job.lora_rank else parts)
        first = jnp.dtype(job.state_dtype).itemsize
        moments = {"adamw": first + _F32, "lion": first, "muon": first, "adafactor": 0}
        state = {"parameters": share * jnp.dtype(job.param_dtype).itemsize}
        if job.lora_rank:
            state["frozen parameters"] = self.model.n_params // parts * self.size
        return state | {"optimizer": share * moments[job.optimizer]}

    def train(self) -> Program:
        """A training step: gradients of all micro-batches, and the update."""
        job, model, parts = self.job, self.model, self.fsdp * self.tensor
        rows = self.data * self.fsdp
        tokens = -(-job.batch * job.seq // rows)
        at_once = -(-min(job.micro_batch_size or job.batch, job.batch) * job.seq // rows)
        share = self.trained // parts
        gradients = share * (_F32 if at_once < tokens else jnp.dtype(job.param_dtype).itemsize)
        layer = self.layer // self.tensor
        chunk = chunk_size(at_once, model.vocab_size) * model.vocab_size * _F32 // self.tensor
        head = self.head // self.tensor * (self.size + (0 if job.lora_rank else _F32))
        held = {
            "gradients": gradients,
            "activations": at_once * model.n_layers * self._saved(job.remat) * self.size,
            "logits": 2 * chunk + head,
            "one layer": 2 * layer * self.size + at_once * self._saved("none") * self.size,
        }
        batch = {"batch": tokens * 8}
        again = job.remat == "block"
        products = (2 if job.lora_rank else 4) + 2 + 2 * again
        matrices = model.n_layers * layer
        flops = tokens * (products * matrices + (products - 2 * again) * self.head // self.tensor)
        passes = 3 + again  # forward, and both products of the backward pass
        attention = tokens * job.seq * model.n_heads * model.head_dim // self.tensor
        flops += 2 * (1 + again + 2.5) * model.n_layers * attention
        micro = -(-tokens // at_once)
        moved = micro * passes * (matrices + self.head // self.tensor) * self.size
        moved += tokens * model.n_layers * self._saved("none") * self.size * passes
        moved += 2 * sum(self.stays.values()) + 2 * share * _F32
        weights = (matrices + self.head // self.tensor) * self.size
        between = {
            "all-gather": micro * (2 + again) * weights * (self.fsdp - 1) / self.fsdp,
            "reduce-scatter": 0 if job.lora_rank else micro * weights * (1 - 1 / self.fsdp),
            "all-reduce": self._row_sums(tokens, self.tensor, 4 + 2 * again)
            + 2 * (1 - 1 / self.data) * gradients,
        }
        return self._program("train step", 1, self.stays | batch, held, (flops, moved, between))

    def prefill(self) -> Program:
        """The prompts' forward pass into a cache."""
        job, prompts = self.job, -(-self.job.batch // self.job.samples_a_prompt // self.data)
        tokens = prompts * job.prompt_len
        logits = prompts * self.model.vocab_size * _F32
        held = {"activations": tokens * self._saved("none") * self.size, "logits": 2 * logits}
        attention = tokens * job.prompt_len * self.model.n_heads * self.model.head_dim
        flops = 2 * tokens * self.model.n_layers * self.layer + 2 * prompts * self.head
        flops += 2 * self.model.n_layers * attention
        moved = self._weights + tokens * self.model.n_layers * self._saved("none") * self.size
        between = {"all-reduce": self._row_sums(tokens, self._parts, 2)}
        given = self.stays | self._sampled
        return self._program("prefill", 1, given, held, (flops / self._parts, moved, between))

    def decode(self) -> Program:
        """One token a row."""
        job, rows = self.job, -(-self.job.batch // self.data)
        flops = 2 * rows * (self.model.n_layers * self.layer + self.head)
        flops += 4 * rows * job.seq * self.model.n_layers * self.model.n_heads * self.model.head_dim
        held = {"logits": 4 * rows * self.model.vocab_size * _F32}
        moved = self._weights + self._cache
        between = {"all-reduce": self._row_sums(rows, self._parts, 2)}
        between["all-gather"] = rows * self.model.vocab_size * _F32 * (1 - 1 / self._parts)
        given, runs = self.stays | self._sampled, job.seq - job.prompt_len - 1
        return self._program(
            "decode step", runs, given, held, (flops / self._parts, moved, between)
        )

    @property
    def _parts(self) -> int:
        """Devices that a decoding model lies on."""
        return self.fsdp * self.tensor

    @property
    def _weights(self) -> int:
        return self.model.n_params * self.size // self._parts

    @property
    def _cache(self) -> int:
        kv_heads, parts = self.model.n_kv_heads, self._parts
        heads = max(kv_heads // parts, 1)
        if kv_heads % parts and (parts % kv_heads or self.model.n_heads % parts):
            heads = kv_heads  # each device has all of them
        rows = -(-self.job.batch // self.data)
        return (
            2 * self.model.n_layers * rows * heads * self.job.seq * self.model.head_dim * self.size
        )

    @property
    def _sampled(self) -> dict[str, int]:
        name = "policy for sampling" if self.job.trains else "parameters"
        return {name: self._weights, "KV cache": self._cache}

    def _saved(self, remat: str) -> int:
        """Numbers that a layer keeps a token for its backward pass."""
        model, tensor = self.model, self.tensor
        q_dim, kv_dim = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
        if remat == "block":
            return model.dim
        if remat == "dots":
            return 2 * model.dim + (q_dim + 2 * kv_dim + 2 * model.ffn_dim) // tensor
        return 6 * model.dim + (3 * q_dim + 4 * kv_dim + 6 * model.ffn_dim) // tensor

    def _row_sums(self, tokens: int, parts: int, times: int) -> float:
        """Bytes sent to add up a layer's results, so many times a layer, over all layers."""
        one = 2 * (1 - 1 / parts) * tokens * self.model.dim * self.size
        return times * self.model.n_layers * one

    def _program(self, name, runs, given, held, work) -> Program:
        flops, moved, between = work
        return Program(
            name=name,
            runs=runs,
            parts={part: int(n) for part, n in (given | held).items() if n},
            argument_bytes=int(sum(given.values())),
            temp_bytes=int(sum(held.values())),
            cost=Cost(
                flops=float(flops),
                bytes_accessed=float(moved),
                collectives={kind: n for kind, n in between.items() if n},
                kernels={},
                open_loops=(),
            ),
        )
