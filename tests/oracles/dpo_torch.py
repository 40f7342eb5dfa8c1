"""What DPO and its relatives must compute, by torch and from the papers' equations, a pair at a time.

Nothing is padded here, nothing masked but what a mask of the batch leaves out, and no prompt shared: each
answer is a row of its own behind its prompt.
"""

import numpy as np
import torch
from torch.nn.functional import logsigmoid


def pair_loss(loss, chosen, rejected, lengths, beta, epsilon=0.0, gamma=0.0) -> torch.Tensor:
    """The loss of one pair.

    Args:
        loss: as in DPOConfig.
        chosen, rejected: (log-prob by the policy, by the reference) of the whole answer.
        lengths: their tokens.
        beta, epsilon, gamma: of the equations.
    """
    (new_w, old_w), (new_l, old_l) = chosen, rejected
    if loss == "simpo":  # 2405.14734, eq. 6
        reward_w, reward_l = beta / lengths[0] * new_w, beta / lengths[1] * new_l
        return -logsigmoid(reward_w - reward_l - gamma)
    if loss == "ipo":  # 2310.12036, eq. 17, of means
        h = (new_w - old_w) / lengths[0] - (new_l - old_l) / lengths[1]
        return (h - 1 / (2 * beta)) ** 2
    reward_w, reward_l = beta * (new_w - old_w), beta * (new_l - old_l)
    if loss == "hinge":  # 2305.10425, eq. 1, with rewards for log-probs and 1 for delta
        return torch.clamp(1 - reward_w + reward_l, min=0)
    # 2305.18290, eq. 7; cDPO: the same of the swapped pair, with the chance epsilon
    right, wrong = -logsigmoid(reward_w - reward_l), -logsigmoid(reward_l - reward_w)
    return (1 - epsilon) * right + epsilon * wrong


def answer_logprob(model, prompt, answer, mask) -> torch.Tensor:
    """The sum of the log-probs of the tokens of an answer that a mask selects."""
    ids = torch.tensor(np.concatenate([prompt, answer])[None].astype(np.int64))
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], -1)
    picked = logprobs[torch.arange(len(answer)), ids[0, len(prompt) :]]
    return picked[torch.tensor(mask)].sum()


def batch_loss(model, reference, batch, loss, beta, epsilon=0.0, gamma=0.0) -> torch.Tensor:
    """The mean over the pairs of a batch."""
    losses = []
    for b, n in enumerate(batch["prompt_lengths"]):
        sides, lengths = [], []
        for tokens, mask in zip(batch["tokens"][b], batch["target_mask"][b]):
            end = int(np.flatnonzero(mask)[-1]) + 1
            row = batch["prompts"][b, :n], tokens[:end], mask[:end]
            with torch.no_grad():
                before = answer_logprob(reference, *row)
            sides.append((answer_logprob(model, *row), before))
            lengths.append(int(mask.sum()))
        losses.append(pair_loss(loss, *sides, lengths, beta, epsilon, gamma))
    return sum(losses) / len(losses)
