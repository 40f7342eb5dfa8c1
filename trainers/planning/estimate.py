"""What a job's programs ask of one device, by closed forms: nothing is traced or compiled.

For accelerators: activations stay in their dtype, and attention keeps no scores. Each term is an array
that is alive when most is, a product, or a collective, as in the programs that XLA for TPU compiles.
Next to those, over 25 jobs of 0.1 to 70 billion parameters: arguments and FLOPs are the same (Muon's are 3 %
more), all peaks within 6 % and a training step's temporaries within 10 %, but for a job that XLA refused
(10.4 %) and a model of 135 million (10.1 %), whose arrays fill no registers. So are bytes sent, but where
XLA has its own way, by models of time that it keeps to itself: a ring of n may pass a matrix on n + 1
times, and not n - 1 (rings of four: a quarter more in all), and on v5p 64 devices with 128 columns each
gathered by adding up whole matrices, at twice the bytes. Bytes moved are those that must be, a half of
what programs move. Jobs and models are duck-typed (`planning.Job`, `ModelConfig`).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from trainers.planning.hlo import Cost, Program
from trainers.planning.train_memory import factored
from utils.cross_entropy import chunk_size
from utils.kernels import LANES
from utils.kvcache import bucket

_F32 = 4
_MUON_ROUNDS = 5  # of Newton and Schulz, optax's default


def estimate_job(job: Any, mesh: Mapping[str, int]) -> list[Program]:
    """The programs of a job.

    Args:
        job: see `planning.Job`.
        mesh: sizes of data, fsdp, context and tensor.
    """
    sampling, training = _Sampling(job, mesh), _Training(job, mesh) if job.trains else None
    stays = training.stays if training else {}
    programs = [sampling.prefill(stays), sampling.decode(stays)] if job.samples else []
    return programs + ([training.step()] if training else [])


class _Closed:
    """Sizes that all closed forms need; numbers, not bytes, unless a name says so."""

    def __init__(self, job: Any, mesh: Mapping[str, int]):
        self.job, self.model = job, job.model
        self.data, self.context, self.tensor = mesh["data"], mesh["context"], mesh["tensor"]
        self.fsdp = mesh["fsdp"] * self.context  # along both lie parameters
        self.parts = self.fsdp * self.tensor
        self.size = jnp.dtype(job.dtype).itemsize
        self.shapes = self.model.matrix_shapes
        self.matrices = self.model.n_layers * sum(a * b for a, b in self.shapes.values())
        self.head = self.model.vocab_size * self.model.dim
        self.heads = self.head * (1 if self.model.tie_embeddings else 2)
        self.q_dim = self.model.n_heads * self.model.head_dim
        self.kv_dim = self.model.n_kv_heads * self.model.head_dim

    @property
    def _padded(self) -> int:
        """All query heads' dims where each head fills registers."""
        return self.model.n_heads * -(-self.model.head_dim // LANES) * LANES

    def held(self, dtype: Any) -> int:
        """Bytes of a device's part of the model: its matrices are shared, its norms are not."""
        shared = self.matrices + self.heads
        numbers = shared // self.parts + self.model.n_params - shared
        return numbers * jnp.dtype(dtype).itemsize

    def row_sums(self, tokens: int, parts: int, times: int) -> float:
        """Bytes sent to add up a layer's results in float32, so many times a layer, over all layers."""
        return times * self.model.n_layers * _reduced(tokens * self.model.dim * _F32, parts)


class _Training(_Closed):
    """A training step: the gradients of all micro-batches, and the update."""

    def __init__(self, job: Any, mesh: Mapping[str, int]):
        super().__init__(job, mesh)
        # Rows of the batch: prompts with their completions.
        sharers = self.data * self.fsdp // self.context
        own = lambda rows: -(-rows // sharers)
        rows = own(job.batch // job.branches)
        at_once = min(own(job.rows_at_once or job.batch), rows)
        self.micro = -(-rows // at_once)
        # Of a micro-batch, on one device. A prompt is computed once, and so are its completions' targets.
        length = job.seq - job.prompt_len if job.samples else job.seq
        tokens = job.prompt_len + job.branches * length if job.samples else length
        self.tokens = at_once * tokens // self.context
        self.targets = at_once * job.branches * length // self.context
        seen = tokens**2  # pairs of a query with a key, causal ones twice
        if job.samples:
            seen = job.prompt_len**2 + (tokens - job.prompt_len) * (2 * job.prompt_len + length)
        self.seen = at_once * seen // self.context
        group = 4 * (job.prompt_len + 1) + job.branches * (9 * length + 8)
        self.batch_bytes = rows * (group if job.samples else 5 * length)
        self.adapters, self.scaled = self._adapters()
        self.param_size = jnp.dtype(job.param_dtype).itemsize
        self.stays = self._state()

    def _adapters(self) -> tuple[int, int]:
        """Numbers of LoRA's matrices on a device, and of those that are scaled before the loop.

        Of each pair one matrix has the model dimension, which lies on fsdp, the other one tensor's.
        """
        all_, scaled, dim, rank = 0, 0, self.model.dim, self.job.lora_rank
        for name, (out_dim, in_dim) in self.shapes.items():
            inward = name in ("wo", "w_down")
            other = in_dim if inward else out_dim
            pair = dim // self.fsdp, other // self.tensor
            all_ += rank * sum(pair)
            scaled += rank * pair[0 if inward else 1]
        return self.model.n_layers * all_, self.model.n_layers * scaled

    def _state(self) -> dict[str, int]:
        job, first = self.job, jnp.dtype(self.job.state_dtype).itemsize
        if job.lora_rank:
            state = {"parameters": self.adapters * self.param_size}
            state["frozen parameters"] = self.held(job.dtype)
        else:
            state = {"parameters": self.held(job.param_dtype)}
        share = state["parameters"] // self.param_size
        if job.optimizer == "adafactor":  # has sums of rows and columns, whole on each device
            second = self.adapters or factored(self.shapes, self.model, None)
            return state | {"optimizer": second * _F32}
        rest = share - (self.adapters or self.matrices // self.parts)
        second = {"adamw": share, "lion": 0, "muon": rest}[job.optimizer]
        return state | {"optimizer": share * first + second * _F32}

    def step(self) -> Program:
        """The whole step."""
        given = self.stays | {"batch": self.batch_bytes}
        held = max(self._phases(), key=_total)
        return _program("train step", 1, given, held, (self._flops(), self._moved(), self._sent()))

    def _phases(self) -> list[dict[str, int]]:
        """What is held on top of the state, in each phase."""
        job, model, D = self.job, self.model, self.model.dim
        share = self.stays["parameters"] // self.param_size
        sums = {"sums of gradients": share * _F32} if self.micro > 1 else {}
        saved = {"activations": self.tokens * model.n_layers * self._saved(job.remat)}
        # The last layer's output, its gradient and the layers'; a layer's input, its middle, normed.
        stream = {"hidden states": 6 * self.tokens * D * self.size}
        # The embedding's gradient comes after those of all layers.
        by_then = self.adapters or (self.matrices + self.head) // self.parts
        layers = {
            "gradients": by_then * self.param_size,
            "scaled adapters": self.scaled * self.param_size,
            "one layer": self._attention() * (job.remat == "block") + self._feed_forward(),
        }
        logits = chunk_size(self.targets * self.fsdp, model.vocab_size // self.parts)
        logits *= model.vocab_size // self.parts * _F32
        cast = self.head // self.parts * (self.size + (0 if job.lora_rank else _F32))
        gradients = {"gradients": share * self.param_size}
        return [
            sums | saved | stream | {"logits": logits + cast},
            sums | saved | stream | layers,
            sums | gradients | {"gradient of the embedding": self._embedding()},
            sums | gradients | {"update": self._update()[0]},
        ]

    def _embedding(self) -> int:
        """Bytes of the embedding's gradient while it is summed; a tied head's own is added to it."""
        arrays = 0 if self.job.lora_rank else 2 if self.model.tie_embeddings else 1
        return arrays * self.head // self.parts * self.param_size

    def _update(self) -> tuple[int, float, float]:
        """(bytes held, FLOPs, bytes sent) of an update that is not in place, an array at a time: Muon's."""
        held, flops, sent = 0, 0.0, 0.0
        if self.job.optimizer != "muon" or self.adapters:
            return held, flops, sent
        for shape in self.shapes.values():
            # X · X', whole on each device; its square; and what both make of X. All layers at once.
            short, long = sorted(shape)
            square, stack = (self.model.n_layers * short * n for n in (short, long // self.parts))
            held = max(held, 2 * (square + stack) * _F32)
            flops += 2 * _MUON_ROUNDS * short * (2 * stack + square)
            sent += _MUON_ROUNDS * _reduced(square * _F32, self.parts)
        return held, flops, sent

    def _saved(self, remat: str) -> int:
        """Bytes that a layer keeps a token for its backward pass."""
        model, s, t = self.model, self.size, self.tensor
        if remat == "block":
            return s * model.dim  # its input
        # Attention's q, k, v, result, whose heads fill registers, and the logarithm of its sums.
        attention = s * (self.q_dim + 2 * self.kv_dim + self._padded) + _F32 * model.n_heads
        if remat == "dots":  # and its input, o, gate, up; the result of down is only added
            return s * 2 * model.dim + (attention + s * 2 * model.ffn_dim) // t
        # The residual stream twice in float32; normed without and with the weight, and o. Of gate, up
        # and the activation five arrays in float32, and their product.
        return (2 * _F32 + 5 * s) * model.dim + (attention + (5 * _F32 + s) * model.ffn_dim) // t

    def _attention(self) -> int:
        """Bytes of one layer's attention that is computed again: q, k, v, the result, and in all lanes
        the logarithm of its sums.
        """
        numbers = self.size * (self.q_dim + 2 * self.kv_dim + self._padded)
        return self.tokens * (numbers + _F32 * LANES * self.model.n_heads) // self.tensor

    def _feed_forward(self) -> int:
        """Bytes of one layer's feed-forward in its backward pass, at its fullest moment."""
        model, lora = self.model, self.job.lora_rank
        wide = self.tokens * model.ffn_dim // self.tensor * self.size
        matrix = model.ffn_dim * model.dim // self.tensor
        gathered = matrix * self.size if self.fsdp > 1 else 0
        again = self.job.remat == "block"
        # Gradients by gate and up; where these are computed again, them too, and LoRA's sum in float32.
        gating = (4 if again else 2) * wide + 2 * gathered
        if lora:
            gating += wide // self.size * _F32
            return max(gating, 3 * wide + 3 * gathered)
        # One of the matrices' gradients before it is shared.
        weights = (3 if again else 2) * wide + 2 * gathered + matrix * _F32
        # The input's gradient by two matrices, before and after it is added up.
        sums = (3 if again else 2) * wide + gathered + 4 * self.tokens * model.dim * _F32
        return max(gating, weights, sums if self.tensor > 1 else 0)

    def _flops(self) -> float:
        """Of matrix products and attention kernels."""
        job, model, lora = self.job, self.model, bool(self.job.lora_rank)
        again = job.remat == "block"
        down = model.n_layers * model.dim * model.ffn_dim  # its product is not needed again
        layers = (4 if lora else 6) * self.matrices + 2 * again * (self.matrices - down)
        sides = sum(sum(shape) for shape in self.shapes.values())
        layers += (6 + 2 * again) * model.n_layers * job.lora_rank * sides
        # GRPO computes logits again: what a log-prob's gradient is worth comes from all of them.
        head = ((4 if lora else 6) + 2 * job.samples) * self.head
        # Products of all pairs, half of which are seen: two forward; backward seven in two kernels,
        # which both compute the scores again.
        attention = (2 + 2 * again + 7) * self.seen * self.q_dim * model.n_layers
        total = self.tokens * layers + self.targets * head + attention
        return self.micro * total / self.tensor + self._update()[1]

    def _sent(self) -> dict[str, float]:
        """Bytes that a device sends, by kind. Float32 is what is added up."""
        job, model, D = self.job, self.model, self.model.dim
        lora, micro, f = bool(job.lora_rank), self.micro, self.fsdp
        others = 1 - 1 / f
        layers, head = self.matrices // self.tensor, self.head // self.tensor
        # Each layer's matrices for the forward and for the backward pass.
        gathered = 2 * others * layers * self.size
        # A chunk's hidden states go to all that share the vocabulary, their gradients come back.
        gathered += (1 + job.samples) * (f - 1) * self.targets * D * self.size
        added = 0 if lora else others * layers * _F32
        added += (f - 1) * self.targets * D * _F32
        sums = 0.0
        exchanged = (1 if lora else 2) * others * self.tokens * D * self.size
        # Queries, keys, values and what attention gives, for a row's tokens to meet; their gradients.
        met = self.tokens * model.n_layers * self.size // self.tensor
        again, away = job.remat == "block", 1 - 1 / self.context
        exchanged += (2 + again) * away * 2 * self.q_dim * met
        if model.n_kv_heads % (self.context * self.tensor) == 0:
            exchanged += (2 + again) * away * 2 * self.kv_dim * met
        else:  # of which each device needs the same as others: all go to all
            gathered += (1 + again) * (self.context - 1) * 2 * self.kv_dim * met
            exchanged += away * 2 * self.q_dim * met
        if lora:
            exchanged += others * head // f * self.size
            sums += _reduced(self.adapters * _F32, self.data * f)
        else:
            exchanged += 2 * others * head // f * self.param_size
            copied = (layers + head) // f * _F32 + head // f * self.param_size
            sums += _reduced(copied, self.data)
        if self.tensor > 1:  # o and down; backward q, k, v as one, gate, up as one; o again
            sums += self.row_sums(self.tokens, self.tensor, 4 + (job.remat == "block"))
            sums += _reduced(self.targets * D * _F32 + self.tokens * D * self.size, self.tensor)
        return {
            "all-gather": micro * gathered,
            "reduce-scatter": micro * added,
            "all-to-all": micro * exchanged,
            "all-reduce": micro * sums + self._update()[2],
        }

    def _moved(self) -> float:
        """Bytes to and from main memory: weights in each pass, activations, the state."""
        passes = 3 + (self.job.remat == "block")  # forward, and both products of the backward pass
        weights = (self.matrices + self.head) // self.tensor * self.size
        activations = self.tokens * self.model.n_layers * self._saved("none")
        return self.micro * passes * (weights + activations) + 2 * sum(self.stays.values())


class _Sampling(_Closed):
    """Prefill and decoding, on parameters that stay where they are."""

    def __init__(self, job: Any, mesh: Mapping[str, int]):
        super().__init__(job, mesh)
        self._slots = bucket(job.seq, 64)  # of a row in the cache

    def prefill(self, stays: dict[str, int]) -> Program:
        """The prompts' forward pass into a cache, which is then copied for all of a prompt's rows."""
        job, model, n = self.job, self.model, self.job.samples_a_prompt
        prompts = -(-job.batch // n // self.data)
        tokens = prompts * job.prompt_len
        wide = tokens * max(model.ffn_dim * 2, self.q_dim + 2 * self.kv_dim) // self.parts
        # The residual stream and its normed copy; gate and up, or a result in float32, to be added up.
        stream = 2 * tokens * model.dim * self.size
        layer = stream + max(tokens * model.dim * _F32, wide * self.size)
        held = {"results": self._cache(prompts * n)} if n > 1 else {}
        # Logits as they come, whole, masked, and with the sampler's noise.
        logits = 4 * self._own_logits(prompts * n)
        held |= max({"activations": layer}, {"logits": logits}, key=_total)
        flops = 2 * tokens * self.matrices + 2 * prompts * self.head
        flops += 2 * model.n_layers * tokens * job.prompt_len * self.q_dim
        moved = self.held(job.dtype) + 6 * model.n_layers * (tokens * model.dim + wide) * self.size
        between = {
            "all-reduce": self.row_sums(tokens, self.parts, 2),
            "all-to-all": self._own_logits(prompts) * (1 - 1 / self.parts),
        }
        cost = flops / self.parts, moved, between
        return _program("prefill", 1, self._given(prompts), held, cost, stays)

    def decode(self, stays: dict[str, int]) -> Program:
        """One token a row."""
        job, model, rows = self.job, self.model, -(-self.job.batch // self.data)
        flops = 2 * rows * (self.matrices + self.head)
        flops += 4 * rows * self._slots * model.n_layers * self.q_dim
        held = {"logits": 4 * self._own_logits(rows)}
        between = {
            "all-reduce": self.row_sums(rows, self.parts, 2),
            "all-to-all": self._own_logits(rows) * (1 - 1 / self.parts),
        }
        cost = flops / self.parts, self.held(job.dtype) + self._cache(rows), between
        runs = job.seq - job.prompt_len - 1
        return _program("decode step", runs, self._given(rows), held, cost, stays)

    def _own_logits(self, rows: int) -> int:
        """Bytes of the rows that a device samples: of as many devices as divide them."""
        sharers = next(n for n in (self.parts, self.fsdp, 1) if rows % n == 0)
        return rows // sharers * self.model.vocab_size * _F32

    def _cache(self, rows: int) -> int:
        """Bytes of so many rows' keys and values, of a device's rows of the data axis."""
        model, heads = self.model, self.model.n_kv_heads
        if heads % self.parts == 0:
            heads //= self.parts
        elif rows % self.fsdp == 0:  # rows lie on fsdp then, and heads on tensor alone
            rows, parts = rows // self.fsdp, self.tensor
            heads = max(heads // parts, 1) if heads % parts == 0 or parts % heads == 0 else heads
        elif self.parts % heads == 0 and model.n_heads % self.parts == 0:
            heads = 1
        return 2 * model.n_layers * rows * heads * self._slots * model.head_dim * self.size

    def _given(self, rows: int) -> dict[str, int]:
        name = "policy for sampling" if self.job.trains else "parameters"
        return {name: self.held(self.job.dtype), "KV cache": self._cache(rows)}


def _total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def _reduced(size: float, parts: int) -> float:
    """Bytes sent to add up an array of `size` bytes, by rings."""
    return 2 * (1 - 1 / parts) * size


def _program(name, runs, given, held, work, beside=None) -> Program:
    """What is held beside a program is no argument of it."""
    flops, moved, between = work
    parts = (beside or {}) | given | held
    return Program(
        name=name,
        runs=runs,
        parts={part: int(n) for part, n in parts.items() if n},
        argument_bytes=int(sum(given.values())),
        temp_bytes=int(sum(held.values())) - held.get("results", 0),
        cost=Cost(
            flops=float(flops),
            bytes_accessed=float(moved),
            collectives={kind: n for kind, n in between.items() if n},
            kernels={},
            open_loops=(),
        ),
    )
