"""What GRPO must compute, by torch and from the papers' equations, a completion at a time.

Nothing is padded here and nothing masked: a completion is as long as its tokens, and one that has
none that count is empty.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LlamaForCausalLM


class Completion(NamedTuple):
    """Of the tokens that count: the policy's log-probs [T], and what they are compared with."""

    logprobs: torch.Tensor
    old: torch.Tensor
    sampler: torch.Tensor
    ref: torch.Tensor
    advantage: float


class Equations(NamedTuple):
    """Which of the papers' equations; the names are those of GRPOConfig."""

    loss: str
    ratio_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    beta: float = 0.0
    kl: str = "ratio_k3"
    tis_cap: float | None = None
    max_completion_len: int = 512


def step_loss(micro_batches: Sequence[Sequence[Completion]], eq: Equations) -> torch.Tensor:
    """The loss of one optimizer step, of which all micro-batches are parts."""
    completions = [completion for micro_batch in micro_batches for completion in micro_batch]
    losses = {id(c): token_losses(c, eq) for c in completions}
    total = lambda some: sum((losses[id(c)].sum() for c in some), torch.zeros(()))
    tokens = lambda some: sum(len(c.logprobs) for c in some)
    if eq.loss == "grpo":  # 2402.03300, eq. 3: 1/G Σ 1/|o| Σ
        means = [losses[id(c)].sum() / max(len(c.logprobs), 1) for c in completions]
        return sum(means) / len(completions)
    if eq.loss == "dapo":  # 2503.14476, eq. 8: 1/Σ|o| Σ Σ
        return total(completions) / tokens(completions)
    if eq.loss == "dr_grpo":  # 2503.20783, listing 1: a constant
        return total(completions) / (len(completions) * eq.max_completion_len)
    means = [total(some) / tokens(some) for some in micro_batches if tokens(some)]
    return sum(means) / len(means)


def token_losses(c: Completion, eq: Equations) -> torch.Tensor:
    """[T]; minus the papers' objectives, which are maximised."""
    ratio = torch.exp(c.logprobs - c.old)
    s = ratio
    if eq.ratio_level == "sequence" and len(c.logprobs):  # GSPO, eq. 7
        s = torch.exp(torch.mean(c.logprobs - c.old)).expand(len(c.logprobs))
    low, high = torch.tensor(1 - eq.epsilon_low), torch.tensor(1 + eq.epsilon_high)
    if c.advantage >= 0:  # PPO, eq. 7, and 1912.09729, eq. 8, by the sign of the advantage
        objective = torch.where(s < high, s, high) * c.advantage
    else:
        objective = torch.where(s > low, s, low) * c.advantage
        if eq.dual_clip is not None:
            bound = eq.dual_clip * c.advantage
            objective = torch.where(objective < bound, torch.full_like(s, bound), objective)
    if eq.tis_cap is not None:
        weight = torch.exp(c.old - c.sampler)
        objective = objective * torch.where(weight > eq.tis_cap, eq.tis_cap, weight).detach()
    d = c.ref - c.logprobs
    penalty = {
        "k1": lambda: -d,
        "k2": lambda: d * d / 2,
        "k3": lambda: torch.exp(d) - d - 1,
        "ratio_k3": lambda: ratio * (torch.exp(d) - d - 1),
    }[eq.kl]()
    return -objective + eq.beta * penalty


def group_advantages(rewards: Sequence[float | None], scale: str) -> list[float]:
    """One group's, with None for what has no score; of "batch" nothing is known here."""
    known = torch.tensor([r for r in rewards if r is not None], dtype=torch.float64)
    if len(known) < 2 or known.max() == known.min():
        return [0.0] * len(rewards)
    if scale == "rloo":  # 2402.14740: the others' mean
        others = lambda r: (known.sum().item() - r) / (len(known) - 1)
        return [0.0 if r is None else r - others(r) for r in rewards]
    divisor = known.std().item() + 1e-4 if scale == "group" else 1.0
    return [0.0 if r is None else (r - known.mean().item()) / divisor for r in rewards]


def completion_logprobs(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float,
    padding: str,
) -> list[torch.Tensor]:
    """The log-probs of each completion's tokens after its prompt, from one padded batch.

    Args:
        padding: "left" as generation with transformers has it, or "right".
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions)]
    width = max(map(len, rows))
    ids, mask, positions = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    starts = [width - len(row) if padding == "left" else 0 for row in rows]
    for i, (row, start) in enumerate(zip(rows, starts)):
        at = slice(start, start + len(row))
        ids[i, at], mask[i, at], positions[i, at] = torch.tensor(row), 1, torch.arange(len(row))
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    logprobs = torch.log_softmax(out.logits.float() / temperature, -1)
    found = []
    for i, (start, prompt, completion) in enumerate(zip(starts, prompts, completions)):
        first = start + len(prompt)
        at = torch.arange(first, first + len(completion))
        found.append(logprobs[i, at - 1, ids[i, at]])
    return found
