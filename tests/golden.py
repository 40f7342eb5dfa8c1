"""Records numbers, ids, texts and files that a refactoring must not change, and compares with them.

    python -m tests.golden write FOLDER       # in the code as it was
    python -m tests.golden compare FOLDER     # in the code as it is

`--only NAME,NAME` takes some of the records. Ids, texts and files must be equal; floating-point
numbers may differ in their last digits, and it says by how much.
"""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path.cwd()
sys.path[0] = str(ROOT)
# Programs that XLA has not optimised differ least from one shape of the code to another.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
os.environ |= ENVIRONMENT

import jax
import numpy as np
import safetensors.numpy
import torch

from models.llama.chat_format import chat_format_for
from models.llama.load import load_checkpoint
from models.llama.model import LLaMa
from models.llama.tokenizer import load_tokenizer
from tests import cli, tiny, tiny_gguf
from tests.oracles import tokenizer_files as oracle

TOLERANCE = 2e-5
# Of tiny.VARIANTS, which differ in more than a number.
SHAPES = (
    "mha",
    "gqa",
    "mqa",
    "tied",
    "biases",
    "head_dim",
    "llama3_8",
    "linear",
    "gelu_tanh",
    "bf16",
)
SHAPES += ("sharded", "old_llama3")
TINY = dict(layers=2)


def find(name: str) -> Any:
    """A function or class of the library by its name, in whichever module it stands."""
    for path in sorted([*ROOT.glob("models/**/*.py"), *ROOT.glob("*.py")]):
        if re.search(rf"^(def|class) {name}\b", path.read_text(), re.MULTILINE):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            return getattr(importlib.import_module(module), name)
    raise LookupError(name)


def run(program: str, *args: str, code: int = 0) -> str:
    """The stdout of a command line, which must end with `code`."""
    command = [sys.executable, program, *args]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(args)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def flags(**options: object) -> list[str]:
    """Options as on a command line."""
    return [f"--{name}={value}" for name, value in options.items()]


