"""What 8 fake devices compute next to one; a script, since JAX counts devices once a process.

Prints a JSON line a check: its name, and what is wrong or null. Started by test_mesh.py.
"""

import dataclasses
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sampling
from generate import generate
from models.llama.chat.turns import Turns
from models.llama.config import ModelConfig
from models.llama.decoding import GenerationConfig
from models.llama.load import load_checkpoint
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, for_decoding, init_params
from models.llama.load import save_checkpoint
from tests import compiling, small_runs
from trainers.distill_trainer import DistillConfig, DistillTrainer
from trainers.dpo_trainer import DPOConfig, DPOTrainer
from trainers.evaluation.lm import _score
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils import sharding

MESHES = (
    "data=8",
    "fsdp=8",
    "tensor=8",
    "context=8",
    "data=2,fsdp=2,tensor=2",
    "fsdp=2,context=2,tensor=2",
)
MIXED = MESHES[-2:]
# Checks that need not run on each mesh, and where they do.
SELECTED = {
    "logits": ("data=8", MIXED[1]),
    "logits, odd heads": ("fsdp=8", "context=8"),
    "continuations": ("fsdp=8", MIXED[1]),
    "sft, micro-batches": ("fsdp=8", MIXED[1]),
    "sft, odd heads": ("tensor=8", MIXED[1]),
    "sft, lora": MIXED,
    "sft, adafactor": MIXED[1:],
    "grpo": ("data=8", "context=8", MIXED[1]),
    "dpo": ("fsdp=8", MIXED[1]),
    "distill": ("tensor=8", MIXED[0]),
    "greedy": ("context=8",),
    "greedy, odd heads": ("tensor=8", MIXED[1]),
    "two samples a prompt": ("data=8", MIXED[0]),
    "as many prompts": ("data=8", "tensor=8", MIXED[0]),
    "as many prompts, odd heads": MIXED[:1],
    "eight samples a prompt": ("tensor=8", MIXED[0]),
    "eight samples a prompt, odd heads": MIXED[:1],
    "turns": ("tensor=8", MIXED[0]),
    "load, meta": ("tensor=8", *MIXED),
    "logits, int8": ("tensor=8", MIXED[0]),
}
MODEL = dataclasses.replace(
    small_runs.MODEL,
    dim=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,  # fewer than 8 parts: each is held twice
    ffn_dim=96,
    vocab_size=128,
    max_seq_len=64,
    tie_embeddings=True,
    attention_bias=True,
    family="qwen3",
)
# Heads that no axis of size 2 divides, and a vocabulary of its own for the output.
ODD = dataclasses.replace(MODEL, n_heads=9, n_kv_heads=3, dim=72, tie_embeddings=False)
ODD = dataclasses.replace(ODD, attention_bias=False, family="llama")
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, MODEL.vocab_size, (8, 16)).astype(np.int32)


# SGD-like: Adam would turn a gradient of about 0 into a step of either sign.
KNOWN = dict(learning_rate=1e-2, max_steps=9, eps=1e-2, schedule="constant", micro_batch_size=None)
C = 6  # tokens of a completion


def sft(model: ModelConfig = MODEL, lora=None, **config: Any) -> list[np.ndarray]:
    """Losses, gradient norms and parameters of three steps with masks of unequal lengths."""
    trainer = SFTTrainer(LLaMa(model, jnp.float32, "block"), SFTConfig(**KNOWN | config), lora)
    state, frozen = trainer.init(params_of(model), jax.random.key(1))
    mask = np.arange(16) < np.arange(3, 11)[:, None]
    batch = sharding.place_batch({"tokens": TOKENS, "target_mask": mask})
    found = []
    for _ in range(3):
        state, metrics = trainer.train_step(state, frozen, batch)
        found += [metrics["loss"], metrics["grad_norm"]]
    return [np.asarray(x) for x in [*found, *jax.tree.leaves(state.params)]]


def grpo() -> list[np.ndarray]:
    """Metrics, parameters and scores of a step on ragged completions."""
    config = GRPOConfig(max_completion_len=C, beta=0.1, **KNOWN)
    trainer = GRPOTrainer(LLaMa(MODEL, jnp.float32, "block"), config)
    state, frozen = trainer.init(params_of(MODEL), jax.random.key(1))
    batch = sharding.place_batch(completions(4))
    scores = trainer.score(state.params, frozen, batch)
    return [np.asarray(scores), *steps(1, trainer, state, frozen, batch)]


