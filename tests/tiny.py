"""Tiny random checkpoints, made with transformers, and the same weights in Meta's layout.

The writers here are independent of the library's own: they are what its loaders are tested against.
"""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig

# With products this small, threads only wait for one another.
torch.set_num_threads(1)

BASE = dict(
    model_type="llama",
    vocab_size=160,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
)


def _llama3(factor: float, original: int = 64, theta: float = 10000.0) -> dict[str, Any]:
    # With 64 original positions the three bands all lie within a test's 96 positions.
    bands = dict(low_freq_factor=1.0, high_freq_factor=4.0)
    rope = dict(rope_type="llama3", rope_theta=theta, factor=factor, **bands)
    return dict(rope_parameters=rope | dict(original_max_position_embeddings=original))


_LINEAR = dict(rope_parameters=dict(rope_type="linear", rope_theta=5000.0, factor=2.5))

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": dict(num_key_value_heads=4),
    "gqa": {},
    "mqa": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "head_dim": dict(head_dim=24),
    "eps": dict(rms_norm_eps=0.05),
    "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=500000.0)),
    "llama3_8": _llama3(8.0),
    "llama3_32": _llama3(32.0),
    "llama3_meta": _llama3(8.0, original=8192, theta=500000.0)
    | dict(max_position_embeddings=131072),
    "linear": _LINEAR,
    "gelu": dict(hidden_act="gelu"),
    "gelu_tanh": dict(hidden_act="gelu_pytorch_tanh"),
    "relu": dict(hidden_act="relu"),
    "bf16": {},
    "f16": {},
    "sharded": {},
    "old_llama3": _llama3(8.0),
    "old_linear": _LINEAR,
    "mistral": dict(model_type="mistral", head_dim=24, sliding_window=None),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=24),
    "qwen3_biases": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=True)
    | dict(attention_bias=True),
    "qwen2_tied": dict(model_type="qwen2", tie_word_embeddings=True, head_dim=24),
}

_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@functools.cache
def cache_dir() -> Path:
    """A folder that lives as long as the process."""
    path = tempfile.mkdtemp(prefix="tiny-llama-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@functools.cache
def hf_model(name: str) -> tuple[Path, LlamaForCausalLM]:
    """A Hugging Face checkpoint of one of VARIANTS.

    Both are shared by all tests of the process: change neither (copy the folder first).

    Returns:
        (folder, model): the model in float32, eval mode, with exactly the folder's weights.
    """
    path = cache_dir() / name
    model = random_model(AutoConfig.for_model(**(BASE | VARIANTS[name])))
    cast_parameters(model, _DTYPES.get(name, torch.float32))
    sharded = dict(max_shard_size="100KB") if name == "sharded" else {}
    model.save_pretrained(path, **sharded)
    if name.startswith("old_"):
        write_old_dialect(path)
    cast_parameters(model, torch.float32)
    return path, model


def cast_parameters(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Casts the weights alone: model.to() would round RoPE's frequencies too."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def random_model(config: PreTrainedConfig, seed: int = 0) -> LlamaForCausalLM:
    """A model with weights of every kind random (norms and biases too) and logits far from flat."""
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.3 * noise)
            elif name.endswith(".bias"):
                weight.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                weight.copy_(noise if not config.tie_word_embeddings else 0.3 * noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)
    return model.requires_grad_(False)


def write_old_dialect(path: Path) -> None:
    """Rewrites config.json as transformers 4 wrote it."""
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    (path / "config.json").write_text(json.dumps(config, indent=2))


_META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def meta_state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The model's weights under Meta's names, wq and wk with RoPE's pairs side by side."""
    config, out = model.config, {}
    for name, weight in model.state_dict().items():
        name = name.removesuffix(".weight").removeprefix("model.")
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            if rest.endswith(("q_proj", "k_proj")):
                pairs = weight.view(-1, 2, config.head_dim // 2, config.hidden_size)
                weight = pairs.transpose(1, 2).reshape(weight.shape)
            name = f"layers.{layer}.{_META_NAMES[rest]}"
        name = {"embed_tokens": "tok_embeddings", "lm_head": "output"}.get(name, name)
        if not (name == "output" and config.tie_word_embeddings):
            out[f"{name}.weight"] = weight.clone()
    return out


def meta_params(model: LlamaForCausalLM, **changes: Any) -> dict[str, Any]:
    """The model's params.json."""
    config = model.config
    params = dict(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        multiple_of=64,  # int(8 · 64 / 3) = 170, rounded up to 192
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
    )
    if config.rope_parameters["rope_type"] == "llama3":
        params["use_scaled_rope"] = True
    return params | changes


def write_meta(
    path: Path, model: LlamaForCausalLM, *, shards: int = 1, embed_dim: int = 0, **changes: Any
) -> Path:
    """Writes Meta's layout, split for `shards` model-parallel ranks.

    Args:
        embed_dim: the axis that tok_embeddings is split on: 0 as Llama 3, 1 as Llama 2.
        changes: other entries of params.json.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "params.json").write_text(json.dumps(meta_params(model, **changes)))
    state = meta_state(model)
    for rank in range(shards):
        part = {"rope.freqs": torch.ones(model.config.head_dim // 2)}
        for name, weight in state.items():
            if "norm" in name:
                part[name] = weight
                continue
            axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            axis = embed_dim if name.startswith("tok_embeddings") else axis
            part[name] = weight.chunk(shards, axis)[rank].clone()
        torch.save(part, path / f"consolidated.{rank:02d}.pth")
    return path
