"""What do eight bits cost? The default model's distributions next to float32's and to llama.cpp's Q8_0.

    python benchmarks/int8.py [--json_file FILE]

All programs read the same tokens, which are this project's docs/*.md. Each distribution over the
vocabulary is compared with that of the float32 weights: the mean KL divergence, and how often the most
probable token is the same.
"""

import json
import sys
import tempfile
from pathlib import Path

import fire
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import LlamaCpp, write_as, xllamacpp  # noqa: E402
from models.llama.hub import DEFAULT_MODEL, resolve  # noqa: E402
from models.llama.load import load_checkpoint  # noqa: E402
from models.llama.model import LLaMa, for_decoding, init_cache  # noqa: E402
from models.llama.tokenizer import load_tokenizer  # noqa: E402
from utils import memory  # noqa: E402

ROWS, LENGTH = 4, 64


def text_tokens(path: Path) -> np.ndarray:
    """[ROWS, LENGTH] ids of the docs."""
    text = "\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    ids = load_tokenizer(path).encode(text[: 8 * ROWS * LENGTH])
    return np.array(ids[: ROWS * LENGTH]).reshape(ROWS, LENGTH)


def at_once(path: Path, tokens: np.ndarray, quantize: bool = False) -> tuple[np.ndarray, int]:
    """([ROWS, LENGTH, V] log-probs, bytes of the weights) of one forward pass over all tokens."""
    config, params = load_checkpoint(path, dtype="float32", quantize=quantize)
    run = jax.jit(
        lambda params: jax.nn.log_softmax(LLaMa(config).apply({"params": params}, tokens)[0])
    )
    return np.asarray(run(params)), memory.tree_bytes(params)


def one_by_one(path: Path, tokens: np.ndarray) -> tuple[np.ndarray, int]:
    """The same in eight bits, token by token: a decode step's single row."""
    config, params = load_checkpoint(path, dtype="float32", quantize=True)
    model, params = LLaMa(config, jnp.float32), for_decoding(params)

    @jax.jit
    def of_row(params, row):
        cache = init_cache(config, 1, LENGTH, jnp.float32)
        _, cache = model.apply({"params": params}, row[None, :1], cache=cache)

        def step(cache, token):
            logits, cache = model.apply({"params": params}, token[None, None], cache=cache)
            return cache, logits[0, 0]

        return jax.nn.log_softmax(jax.lax.scan(step, cache, row[1:])[1])

    rows = [np.asarray(of_row(params, jnp.asarray(row))) for row in tokens]
    return np.stack(rows), memory.tree_bytes(params)


def llama_cpp(path: Path, tokens: np.ndarray, folder: Path, vocab: int) -> np.ndarray:
    """[ROWS, LENGTH - 1, V] log-probs of llama.cpp's own Q8_0, one request per token."""
    server, out = LlamaCpp(path, "int8", folder), np.full((ROWS, LENGTH - 1, vocab), -np.inf)
    for i, row in enumerate(tokens):
        for t in range(1, LENGTH):
            for found in server.logprobs(row[: t + 1].tolist(), vocab):
                out[i, t - 1, found["id"]] = found["logprob"]
    return out


def compare(found: np.ndarray, exact: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Perplexity, divergence and agreement over the positions from 1 on, all but the last with targets."""
    found, exact = (x[:, -(LENGTH - 1) :].astype(np.float64) for x in (found, exact))
    targets = tokens[:, 2:, None]
    nll = -np.take_along_axis(found[:, :-1], targets, axis=-1).mean()
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isfinite(found), np.exp(exact) * (exact - found), 0.0)
    same = (found.argmax(-1) == exact.argmax(-1)).mean()
    return {"perplexity": np.exp(nll), "kl": terms.sum(-1).mean(), "same": same}


def main(json_file: str | None = None) -> None:
    """Prints the table; see the module."""
    path = resolve(DEFAULT_MODEL)
    tokens, rows = text_tokens(path), {}
    exact, size = at_once(path, tokens)
    rows["float32"] = compare(exact, exact, tokens) | {"bytes": size}
    for name, run in (
        ("int8", lambda: at_once(path, tokens, True)),
        ("int8, decoding", lambda: one_by_one(path, tokens)),
    ):
        found, size = run()
        rows[name] = compare(found, exact, tokens) | {"bytes": size}
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, "weights.gguf")
        write_as(path, packed, "int8")
        rows["Q8_0 weights, computed here"] = compare(at_once(packed, tokens)[0], exact, tokens)
        rows["Q8_0 weights, computed here"]["bytes"] = packed.stat().st_size
        if xllamacpp is not None:
            found = llama_cpp(path, tokens, Path(folder), exact.shape[-1])
            rows["llama.cpp, Q8_0"] = compare(found, exact, tokens) | {
                "bytes": packed.stat().st_size
            }
    table = rich.table.Table(
        "", "MB", "perplexity", "KL, nats", "same top token", title=DEFAULT_MODEL
    )
    for name, row in rows.items():
        cells = (
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.5f}",
            f"{row['same']:.1%}",
        )
        table.add_row(name, *cells)
    rich.console.Console(width=100).print(table)
    if json_file:
        Path(json_file).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    fire.Fire(main)