def distill(folder: Path) -> list[np.ndarray]:
    """Metrics and parameters of a step on ragged completions; the teacher is of other sizes."""
    config, teacher = load_checkpoint(folder, dtype="float32")
    trainer = DistillTrainer(
        LLaMa(MODEL, jnp.float32, "block"),
        DistillConfig(max_completion_len=C, **KNOWN),
        teacher=LLaMa(config, jnp.float32),
    )
    state, frozen = trainer.init(params_of(MODEL), jax.random.key(1))
    batch = sharding.place_batch(completions(4))
    return steps(1, trainer, state, frozen | {"teacher": teacher}, batch)


def dpo() -> list[np.ndarray]:
    """Metrics and parameters of two steps on ragged pairs, with a copy as the reference."""
    trainer = DPOTrainer(LLaMa(MODEL, jnp.float32, "block"), DPOConfig(warmup_steps=0, **KNOWN))
    state, frozen = trainer.init(params_of(MODEL), jax.random.key(1))
    # Of the second, the reference is another model.
    return steps(2, trainer, state, frozen, sharding.place_batch(completions(2)))


def completions(group_size: int) -> dict[str, np.ndarray]:
    """Ragged completions of ragged prompts."""
    rng = np.random.default_rng(1)
    B, G, P = 8, group_size, 8
    return {
        "prompts": rng.integers(0, 128, (B, P)).astype(np.int32),
        "prompt_lengths": rng.integers(1, P + 1, B).astype(np.int32),
        "tokens": rng.integers(0, 128, (B, G, C)).astype(np.int32),
        "target_mask": np.arange(C) < rng.integers(1, C + 1, (B, G, 1)),
        "counts": np.ones((B, G), np.float32),
        "advantages": rng.normal(size=(B, G)).astype(np.float32),
        "sampler_logprobs": np.full((B, G, C), -5.0, np.float32),
        "old_logprobs": np.full((B, G, C), -5.0, np.float32),
        "ref_logprobs": np.full((B, G, C), -5.0, np.float32),
    }


def steps(count: int, trainer, state, frozen, batch) -> list[np.ndarray]:
    """Each step's metrics, and the last parameters."""
    found = []
    for _ in range(count):
        state, metrics = trainer.train_step(state, frozen, batch)
        found += [metrics[name] for name in sorted(metrics)]
    return [np.asarray(x) for x in [*found, *jax.tree.leaves(state.params)]]


def sample(model: ModelConfig, n: int, sampler, repeat: int = 1) -> list[np.ndarray]:
    """Tokens, exactly, and log-probs of three prompts, which no number of devices divides, or more."""
    params = for_decoding(params_of(model))
    prompts = [[3, 5, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2, 1]] * repeat
    config = GenerationConfig(max_new_tokens=12, n=n)
    done = generate(
        LLaMa(model), params, prompts, sampler=sampler, key=jax.random.key(3), config=config
    )
    return [done.tokens * 1000, done.logprobs]


def turns() -> list[np.ndarray]:
    """Tokens and log-probs of two turns; what is read between them is longer than one piece."""
    prompts, said = [[3, 5, 7], [1], [9, 8, 7, 6]], {0: [5] * 3, 2: [*range(9, 29)]}
    config = GenerationConfig(max_new_tokens=6)
    run = Turns(LLaMa(MODEL), for_decoding(params_of(MODEL)), sampling.Greedy(), config)
    run.start(prompts, room=48)
    run.advance()
    run.read(said, dict.fromkeys(said, 6))
    run.advance()
    done = run.completions()
    return [done.tokens * 1000, done.logprobs]


def logits(model: ModelConfig) -> list[np.ndarray]:
    """Of the whole model."""
    return [applied(model, params_of(model))]


def applied(model: ModelConfig, params: Any) -> np.ndarray:
    """Logits, jitted: operation by operation, each is compiled for the mesh."""
    apply = jax.jit(lambda params: LLaMa(model).apply({"params": params}, TOKENS)[0])
    return np.asarray(apply(params))


def continuations() -> list[np.ndarray]:
    """lm-eval's log-likelihoods and greedy tokens, of four answers to each of two questions."""
    params, lengths = for_decoding(params_of(MODEL)), np.asarray([16, 9], np.int32)
    counts = np.asarray([[1, 2, 3, 8], [8, 1, 1, 0]], np.int32)
    arrays = TOKENS[:2], lengths, TOKENS[:4].reshape(2, 4, 8), counts
    return list(map(np.asarray, _score(LLaMa(MODEL), params, arrays)))


