"""The oracles of benchmarks/accelerator.py: is a small model right on this card?

Each compares with the same model in float32 on this machine's CPU, where the tests hold it to
independent references, or with numpy. Lengths are 64 more than a multiple of 128: tiles of a kernel
are half empty there.
Dimension key: B rows, T tokens, V vocab, D draws, M members of a group, C completion tokens.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.presets import PRESETS
from models.llama.decoding import GenerationConfig
from models.llama.generation import generate
from models.llama.model import LLaMa, Params, init_params
from sampling import TopP
from tests.oracles.nucleus import probabilities
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.rollout import Layout, Prompt, Rollout

CONFIG = dataclasses.replace(
    PRESETS["llama-3.1-8b"],
    **dict(vocab_size=512, dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=256),
)
T = 192

# The largest difference over the largest value; in nats where it is of log-probs.
BOUNDS = {
    "float32": {"logits": 2e-5, "gradients": 2e-4, "nats": 2e-5, "update": 2e-4},
    "bfloat16": {"logits": 2e-2, "gradients": 5e-2, "nats": 3e-2, "update": 5e-2},
}
SIGMAS = 5.0


def model(dtype: str, kind: str) -> dict:
    """Logits and gradients of rows that are plain, packed, or have hidden keys on the left."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, CONFIG.vocab_size, (2, T)).astype(np.int32)
    weights_BTV = rng.normal(size=(2, T, CONFIG.vocab_size)).astype(np.float32)
    seen_BT, masks = np.ones((2, T), bool), {}
    if kind == "packed":
        ids_T = np.repeat([0, 1, 2], T // 3)
        masks = {"segment_ids_BT": np.stack([ids_T, np.roll(ids_T, 17)]).astype(np.int32)}
    if kind == "hidden":
        seen_BT = np.arange(T) >= np.array([[0], [T // 3]])
        masks = {"key_mask_BS": seen_BT}

    args = tokens_BT, masks, seen_BT, weights_BTV
    (_, exact), exact_gradients = _logits_and_gradients(_cpu(), "float32", *args)
    (_, logits), gradients = _logits_and_gradients(jax.devices()[0], dtype, *args)
    found = {"logits": _off(logits, exact), "gradients": _worst(gradients, exact_gradients)}
    return _judged(found, dtype)


def _logits_and_gradients(device, dtype: str, *args):
    with jax.default_device(device):
        found = _compared(dtype)(*jax.device_put((_params(), *args), device))
        return jax.device_get(found)


@functools.cache
def _compared(dtype: str):
    """The jitted (loss, logits) and its gradients, one per dtype, so that XLA compiles none twice."""
    llama = LLaMa(CONFIG, jnp.dtype(dtype))

    def loss(params, tokens_BT, masks, seen_BT, weights_BTV):
        logits_BTV, _ = llama.apply({"params": params}, tokens_BT, **masks)
        logits_BTV = jnp.where(seen_BT[..., None], logits_BTV, 0)
        return jnp.mean(logits_BTV * weights_BTV), logits_BTV

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def cache(dtype: str) -> dict:
    """Log-probs of sampled tokens, from a prefill and decode steps, against one pass over all."""
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), _params())
    prompts = [list(range(1, T + 1)), list(range(7, 107))]
    done = generate(LLaMa(CONFIG), params, prompts, config=GenerationConfig(max_new_tokens=8))
    rows_BT = np.zeros((2, T + 128), np.int32)
    for row, prompt, new in zip(rows_BT, prompts, done.tokens):
        row[: len(prompt) + len(new)] = [*prompt, *new]
    whole = jax.jit(lambda params, rows: LLaMa(CONFIG).apply({"params": params}, rows)[0])
    logprobs_BTV = np.asarray(jax.nn.log_softmax(whole(params, rows_BT)))
    nats = best = 0.0
    for row_TV, prompt, new, told in zip(logprobs_BTV, prompts, done.tokens, done.logprobs):
        at = np.arange(len(new)) + len(prompt) - 1
        nats = _max(nats, np.abs(row_TV[at, new] - told))
        best = _max(best, row_TV[at].max(axis=-1) - row_TV[at, new])  # greedy: 0, or a near tie
    return _judged({"log-probs": nats, "below the best": best}, dtype, "nats")


def sampling(dtype: str) -> dict:
    """Frequencies of draws against the exact distribution, by chi-square; log-probs against float64."""
    V, D, rounds = 500, 2048, 4
    logits_V = 2 * np.random.default_rng(0).normal(size=V).astype(np.float32)
    sampler = TopP(temperature=0.8, top_k=50, top_p=0.9)
    keys_D = jax.random.split(jax.random.key(0), (rounds, D))
    draw = jax.jit(lambda logits_DV, keys_D: sampler(logits_DV, keys_D))
    logits_DV = jnp.broadcast_to(logits_V, (D, V))
    drawn = jax.device_get([draw(logits_DV, keys) for keys in keys_D])
    tokens, told = (np.concatenate(arrays) for arrays in zip(*drawn))
    expected = probabilities(logits_V, 0.8, 50, 0.9) * tokens.size
    counts, kept = np.bincount(tokens, minlength=V), expected > 0
    chi = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    exact = np.log(probabilities(logits_V, 0.8))[tokens]
    found = {
        "chi-square, sigmas": abs(chi - freedom) / math.sqrt(2 * freedom),
        "outside the nucleus": float(counts[~kept].sum()),
        "log-probs": _max(0.0, np.abs(told - exact)),
    }
    bounds = {"chi-square, sigmas": SIGMAS, "outside the nucleus": 0.0}
    return _judged(found, dtype, "nats", bounds)


def grpo(dtype: str) -> dict:
    """A group sampled on the card, then one optimizer step on it, next to the CPU's in float32.

    The update is AdamW's with a large epsilon, so that it is nearly proportional to the gradient.
    """
    M, C, prompts = 2, 128, [list(range(1, 65)), list(range(9, 49))]
    config = GRPOConfig(learning_rate=1.0, eps=0.9, max_completion_len=C, micro_batch_size=None)
    policy = jax.tree.map(lambda x: jnp.asarray(x, dtype), _params())
    sampled = GenerationConfig(max_new_tokens=C, n=M)
    done = generate(LLaMa(CONFIG), policy, prompts, TopP(), sampled)
    lengths = np.array([[C, 100], [C, 64]])
    rollout = Rollout(
        prompts=[Prompt(text="", ids=tuple(ids), columns={}) for ids in prompts],
        texts=[[""] * M] * len(prompts),
        functions=(),
        tokens=done.tokens.reshape(-1, M, C),
        lengths=lengths,
        stopped=lengths < C,
        logprobs=done.logprobs.reshape(-1, M, C),
        scores=np.zeros((len(prompts), M, 0)),
        rewards=np.zeros((len(prompts), M)),
        advantages=np.array([[1.0, -1.0], [-0.5, 0.5]], np.float32),
    )
    batch = rollout.batch(Layout(prompt_width=64, width=C, branches=M))

    def step(device, dtype):
        trainer = GRPOTrainer(LLaMa(CONFIG, jnp.dtype(dtype)), config)
        with jax.default_device(device):
            state, frozen = trainer.init(jax.device_put(_params(), device), jax.random.key(0))
            state, metrics = trainer.train_step(state, frozen, jax.device_put(batch, device))
            after = jax.tree.map(np.asarray, state.params)
            return jax.tree.map(np.subtract, after, _params()), jax.device_get(metrics)

    exact, told = step(_cpu(), "float32")
    update, metrics = step(jax.devices()[0], dtype)
    nats = {"entropy": abs(metrics["entropy"] - told["entropy"]) / told["tokens"]}
    nats["sampler-trainer gap"] = metrics["gap_max"]
    found = {"update": _worst(update, exact)} | {k: float(v) for k, v in nats.items()}
    if not metrics["updated"]:
        found["update"] = math.nan
    return _judged(found, dtype, "nats", {"update": BOUNDS[dtype]["update"]})


def _params() -> Params:
    """Parameters, in numpy, whose attention is far from uniform: a wrong mask shows."""
    shapes = jax.eval_shape(functools.partial(init_params, CONFIG), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if "norm" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, np.float32)
        return 0.06 * rng.standard_normal(leaf.shape, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _cpu():
    return jax.devices("cpu")[0]


def _off(got, exact) -> float:
    """Largest difference over the largest value; NaN where anything is."""
    return float(np.abs(np.asarray(got, np.float64) - exact).max() / np.abs(exact).max())


def _worst(got, exact) -> float:
    """`_off` of the worst array of two trees."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    return float(np.max([_off(*pair) for pair in pairs]))


def _max(sofar: float, values: np.ndarray) -> float:
    return float(np.max([sofar, *np.ravel(values)]))


def _judged(found: dict[str, float], dtype: str, rest: str = "", given: dict | None = None) -> dict:
    """A row's "found", its "bounds" and whether it "passed".

    Args:
        found: numbers by name; NaN passes no bound.
        dtype: whose bounds.
        rest: the bound for names that have none of their own.
        given: bounds by name, before others.
    """
    table = BOUNDS[dtype]
    bounds = {name: (given or {}).get(name, table.get(name, table.get(rest))) for name in found}
    passed = all(found[name] <= bound for name, bound in bounds.items())
    finite = {name: x if math.isfinite(x) else None for name, x in found.items()}
    return {"found": finite, "bounds": bounds, "passed": passed}
