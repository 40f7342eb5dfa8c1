"""Bytes that a job holds on one device, phase by phase, by closed forms: nothing is traced or compiled.

A training step has four phases: the loss, the backward pass through the layers, the embedding's gradient
and the update. The fullest makes the peak. XLA for CPU and for accelerators keep other arrays:

- Accelerators: activations stay in their dtype, attention keeps no scores, gradients appear layer by layer.
  For 25 jobs of 0.1 to 70 billion parameters compiled for TPUs, arguments are the same, peaks within 6 %
  and a step's temporaries within 10 %, except for a job that XLA refused (10.4 %) and a model of 135
  million (10.1 %), whose arrays fill no registers.
- CPU: everything is computed in float32, attention keeps its scores, and gradients take memory throughout.
  All devices share the memory: a mesh changes nothing. Peaks are within 10 % of tests/test_phases.py.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from models.llama.layout import rows_of
from trainers.planning.job import Job
from utils.attention import LARGEST_BLOCK, SMALLEST_BLOCK
from utils.cross_entropy import chunk_size
from utils.kernels import LANES
from utils.kvcache import bucket
from utils.sharding import MESH_AXES

F32 = 4
ONE_DEVICE = dict.fromkeys(MESH_AXES, 1)
_MUON_ROUNDS = 5  # of Newton and Schulz, optax's default


class Phase(NamedTuple):
    """One phase of a program: bytes on top of what the program is given, by what they are for."""

    name: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


class Work(NamedTuple):
    """Cost of an update beyond one pass over the parameters: bytes held, FLOPs and bytes sent."""

    held: int = 0
    flops: float = 0.0
    sent: float = 0.0


class Sizes:
    """A job's sizes on one device of a mesh; numbers, not bytes, unless a name says so."""

    def __init__(self, job: Job, mesh: Mapping[str, int]):
        self.job, self.model = job, job.model
        self.data, self.context, self.tensor = mesh["data"], mesh["context"], mesh["tensor"]
        self.fsdp = mesh["fsdp"] * self.context  # both axes share parameters
        self.parts = self.fsdp * self.tensor
        self.size = jnp.dtype(job.dtype).itemsize
        self.shapes = self.model.matrix_shapes
        self.matrices = self.model.n_layers * sum(a * b for a, b in self.shapes.values())
        self.head = self.model.vocab_size * self.model.dim
        self.heads = self.head * (1 if self.model.tie_embeddings else 2)
        self.shared = self.matrices + self.heads
        self.q_dim = self.model.n_heads * self.model.head_dim
        self.kv_dim = self.model.n_kv_heads * self.model.head_dim
        self.vectors = [r for r in rows_of(self.model) if r.stacked and len(r.size) == 1]
        normed = sum(row.path.endswith("q_norm") for row in self.vectors)
        self.qk_norms = normed * 2 * (self.q_dim + self.kv_dim)  # without and with the weight

    def held(self, dtype: str) -> int:
        """Bytes of the device's part of the model: its matrices are shared, its norms are not."""
        numbers = self.shared // self.parts + self.model.n_params - self.shared
        return numbers * jnp.dtype(dtype).itemsize

    def frozen(self) -> int:
        """Bytes of the device's part of a model that is not trained: in eight bits, if asked for."""
        if self.job.quantize is None:
            return self.held(self.job.dtype)
        rows = self.model.n_layers * sum(out for out, _ in self.shapes.values())
        rows += self.heads // self.model.dim
        norms = (self.model.n_params - self.shared) * self.size
        return (self.shared + rows * F32) // self.parts + norms