def files(folder: Path, arrays: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """A folder's content: JSON as it is, tensors by name, whatever their order, else digests."""
    out: dict[str, Any] = {"tensors": {}}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            out[path.name] = json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            out["tensors"] |= safetensors.numpy.load_file(path)
        elif path.suffix == ".pth":
            out["tensors"] |= {name: x.numpy() for name, x in torch.load(path).items()}
        elif path.is_file():
            out[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    out["tensors"] = {
        name: [str(x.dtype), x.shape, arrays(x)] for name, x in sorted(out["tensors"].items())
    }
    if index := out.get("model.safetensors.index.json"):
        index["weight_map"] = sorted(index["weight_map"])
    return out


def bits(x: np.ndarray) -> str:
    """A digest of an array that must be equal to the bit."""
    return hashlib.sha256(x.tobytes()).hexdigest()


def sums(x: np.ndarray) -> list[float]:
    """Numbers of an array that may differ in its last digits."""
    wide = x.astype(np.float64)
    return [float(wide.sum()), float(np.abs(wide).sum())]


def logits(folder: Path) -> dict[str, Any]:
    """Logits of the same tokens by checkpoint, from all three formats."""
    paths = {name: tiny.hf_model(name)[0] for name in SHAPES}
    for name in ("gqa", "llama3_meta", "tied"):
        model, changes = tiny.hf_model(name)[1], {}
        if name == "llama3_meta":
            changes = dict(shards=2, vocab_size=-1)
        paths[f"meta-{name}"] = tiny.write_meta(folder / name, model, **changes)
        paths[f"gguf-{name}"] = folder / f"{name}.gguf"
        tiny_gguf.write_gguf(paths[f"gguf-{name}"], model.config, model.state_dict(), "Q8_0")
    tokens = np.random.default_rng(0).integers(0, 160, (2, 12))
    out = {}
    for name, path in paths.items():
        config, params = load_checkpoint(path)
        found = LLaMa(config).apply({"params": params}, tokens)
        found = found[0] if isinstance(found, tuple) else found
        out[name] = [str(params["embed"].dtype), np.asarray(found, np.float64).ravel().tolist()]
    return out


def tokenizers(folder: Path) -> dict[str, tuple[Path, str | None]]:
    """A file or folder by kind of tokenizer, and the chat format it is asked for."""
    model_path = find("resolve")(find_default())
    metadata = oracle.tokenizer_metadata(model_path)
    model = oracle.sentencepiece_model()
    (folder / "sp.model").write_bytes(model)
    out: dict[str, tuple[Path, str | None]] = {
        "llama3": (oracle.LLAMA3_MODEL, "llama3"),
        "gguf": (model_path, None),
        "sentencepiece": (folder / "sp.model", "llama2"),
    }
    gguf = oracle.write_tokenizer_gguf(folder / "sp.gguf", oracle.sentencepiece_metadata(model))
    out["sentencepiece_gguf"] = gguf, "llama2"
    for name, spec, config in (
        ("smollm", json.dumps(oracle.smollm_json(metadata)), ("<|im_start|>", "<|im_end|>")),
        ("llama2", json.dumps(oracle.llama2_json(model, False)), ("<s>", "</s>")),
        ("llama3", oracle.llama3_json(), ("<|begin_of_text|>", "<|eot_id|>")),
    ):
        path = folder / name
        path.mkdir()
        (path / "tokenizer.json").write_text(spec)
        roles = dict(bos_token=config[0], eos_token=config[1])
        roles["chat_template"] = metadata["tokenizer.chat_template"]
        (path / "tokenizer_config.json").write_text(json.dumps(roles))
        out[f"{name}_json"] = path, None
    return out


def find_default() -> str:
    """The name of the default model."""
    from models.llama import hub

    return hub.DEFAULT_MODEL


def tokens(folder: Path) -> dict[str, Any]:
    """Ids of hostile texts and chats, and what they decode to, by kind of tokenizer."""
    texts, out = [*oracle.HOSTILE, *oracle.random_texts(150)], {}
    for kind, (path, form) in tokenizers(folder).items():
        tokenizer = load_tokenizer(path)
        ids = [tokenizer.encode(text) for text in texts]
        special = [tokenizer.encode(text, bos=True, eos=True, allow_special=True) for text in texts]
        chats = chat_format_for(tokenizer, form)
        turns = [
            [dict(role=role, content=text) for role, text in zip(("user", "assistant", "user"), t)]
            for t in zip(texts, texts[7:], texts[13:])
        ]
        out[kind] = {
            "ids": ids,
            "special": special,
            "texts": [tokenizer.decode(i, skip_special=skip) for i in special for skip in (0, 1)],
            "chats": [chats.encode_chat(t, True) for t in turns],
            "rendered": [chats.render(t, False) for t in turns[::7]],
            "stop": sorted(tokenizer.stop_ids),
            "known": [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size],
            "names": dict(sorted(tokenizer.special_tokens.items())),
        }
    return out


def texts(folder: Path) -> dict[str, Any]:
    """What generate.py writes with the default model, and chat.py."""
    (folder / "prompts.txt").write_text("The three largest cities are\nOnce upon a time\n")
    several = flags(prompts_file=folder / "prompts.txt", n=2, max_gen_len=20, seed=3)
    rows = run("generate.py", *several, "--json", "--logprobs", "--temperature=0.8")
    short = flags(prompt="What is the capital of France?", max_gen_len=24)
    penalty = flags(repetition_penalty=1.3, stop='["\\n\\n", "."]')
    return {
        "rows": [json.loads(line) for line in rows.splitlines()],
        "plain": run("generate.py", *short, "--temperature=0"),
        "chat": run("generate.py", *short, "--chat", "--temperature=0.8", "--seed=1"),
        "stop": run("generate.py", *short, "--system=Be brief.", "--chat", *penalty),
    }


MEASURED = ("seconds", "tokens_per_s", "model_flops_per_s", "mfu", "memory", "compilations")
MEASURED += ("rollout_tokens_per_s",)


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, without what a machine measures of itself."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def _rows(folder: Path) -> Path:
    texts = [text for text in oracle.random_texts(40, 5) if text.strip()]
    chats = [
        [dict(role="user", content=a), dict(role="assistant", content=b)]
        for a, b in zip(texts, texts[1:])
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def sft(folder: Path) -> dict[str, Any]:
    """Three steps of fine-tuning, without and with adapters; perplexity."""
    data, out = _rows(folder), {}
    known = dict(data=data, eval_data=data, ckpt_dir=cli.checkpoint(**TINY), max_steps=3)
    known |= dict(batch_size=4, micro_batch_size=2, seq_len=128, eval_every=2, warmup_steps=1)
    lora = dict(lora_rank=4, packing=True, optimizer="lion", schedule="wsd", seed=5, lr=1e-3)
    for name, options in (("full", dict(lr=0.01)), ("lora", lora)):
        run("train.py", "sft", *flags(**known | options, out_dir=folder / name))
        out[name] = lines(folder / name / "metrics.jsonl"), files(folder / name / "export", sums)
    measured = flags(data=data, ckpt_dir=cli.checkpoint(**TINY), seq_len=128)
    out["ppl"] = json.loads(run("evaluate.py", "ppl", *measured, "--json"))
    return out


def grpo(folder: Path) -> dict[str, Any]:
    """Two steps of GRPO, twice: with all that a loss can need, and with two updates a rollout."""
    rows = [{"prompt": "x" * (1 + i % 4) + "=", "answer": i} for i in range(9)]
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = dict(data=data, ckpt_dir=cli.checkpoint(**TINY), chat=False, max_steps=2, lr=0.01)
    known |= dict(reward="tests.grpo_rewards:ones,tests.grpo_rewards:even=0.5", group_size=4)
    known |= dict(max_completion_len=12, prompts_per_step=4, eval_data=data, eval_samples=2)
    other = dict(iterations=2, refills=1, scale="batch", lora_rank=4, loss="dr_grpo", seed=4)
    out = {}
    for name, options in (("full", dict(beta=0.05, micro_batch_size=4)), ("twice", other)):
        run("train.py", "grpo", *flags(**known | options, out_dir=folder / name))
        out[name] = [lines(folder / name / f"{file}.jsonl") for file in ("metrics", "rollouts")]
    replayed = run("train.py", "replay", *flags(run=folder / "full", step=2, kl="k2"), "--json")
    return out | {"replay": json.loads(replayed)}


def saved(folder: Path) -> dict[str, Any]:
    """Checkpoints written by the library, with tokenizers, in both formats."""
    config, params = load_checkpoint(cli.checkpoint(**TINY))
    write, out = find("save_checkpoint"), {}
    for kind in ("hf", "meta"):
        write(folder / kind, config, params, format=kind, tokenizer=cli.checkpoint(**TINY))
        out[kind] = files(folder / kind, bits)
    write(folder / "shards", config, params, max_shard_bytes=100_000)
    return out | {"shards": files(folder / "shards", bits)}


JOBS = {
    "sft": dict(model="llama-3.1-8b", topology="v5e:4x8", job="sft", batch=32),
    "lora": dict(model="llama-2-13b", topology="h100:8", job="lora", seq=4096, remat="block"),
    "grpo": dict(model="smollm2-360m", topology="v5p:2x2x1", job="grpo", group_size=4),
    "generate": dict(model="llama-3.2-3b", topology="v5e:2x2", job="generate", batch=4),
}


def plans(folder: Path) -> dict[str, Any]:
    """What plan.py estimates."""
    out = {}
    for name, options in JOBS.items():
        done = [sys.executable, "plan.py", *flags(**options), "--estimate", "--json"]
        done = subprocess.run(done, capture_output=True, text=True)
        if not done.stdout:
            raise RuntimeError(done.stderr[-2000:])
        out[name] = done.returncode, json.loads(done.stdout)
    return out


RECORDS: dict[str, Callable[[Path], Any]] = {
    f.__name__: f for f in (logits, tokens, saved, plans, texts, sft, grpo)
}


def differences(was: Any, now: Any, where: str, worst: list[float]) -> Iterator[str]:
    """What is not equal, by its place; `worst` gets how far numbers are apart."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in [*was, *(name for name in now if name not in was)]:
            if name not in was or name not in now:
                yield f"{where}/{name} is {'new' if name not in was else 'gone'}"
            else:
                yield from differences(was[name], now[name], f"{where}/{name}", worst)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for i, (a, b) in enumerate(zip(was, now)):
            yield from differences(a, b, f"{where}/{i}", worst)
    elif isinstance(was, float) and isinstance(now, float):
        if was != now and was == was:
            apart = abs(was - now) / (1 + abs(was))
            worst.append(apart)
            if not apart <= TOLERANCE:
                yield f"{where} was {was!r}, is {now!r}"
    elif was != now:
        yield f"{where} was {was!r:.200}, is {now!r:.200}"


def main() -> int:
    """Returns 1 where something differs."""
    args = [arg for arg in sys.argv[1:] if not arg.startswith("--only=")]
    only = [arg[7:].split(",") for arg in sys.argv[1:] if arg.startswith("--only=")]
    if len(args) != 2 or args[0] not in ("write", "compare"):
        sys.exit(__doc__)
    folder, wrong = Path(args[1]).absolute(), 0
    folder.mkdir(parents=True, exist_ok=True)
    for name in only[0] if only else RECORDS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            found = json.loads(json.dumps(RECORDS[name](Path(scratch))))
        path = folder / f"{name}.json"
        taken = f"{time.monotonic() - start:.0f} s"
        if args[0] == "write":
            path.write_text(json.dumps(found))
            print(f"{name}: written, {taken}", flush=True)
            continue
        worst: list[float] = []
        bad = list(differences(json.loads(path.read_text()), found, name, worst))
        wrong += len(bad)
        same = f"{len(worst)} numbers differ, by up to {max(worst):.1e}" if worst else "to the bit"
        print(f"{name}: {f'{len(bad)} DIFFERENCES' if bad else 'equal'}, {same}, {taken}")
        print("".join(f"  {line}\n" for line in bad[:10]), end="", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
