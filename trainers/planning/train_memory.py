"""What a training step will hold in memory, by parts, from configs alone.

Closed forms, checked against XLA's own account of the compiled step (tests/test_train_memory.py).
Configs are duck-typed: `ModelConfig`, `TrainConfig`, `LoRAConfig` and whatever has their fields.
Dimension key: T tokens of a micro-batch, D model dim, V vocab, F ffn dim, N heads, K kv heads, H head
dim, L layers.
"""

import math
from typing import Any

import jax.numpy as jnp

from utils.attention import LARGEST_BLOCK, SMALLEST_BLOCK
from utils.cross_entropy import chunk_size
from utils.errors import ConfigError
from utils.memory import available_bytes, human

_F32 = 4


def training_bytes(
    model: Any,
    train: Any,
    *,
    rows: int,
    seq_len: int,
    dtype: Any = "float32",
    remat: str = "none",
    lora: Any = None,
    frozen_dtype: Any = None,
) -> dict[str, int]:
    """Bytes of a training step at its peak, by what they are for; they add up to the peak.

    Args:
        model: the ModelConfig.
        train: the TrainConfig: optimizer, micro_batch_size, param_dtype, state_dtype.
        rows: of a batch.
        seq_len: tokens of a row.
        dtype: of activations.
        remat: as in `LLaMa`: none, dots or block.
        lora: the LoRAConfig, or None.
        frozen_dtype: of the model's parameters next to LoRA; default: train.param_dtype.
    """
    size = lambda kind: jnp.dtype(kind).itemsize
    param_size = size(train.param_dtype)
    tokens = min(train.micro_batch_size or rows, rows) * seq_len
    shapes = model.matrix_shapes
    head = model.vocab_size * model.dim
    if lora is None:
        trained, matrices = model.n_params, model.n_layers * sum(a * b for a, b in shapes.values())
    else:
        trained = matrices = model.n_layers * sum(
            lora.rank * sum(shapes[name]) for name in lora.targets
        )
    parts = {"parameters": trained * param_size}
    if lora is not None:
        parts["frozen parameters"] = model.n_params * size(frozen_dtype or train.param_dtype)
    parts["optimizer"] = _moment_bytes(train, trained, matrices, shapes, model, lora)
    parts["gradients"] = trained * param_size
    if train.micro_batch_size and train.micro_batch_size < rows:
        parts["sums of gradients"] = trained * _F32

    # What is alive on top of that, in each phase: the largest phase makes the peak.
    backward = {
        "activations": tokens * model.n_layers * _saved_floats(model, seq_len, remat) * _F32
    }
    if lora is None and model.tie_embeddings:
        # Gradients of the head and of the embedding, before they are added.
        backward["gradient of the embedding"] = head * param_size
    logits = dict(backward, logits=_logits_bytes(model, tokens, size(dtype), lora is None))
    if size(dtype) < param_size:
        backward["cast weights"] = logits["cast weights"] = head * size(dtype)
        if remat == "none":  # each layer's matrices are saved as they were multiplied with
            copies = model.n_layers * sum(a * b for a, b in shapes.values()) * _F32
            backward["cast weights"] += copies
            logits["cast weights"] += copies
    frozen_size = size(frozen_dtype or train.param_dtype) if lora is not None else param_size
    if (
        frozen_size < _F32
    ):  # XLA on CPU multiplies in float32, and widens all layers before the loop
        backward["widened weights"] = logits["widened weights"] = model.n_params * _F32
    # A block that is computed again is whole for a moment.
    block = tokens * _saved_floats(model, seq_len, "none") * _F32
    recomputed = dict(backward, **{"one layer": block})
    update = {"update": _update_floats(train.optimizer, trained, matrices) * _F32}
    if param_size < _F32 and "sums of gradients" not in parts:  # the update is in float32
        update["update"] += trained * _F32
    return parts | max((logits, recomputed, update), key=lambda phase: sum(phase.values()))


