"""What training must compute, by transformers and torch: loss, gradients, and AdamW step by step.

A batch is a dict of numpy arrays as `trainers.data` makes them: `tokens` [B, T] integers, `target_mask`
[B, T], true (or a weight) at a token that is predicted from those before it; where rows are packed
`segment_ids` [B, T], 0 at padding, and `positions` [B, T]. A packed row is computed document by
document, each in a forward pass of its own: that is what packing has to equal.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaForCausalLM

from models.llama.formats import hf
from models.llama.layout import leaves

Batch = Mapping[str, np.ndarray]


class Reference(NamedTuple):
    """loss = nll_sum / weight; grads: of the loss, float32 by path in our parameters, stacked."""

    loss: float
    nll_sum: float
    weight: float
    grads: dict[str, np.ndarray]


def loss_and_grads(model: LlamaForCausalLM, batches: Sequence[Batch]) -> Reference:
    """The loss of one optimizer step over all its (micro-)batches, with one denominator.

    Args:
        model: is not changed.
        batches: may differ in shape.
    """
    model = _trainable(model)
    nll_sum, weight = _backward(model, batches)
    return Reference(nll_sum / weight, nll_sum, weight, _by_path(model))


def adamw_recipe(
    model: LlamaForCausalLM,
    steps: Sequence[Sequence[Batch]],
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float,
) -> list[float]:
    """The loss before each of some steps of torch.optim.AdamW.

    Args:
        model: is not changed.
        steps: the (micro-)batches of each optimizer step.
        lr: for all steps, or one a step.
        weight_decay: not on norms and biases.
        clip: the largest norm of all gradients together.
    """
    model = _trainable(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)
    losses = []
    for i, batches in enumerate(steps):
        nll_sum, weight = _backward(model, batches)
        losses.append(nll_sum / weight)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = lr if isinstance(lr, float) else lr[i]
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _trainable(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(model).requires_grad_(True)


def _backward(model: LlamaForCausalLM, batches: Sequence[Batch]) -> tuple[float, float]:
    """(sum of the targets' weighted losses, of their weights); leaves the mean's gradients."""
    total = float(sum(batch["target_mask"].sum() for batch in batches))
    nll_sum = 0.0
    with _one_thread():
        for batch in batches:
            for document in _documents(batch):
                if len(document["tokens"]) > 1:
                    nll = _nll(model, document)
                    (nll / total).backward()
                    nll_sum += nll.item()
    return nll_sum, total


def _nll(model: LlamaForCausalLM, document: Batch) -> torch.Tensor:
    tokens, weights, positions = (
        torch.from_numpy(np.array(document[key], dtype))[None]
        for key, dtype in (("tokens", "int64"), ("target_mask", "float32"), ("positions", "int64"))
    )
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
    logprobs = torch.log_softmax(logits[:, :-1], -1)
    picked = logprobs.gather(-1, tokens[:, 1:, None])[..., 0]
    return -(picked * weights[:, 1:]).sum()


def _documents(batch: Batch) -> Iterator[Batch]:
    """One document after the other, without padding; without segment ids a row is one."""
    shape = batch["tokens"].shape
    segments = batch.get("segment_ids", np.ones(shape, np.int32))
    positions = batch.get("positions", np.broadcast_to(np.arange(shape[1]), shape))
    arrays = {k: batch[k] for k in ("tokens", "target_mask")} | {"positions": positions}
    for row in range(shape[0]):
        for segment in np.unique(segments[row]):
            if segment != 0:
                at = segments[row] == segment
                yield {key: value[row][at] for key, value in arrays.items()}


def _by_path(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    config = hf.to_config(model.config.to_dict())
    grads = {name: p.grad.float().numpy() for name, p in model.named_parameters()}
    out = {}
    for leaf in leaves(config, "hf"):
        arrays = [grads.pop(name) for name in leaf.names]
        out[leaf.path] = np.stack(arrays) if leaf.stacked else arrays[0]
    assert not grads, f"no parameter of ours: {sorted(grads)}"
    return out


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: threads cost more than they spare
    try:
        yield
    finally:
        torch.set_num_threads(before)