def logits_int8(folder: Path) -> list[np.ndarray]:
    """Of a checkpoint that is quantised while it is read, in both layouts."""
    found = []
    for decoding in (False, True):
        config, params = load_checkpoint(folder, quantize=True, decoding=decoding)
        found.append(applied(config, params))
    return found


def load(folder: Path, decoding: bool, quantize: bool = False) -> list[np.ndarray]:
    """A checkpoint's parameters, by their names; of the decoding layout, unfused rows."""
    options = dict(dtype="float32", decoding=decoding, quantize=quantize)
    _, params = load_checkpoint(folder, **options)
    if decoding:
        params = {**params, "layers": [_apart(layer) for layer in params["layers"]]}
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def _apart(layer: dict) -> dict:
    """A layer with q, k, v and gate, up below each other, as one device holds them."""
    attn, mlp = dict(layer["attn"]), dict(layer["mlp"])
    for kind in "wb":
        if f"{kind}q" in attn:
            attn[f"{kind}qkv"] = np.concatenate([attn.pop(kind + name) for name in "qkv"])
    if "w_gate" in mlp:
        mlp["w_gate_up"] = np.concatenate([mlp.pop("w_gate"), mlp.pop("w_up")])
    return {**layer, "attn": attn, "mlp": mlp}


def params_of(model: ModelConfig):
    """Always the same; on the mesh where there is one."""
    return jax.tree.map(jnp.asarray, _PARAMS[model])


_PARAMS = {
    model: jax.tree.map(np.asarray, init_params(model, jax.random.key(0))) for model in (MODEL, ODD)
}


def checks(folder: Path) -> dict[str, Any]:
    """Functions by name; each returns arrays that are equal on all meshes."""
    save_checkpoint(folder / "hf", MODEL, params_of(MODEL), format="hf")
    save_checkpoint(folder / "meta", ODD, params_of(ODD), format="meta")
    return {
        "logits": lambda: logits(MODEL),
        "logits, odd heads": lambda: logits(ODD),
        "continuations": continuations,
        "sft": sft,
        "sft, micro-batches": lambda: sft(micro_batch_size=4),
        "sft, odd heads": lambda: sft(ODD),
        "sft, lora": lambda: sft(lora=LoRAConfig(rank=8)),
        # Its steps are normed: what rounds differently shows as a share of the learning rate.
        "sft, adafactor": lambda: sft(optimizer="adafactor", learning_rate=1e-3),
        "grpo": grpo,
        "dpo": dpo,
        "distill": lambda: distill(folder / "meta"),
        "greedy": lambda: sample(MODEL, 1, sampling.Greedy()),
        "greedy, odd heads": lambda: sample(ODD, 1, sampling.Greedy()),
        "two samples a prompt": lambda: sample(MODEL, 2, sampling.TopP(1.0, 0.9)),
        # As many rows as each mesh shares: the cache lies by rows where it has too few heads.
        "as many prompts": lambda: sample(MODEL, 2, sampling.TopP(1.0, 0.9), repeat=8),
        "as many prompts, odd heads": lambda: sample(ODD, 1, sampling.Greedy(), repeat=8),
        # Prompts that no mesh shares by rows, and samples that each does: the cache is laid out anew.
        "eight samples a prompt": lambda: sample(MODEL, 8, sampling.TopP(1.0, 0.9)),
        "eight samples a prompt, odd heads": lambda: sample(ODD, 8, sampling.TopP(1.0, 0.9)),
        "turns": turns,
        "load, hf": lambda: load(folder / "hf", False),
        "load, meta": lambda: load(folder / "meta", False),
        "load for decoding": lambda: load(folder / "hf", True),
        "load, int8": lambda: load(folder / "meta", False, quantize=True),
        "logits, int8": lambda: logits_int8(folder / "hf"),
    }


def main(folder: str, meshes: list[str]) -> None:
    """Runs every check on one device, then on its meshes."""
    compiling.collect_seldom()
    known = checks(Path(folder))
    wanted = {name: check() for name, check in known.items()}
    for mesh in meshes:
        with jax.set_mesh(sharding.make_mesh(mesh)):
            for name, check in known.items():
                if mesh not in SELECTED.get(name, MESHES):
                    continue
                problem = None
                try:
                    for a, b in zip(wanted[name], check(), strict=True):
                        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
                except Exception:
                    problem = traceback.format_exc()
                print(json.dumps({"mesh": mesh, "check": name, "problem": problem}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
