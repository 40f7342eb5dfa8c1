"""Training as a user of transformers and torch writes it; measured by benchmarks/train.py."""

import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.workers import serve


class Torch:
    """transformers' model, torch.optim.AdamW, all tokens are targets, gradients clipped at 1.

    In bfloat16 the parameters, gradients and AdamW's moments are bfloat16 too: its fastest way, and
    one that loses small updates, which ours keeps.

    Args:
        folder: a Hugging Face checkpoint.
        dtype: of everything.
        matmul_shapes: m, n, k of the products that `matmul_peak` measures.
    """

    def __init__(self, folder: str, dtype: str, matmul_shapes: list[list[int]]):
        dtype = self._dtype = getattr(torch, dtype)
        self._shapes = matmul_shapes
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5)

    def step(self, tokens: list[list[int]]) -> tuple[float, float]:
        """(seconds, loss) of one optimizer step."""
        ids = torch.from_numpy(np.array(tokens))
        start = time.perf_counter()
        self._optimizer.zero_grad()
        loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return time.perf_counter() - start, loss.item()

    def matmul_peak(self) -> float:
        """The best FLOP/s of products [m, k] · [n, k] as torch does them."""
        best = 0.0
        for m, n, k in self._shapes:
            a, b = (torch.randn(rows, k, dtype=self._dtype) for rows in (m, n))
            for _ in range(8):
                start = time.perf_counter()
                torch.nn.functional.linear(a, b)
                best = max(best, 2 * m * n * k / (time.perf_counter() - start))
        return best


if __name__ == "__main__":
    serve(Torch)
