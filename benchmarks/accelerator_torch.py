"""The rows of benchmarks/accelerator.py that a user of transformers and torch has, in a process of their own.

Decoding: `generate` with a static cache, which compiles its step on a GPU. Prefill and training: the
model through `torch.compile`, flash attention by torch's sdpa, fused AdamW, all in the row's dtype.
"""

import gc
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.accelerator_rows import Row, attempt, configs
from benchmarks.workers import serve
from models.llama.formats import hf

REPEATS = 3
HELD = 64


class Torch:
    """Measures one row at a time, on random weights of the same shapes.

    Args:
        tiny: shapes that a CPU computes in seconds; nothing is compiled, which takes long.
    """

    def __init__(self, tiny: bool):
        self._tiny, self._configs = tiny, configs(tiny)
        self._card = "cuda" if torch.cuda.is_available() else "cpu"
        self._compile = (lambda model: model) if tiny else torch.compile
        if not tiny and self._card == "cpu":
            raise SystemExit("torch sees no card")

    def about(self) -> dict:
        """The version."""
        return {"torch": torch.__version__}

    def run(self, row: Row) -> Row | None:
        """What was found, or the error; None: torch has no such row."""
        start, method = time.perf_counter(), getattr(self, row["part"], None)
        if method is None or row["dtype"] != "bfloat16" or "packed" in row["settings"]:
            return None
        found = attempt(method, **row["settings"])
        gc.collect()
        if self._card == "cuda":
            torch.cuda.empty_cache()
        return found | {"seconds": time.perf_counter() - start}

    def decode(self, size: str, rows: int) -> Row:
        """Steps after a prompt and its first token."""
        model, new = self._model(size).eval(), 8 if self._tiny else 256
        ids, seconds = self._tokens(rows, HELD), []
        settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        settings |= dict(cache_implementation="static", eos_token_id=None, pad_token_id=0)
        for _ in range(REPEATS + 2):
            first = _FirstToken(self._now)
            with torch.no_grad():
                model.generate(ids, stopping_criteria=StoppingCriteriaList([first]), **settings)
            seconds.append((self._now() - first.time) / (new - 1))
        return {"tokens_per_s": rows / min(seconds[2:])}

    def prefill(self, size: str, length: int) -> Row:
        """One prompt to its next token, with the cache that decoding needs."""
        model, ids = self._compile(self._model(size).eval()), self._tokens(1, length)
        with torch.no_grad():
            seconds = self._best(lambda: model(ids, use_cache=True, logits_to_keep=1))
        return {"tokens_per_s": length / seconds}

    def sft(self, size: str, rows: int, length: int) -> Row:
        """An AdamW step on half of the rows at a time: all logits at once do not fit."""
        model = self._model(size).train()
        run, ids = self._compile(model), self._tokens(rows, length)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def once():
            for half in ids.chunk(2):
                (run(input_ids=half, labels=half, use_cache=False).loss / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return {"tokens_per_s": rows * length / self._best(once)}

    def _model(self, size: str):
        config = LlamaConfig.from_dict(hf.from_config(self._configs[size]))
        with torch.device(self._card):
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            )

    def _tokens(self, rows: int, length: int) -> torch.Tensor:
        return torch.randint(1, 500, (rows, length), device=self._card)

    def _best(self, function: Callable[[], object]) -> float:
        """The fewest seconds of some calls, after one that compiles and one more."""
        seconds = []
        for _ in range(REPEATS + 2):
            start = self._now()
            function()
            seconds.append(self._now() - start)
        return min(seconds[2:])

    def _now(self) -> float:
        if self._card == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class _FirstToken(StoppingCriteria):
    """Stops nothing; has the time of a generation's first token."""

    def __init__(self, now: Callable[[], float]):
        self._now, self.time = now, None

    def __call__(self, input_ids, scores, **_) -> torch.Tensor:
        self.time = self.time or self._now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


if __name__ == "__main__":
    serve(Torch)