class Step(Sizes):
    """A training step on an accelerator: the gradients of all micro-batches, and the update.

    Attributes:
        micro: micro-batches.
        at_once: rows of a micro-batch.
        tokens, targets: of a micro-batch. A prompt is computed once for all completions of its row.
        seen: pairs of a query with a key, causal ones twice.
        adapters, scaled: numbers of LoRA's matrices, and of those scaled before the layers' loop.
        trained, trained_matrices: numbers of all trained parameters, and of those that are matrices.
        stays: bytes of the trainer's state, by what they are for.
    """

    def __init__(self, job: Job, mesh: Mapping[str, int]):
        super().__init__(job, mesh)
        # Rows of the batch: prompts with their completions.
        sharers = self.data * self.fsdp // self.context
        rows = -(-(job.batch // job.branches) // sharers)
        self.at_once = min(-(-(job.rows_at_once or job.batch) // sharers), rows)
        self.micro = -(-rows // self.at_once)
        length, prompt = job.length, job.prompt_len if job.samples else 0
        new = job.branches * length
        self.tokens = self.at_once * (prompt + new) // self.context
        self.targets = self.at_once * new // self.context
        seen = prompt**2 + new * (2 * prompt + length)
        self.seen = self.at_once * seen // self.context
        group = 4 * (prompt + 1) + job.branches * (9 * length + 8)
        self.batch_bytes = rows * (group if job.samples else 5 * length)
        self.adapters, self.scaled = self._adapters()
        self.param_size = jnp.dtype(job.param_dtype).itemsize
        self.trained_matrices = self.adapters or self.matrices // self.parts
        self.trained = self.adapters or self.held(job.param_dtype) // self.param_size
        self.stays = self._state()

    def _adapters(self) -> tuple[int, int]:
        """The model dimension, which every pair has in one of its matrices, is shared over fsdp, the
        other dimension over tensor.
        """
        numbers, scaled, rank = 0, 0, self.job.lora_rank
        for name in self.job.lora_targets:
            out_dim, in_dim = self.shapes[name]
            inward = name in ("wo", "w_down")
            pair = self.model.dim // self.fsdp, (in_dim if inward else out_dim) // self.tensor
            numbers += rank * sum(pair)
            scaled += rank * pair[0 if inward else 1]
        return self.model.n_layers * numbers, self.model.n_layers * scaled

    def _state(self) -> dict[str, int]:
        job, state = self.job, {"parameters": self.trained * self.param_size}
        if job.lora_rank:
            state["frozen parameters"] = self.frozen()
        first = self.trained * jnp.dtype(job.state_dtype).itemsize
        optimizer = {
            "adamw": first + self.trained * F32,
            "lion": first,
            "muon": first + (self.trained - self.trained_matrices) * F32,
            "adafactor": self._factored() * F32,
        }
        return state | {"optimizer": optimizer[job.optimizer]}

    def _factored(self) -> int:
        """Adafactor's numbers, whole on each device: a matrix has one per row and per column if both
        sides have 128 or more.
        """
        model, rank = self.model, self.job.lora_rank
        stacks = [(model.n_layers, *shape) for shape in self.shapes.values()]
        stacks += [(model.vocab_size, model.dim)] * (self.heads // self.head)
        stacks += [(model.n_layers, *row.shape(model)) for row in self.vectors]
        if rank:
            sides = [n for name in self.job.lora_targets for n in self.shapes[name]]
            stacks = [(model.n_layers, rank, n) for n in sides]
        numbers = 0
        for shape in stacks:
            *_, second, first = sorted(shape)
            whole = math.prod(shape)
            numbers += whole // first + whole // second if second >= 128 else whole
        return min(numbers, self.adapters) if rank else numbers

    def phases(self) -> list[Phase]:
        """The phases of the step; all of them hold the micro-batches' sums of gradients."""
        sums = {"sums of gradients": self.trained * F32} if self.micro > 1 else {}
        saved = sums | {"activations": self.model.n_layers * self.saved(self.job.remat)}
        after = sums | {"gradients": self.trained * self.param_size}
        return [
            Phase("loss", saved | self._loss()),
            Phase("layers", saved | self._layers()),
            Phase("embedding", after | {"gradient of the embedding": self._embedding()}),
            Phase("update", after | {"update": self._update()}),
        ]

    def saved(self, remat: str) -> int:
        """Bytes that a layer keeps of a micro-batch for its backward pass."""
        model, s = self.model, self.size
        if remat == "block":
            return self.tokens * s * model.dim  # its input
        # Attention's q, k, v, result, whose heads fill registers, and the logarithm of its sums.
        attention = s * (self.q_dim + 2 * self.kv_dim + self._padded) + F32 * model.n_heads
        if remat == "dots":  # and its input, o, gate, up; the result of down is only added
            shared = attention + s * 2 * model.ffn_dim
            return self.tokens * (s * 2 * model.dim + shared // self.tensor)
        # The residual stream twice in float32; normed without and with the weight, and o. Of gate, up
        # and the activation five arrays in float32, and their product.
        shared = attention + s * self.qk_norms + (5 * F32 + s) * model.ffn_dim
        return self.tokens * ((2 * F32 + 5 * s) * model.dim + shared // self.tensor)

    @property
    def _padded(self) -> int:
        """Dimensions of all query heads, each padded to whole registers."""
        return self.model.n_heads * -(-self.model.head_dim // LANES) * LANES

    def _stream(self) -> dict[str, int]:
        """The last layer's output, its gradient and the layers'; a layer's input, its middle, normed."""
        return {"hidden states": 6 * self.tokens * self.model.dim * self.size}

    def _loss(self) -> dict[str, int]:
        vocab = self.model.vocab_size // self.parts
        logits = chunk_size(self.targets * self.fsdp, vocab) * vocab * F32
        cast = self.head // self.parts * (self.size + (0 if self.job.lora_rank else F32))
        return self._stream() | {"logits": logits + cast}

    def _layers(self) -> dict[str, int]:
        # The embedding's gradient comes after those of all layers.
        by_then = self.adapters or (self.matrices + self.head) // self.parts
        again = self._attention() * (self.job.remat == "block")
        return self._stream() | {
            "gradients": by_then * self.param_size,
            "scaled adapters": self.scaled * self.param_size,
            "one layer": again + self._feed_forward(),
        }

    def _attention(self) -> int:
        """Bytes of one layer's attention that is computed again: q, k, v, the result, and in all lanes
        the logarithm of its sums.
        """
        numbers = self.size * (self.q_dim + 2 * self.kv_dim + self._padded)
        return self.tokens * (numbers + F32 * LANES * self.model.n_heads) // self.tensor

    def _feed_forward(self) -> int:
        """Bytes of one layer's feed-forward in its backward pass, at its fullest moment."""
        model = self.model
        wide = self.tokens * model.ffn_dim // self.tensor * self.size
        matrix = model.ffn_dim * model.dim // self.tensor
        gathered = matrix * self.size if self.fsdp > 1 else 0
        again = self.job.remat == "block"
        # Gradients by gate and up; where these are computed again, them too, and LoRA's sum in float32.
        gating = (4 if again else 2) * wide + 2 * gathered
        if self.job.lora_rank:
            return max(gating + wide // self.size * F32, 3 * wide + 3 * gathered)
        # One of the matrices' gradients before it is shared.
        weights = (3 if again else 2) * wide + 2 * gathered + matrix * F32
        # The input's gradient by two matrices, before and after it is added up.
        sums = (3 if again else 2) * wide + gathered + 4 * self.tokens * model.dim * F32
        return max(gating, weights, sums if self.tensor > 1 else 0)

    def _embedding(self) -> int:
        """Bytes of the embedding's gradient while it is summed; a tied head's own is added to it."""
        arrays = 0 if self.job.lora_rank else 2 if self.model.tie_embeddings else 1
        return arrays * self.head // self.parts * self.param_size

    def _update(self) -> int:
        return self.muon().held

    def muon(self) -> Work:
        """Muon's update, an array at a time and not in place; nothing for other optimizers."""
        if self.job.optimizer != "muon" or self.adapters:
            return Work()
        held, flops, sent = 0, 0.0, 0.0
        for shape in self.shapes.values():
            # X · X', whole on each device; its square; and what both make of X. All layers at once.
            short, long = sorted(shape)
            square, stack = (self.model.n_layers * short * n for n in (short, long // self.parts))
            held = max(held, 2 * (square + stack) * F32)
            flops += 2 * _MUON_ROUNDS * short * (2 * stack + square)
            sent += _MUON_ROUNDS * reduced(square * F32, self.parts)
        return Work(held, flops, sent)


class StepOnCPU(Step):
    """A training step on this machine, whose devices share its memory."""

    def __init__(self, job: Job):
        super().__init__(job, ONE_DEVICE)

    def saved(self, remat: str) -> int:
        """Bytes of activations; of "none" in float32, in which norms compute in any dtype."""
        model, numbers = self.model, self.model.dim
        if remat == "dots":  # and q, k, v, o, gate, up; the result of down is only added
            numbers += model.dim + self.q_dim + 2 * self.kv_dim + 2 * model.ffn_dim
        elif remat == "none":
            # The residual stream twice, each normed without and with the weight; q, the weighted values
            # and their quotients; six arrays on the way from gate and up to down.
            numbers = 6 * model.dim + 3 * self.q_dim + self.qk_norms + 6 * model.ffn_dim
        size = F32 if remat == "none" else self.size
        return (self.tokens * numbers + (remat == "none") * self._scores()) * size

    def _scores(self) -> int:
        """Numbers that attention keeps: each block of queries its scores, and keys and values up to its
        end; for completions, which come after a prompt, up to that of the row.
        """
        job, length = self.job, self.job.length
        prompt = job.prompt_len if job.samples else 0
        keys = scores = 0
        for rows, new, start in ((1, prompt, 0), (job.branches, length, prompt)):
            step = min(max(new // 4, SMALLEST_BLOCK), LARGEST_BLOCK)
            for begin in range(0, new, step):
                stop = min(begin + step, new)
                end = start + new if start else stop
                keys += rows * end
                scores += rows * (stop - begin) * end
        return self.at_once * (2 * self.kv_dim * keys + self.model.n_heads * scores)

    def _everywhere(self) -> dict[str, int]:
        """Held in both phases of the backward pass."""
        job, cast = self.job, 0
        if self.size < self.param_size and not job.lora_rank:  # a frozen base has the smaller size
            cast = self.head * self.size
            if job.remat == "none":  # each layer's matrices are saved as they were multiplied with
                cast += self.matrices * self.size
        if job.quantize:
            cast = self.head * F32
        return {
            "gradients": self.trained * self.param_size,
            "gradient of the embedding": self._embedding(),
            "cast weights": cast,
        }

    def _loss(self) -> dict[str, int]:
        """A chunk's logits in float32, and what is made of them while they are there."""
        chunk = chunk_size(self.targets, self.model.vocab_size) * self.model.vocab_size
        # Their gradient is in the activations' dtype.
        narrow = chunk * self.size if self.size < F32 else 0
        # The product that is added to the head's gradient, else the exponentials.
        product = 0 if self.job.lora_rank else self.head
        return self._everywhere() | {"logits": (chunk + max(product, chunk)) * F32 + narrow}

    def _layers(self) -> dict[str, int]:
        """Parts of the backward pass: a block that is computed again is whole for a moment."""
        return self._everywhere() | {"one layer": self.saved("none")}

    def _embedding(self) -> int:
        """Gradients of a tied head and of the embedding, before they are added."""
        both = self.model.tie_embeddings and not self.job.lora_rank
        return both * self.head * self.param_size

    def _update(self) -> int:
        """Bytes of the update, which is in place except for two optimizers."""
        # Adafactor's updates wait for their root mean square; Muon has the new moment, its normed copy
        # and the iteration's result.
        numbers = {"adafactor": self.trained, "muon": 3 * self.trained_matrices}
        return numbers.get(self.job.optimizer, 0) * F32


class Sampling(Sizes):
    """Prefill and decoding, on parameters that stay where they are.

    Attributes:
        prompts, rows: of a batch.
        given: bytes of the parameters that sample.
    """

    def __init__(self, job: Job, mesh: Mapping[str, int], cache_dtype: str):
        super().__init__(job, mesh)
        self.cache_size = jnp.dtype(cache_dtype).itemsize
        self.slots = bucket(job.seq, 64)  # of a row in the cache
        self.prompts = -(-job.batch // job.samples_a_prompt // self.data)
        self.rows = -(-job.batch // self.data)
        self.tokens = self.prompts * job.prompt_len
        wide = max(self.model.ffn_dim * 2, self.q_dim + 2 * self.kv_dim)
        self.wide = self.tokens * wide // self.parts
        name = "policy for sampling" if job.trains else "parameters"
        self.given = {name: self.frozen()}

    def prefill(self) -> list[Phase]:
        """The prompts' forward pass into a cache, which is then copied for all of a prompt's rows."""
        n, stream = self.job.samples_a_prompt, self.tokens * self.model.dim
        # The residual stream and its normed copy; gate and up, or a result in float32, to be added up.
        layer = 2 * stream * self.size + max(stream * F32, self.wide * self.size)
        copies = {"results": self.cache(self.prompts * n)} if n > 1 else {}
        # Logits as they come, whole, masked, and with the sampler's noise.
        logits = 4 * self.logits(self.prompts * n)
        return [
            Phase("layers", copies | {"activations": layer}),
            Phase("sampling", copies | {"logits": logits}),
        ]

    def decode(self) -> list[Phase]:
        """One token per row."""
        return [Phase("sampling", {"logits": 4 * self.logits(self.rows)})]

    def logits(self, rows: int) -> int:
        """Bytes of logits of the rows that a device samples: devices share rows if their number divides them."""
        sharers = next(n for n in (self.parts, self.fsdp, 1) if rows % n == 0)
        return rows // sharers * self.model.vocab_size * F32

    def cache(self, rows: int) -> int:
        """Bytes of the keys and values of one data group's rows."""
        model, heads = self.model, self.model.n_kv_heads
        if heads % self.parts == 0:
            heads //= self.parts
        elif rows % self.fsdp == 0:  # fsdp shares rows then, and tensor alone shares heads
            rows, parts = rows // self.fsdp, self.tensor
            heads = max(heads // parts, 1) if heads % parts == 0 or parts % heads == 0 else heads
        elif self.parts % heads == 0 and model.n_heads % self.parts == 0:
            heads = 1
        return 2 * model.n_layers * rows * heads * self.slots * model.head_dim * self.cache_size


def reduced(size: float, parts: int) -> float:
    """Bytes sent to add up an array of `size` bytes, by rings."""
    return 2 * (1 - 1 / parts) * size
