"""The published shapes by name: for planning without a checkpoint, and for tests. No JAX here."""

from collections.abc import Mapping

from models.llama.config import ModelConfig, llama3_scaling


def _preset(vocab, dim, layers, heads, kv_heads, ffn, **rest) -> ModelConfig:
    fields = dict(norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, tie_embeddings=False)
    fields |= dict(activation="silu", attention_bias=False, mlp_bias=False)
    fields |= dict(head_dim=dim // heads) | rest
    sizes = dict(vocab_size=vocab, dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads)
    return ModelConfig(**sizes, ffn_dim=ffn, **fields)


_L3 = dict(rope_theta=500000.0, max_seq_len=8192)
_L31 = dict(rope_theta=500000.0, max_seq_len=131072, rope_scaling=llama3_scaling(8.0))
_L32 = _L31 | dict(rope_scaling=llama3_scaling(32.0), tie_embeddings=True)
_MISTRAL = dict(family="mistral", rope_theta=1e6, max_seq_len=32768)
_QWEN = dict(norm_eps=1e-6, rope_theta=1e6, max_seq_len=32768)
_QWEN2 = _QWEN | dict(family="qwen2")
_QWEN3 = _QWEN | dict(family="qwen3", head_dim=128, max_seq_len=40960)
_SMOL = dict(rope_theta=100000.0, max_seq_len=8192, tie_embeddings=True)

# Numbers of the published config.json files; the context of Qwen2.5 is that of its -Instruct models.
PRESETS: Mapping[str, ModelConfig] = {
    "llama-2-7b": _preset(32000, 4096, 32, 32, 32, 11008, max_seq_len=4096),
    "llama-2-13b": _preset(32000, 5120, 40, 40, 40, 13824, max_seq_len=4096),
    "llama-2-70b": _preset(32000, 8192, 80, 64, 8, 28672, max_seq_len=4096),
    "llama-3-8b": _preset(128256, 4096, 32, 32, 8, 14336, **_L3),
    "llama-3-70b": _preset(128256, 8192, 80, 64, 8, 28672, **_L3),
    "llama-3.1-8b": _preset(128256, 4096, 32, 32, 8, 14336, **_L31),
    "llama-3.1-70b": _preset(128256, 8192, 80, 64, 8, 28672, **_L31),
    "llama-3.1-405b": _preset(128256, 16384, 126, 128, 8, 53248, **_L31),
    "llama-3.2-1b": _preset(128256, 2048, 16, 32, 8, 8192, **_L32),
    "llama-3.2-3b": _preset(128256, 3072, 28, 24, 8, 8192, **_L32),
    "mistral-7b-v0.3": _preset(32768, 4096, 32, 32, 8, 14336, **_MISTRAL),
    "qwen2.5-0.5b": _preset(151936, 896, 24, 14, 2, 4864, **_QWEN2, tie_embeddings=True),
    "qwen2.5-1.5b": _preset(151936, 1536, 28, 12, 2, 8960, **_QWEN2, tie_embeddings=True),
    "qwen2.5-7b": _preset(152064, 3584, 28, 28, 4, 18944, **_QWEN2),
    "qwen3-0.6b": _preset(151936, 1024, 28, 16, 8, 3072, **_QWEN3, tie_embeddings=True),
    "qwen3-1.7b": _preset(151936, 2048, 28, 16, 8, 6144, **_QWEN3, tie_embeddings=True),
    "qwen3-4b": _preset(151936, 2560, 36, 32, 8, 9728, **_QWEN3, tie_embeddings=True),
    "qwen3-8b": _preset(151936, 4096, 36, 32, 8, 12288, **_QWEN3),
    "smollm2-135m": _preset(49152, 576, 30, 9, 3, 1536, **_SMOL),
    "smollm2-360m": _preset(49152, 960, 32, 15, 5, 2560, **_SMOL),
    "smollm2-1.7b": _preset(49152, 2048, 24, 32, 32, 8192, **_SMOL | dict(rope_theta=130000.0)),
    "tinyllama-1.1b": _preset(32000, 2048, 22, 32, 4, 5632, max_seq_len=2048),
}