def peak_bytes(parts: dict[str, int]) -> int:
    """Bytes of the whole step."""
    return sum(parts.values())


def check_training_fits(parts: dict[str, int]) -> None:
    """Raises ConfigError, with every part and what would make it smaller, if memory cannot hold them.

    Args:
        parts: from `training_bytes`.
    """
    available = available_bytes()
    if available is None or peak_bytes(parts) <= available:
        return
    listed = ", ".join(f"{name} {human(n)}" for name, n in parts.items())
    raise ConfigError(
        f"out of memory: a step needs {human(peak_bytes(parts))} ({listed}), {human(available)} are "
        "available; use a smaller micro_batch_size or seq_len, remat=block, or LoRA"
    )


def _saved_floats(model: Any, seq_len: int, remat: str) -> int:
    """Numbers that a layer keeps per token for the backward pass.

    All count as float32: on CPU XLA widens bfloat16 ones in one go before the loop over layers.
    """
    dim, ffn = model.dim, model.ffn_dim
    q_dim, kv_dim = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    if remat == "block":
        return dim  # the block's input
    if remat == "dots":  # and q, k, v, o, gate, up; the result of down is only added
        return dim + q_dim + 2 * kv_dim + dim + 2 * ffn
    # The residual stream twice, each normed without and with the weight; q, the weighted values and
    # their quotients; six arrays on the way from gate and up to down.
    floats = 6 * dim + 3 * q_dim + 6 * ffn
    # Each block of queries keeps its scores and the keys and values up to its end.
    step = min(max(seq_len // 4, SMALLEST_BLOCK), LARGEST_BLOCK)
    ends = [min(start + step, seq_len) for start in range(0, seq_len, step)]
    keys = sum(ends)
    scores = sum((end - start) * end for start, end in zip([0, *ends], ends))
    return floats + (2 * kv_dim * keys + model.n_heads * scores) // seq_len


def _logits_bytes(model: Any, tokens: int, size: int, head_trained: bool) -> int:
    """A chunk's logits in float32, and what is made from them while they are there."""
    chunk = chunk_size(tokens, model.vocab_size) * model.vocab_size * _F32
    narrow = chunk * size // _F32 if size < _F32 else 0  # their gradient in the activations' dtype
    # The product that is added to the head's gradient, else the exponentials.
    product = model.vocab_size * model.dim * _F32 if head_trained else 0
    return chunk + narrow + max(product, chunk)


def _moment_bytes(
    train: Any, trained: int, matrices: int, shapes: dict, model: Any, lora: Any
) -> int:
    """Bytes of optimizer state: first moments of state_dtype, second ones in float32."""
    first = jnp.dtype(train.state_dtype).itemsize
    if train.optimizer == "adafactor":
        return factored(shapes, model, lora) * _F32
    second = {"adamw": trained, "lion": 0, "muon": trained - matrices}[train.optimizer]
    return trained * first + second * _F32


def factored(shapes: dict, model: Any, lora: Any) -> int:
    """Adafactor's numbers: a matrix has one a row and a column if both sides have 128 or more."""
    stacks = [(model.n_layers, *shape) for shape in shapes.values()]
    stacks += [(model.vocab_size, model.dim)] * (1 if model.tie_embeddings else 2)
    stacks += [(model.n_layers, model.dim)] * 2  # norms
    if lora is not None:
        pairs = [(lora.rank, n) for name in lora.targets for n in shapes[name]]
        stacks = [(model.n_layers, *pair) for pair in pairs]
    total = 0
    for shape in stacks:
        *_, second, first = sorted(shape)
        whole = math.prod(shape)
        total += whole // first + whole // second if second >= 128 else whole
    return total


def _update_floats(optimizer: str, trained: int, matrices: int) -> int:
    """Numbers held while parameters are updated, beside gradients and moments."""
    if optimizer == "adafactor":  # updates wait for their root mean square
        return trained
    if optimizer == "muon":  # the new moment, its normed copy, the iteration's result
        return 3 * matrices
    return 0  # in place, a fused loop an array
