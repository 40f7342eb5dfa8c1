"""What decides the maths of a model: `ModelConfig`, read from each format's own file.

No JAX here: a config is plain data, so that loaders and planners can check it before anything else.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.llama import layout
from models.llama.formats.rope import (
    llama3_scaling,
    require,
    rope_from_gguf,
    rope_from_hf,
    shortest,
)
from utils.errors import ConfigError, is_int, is_number, raise_all
from utils.rope import RopeScaling

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_tanh": "gelu_tanh"}

_META_KEYS = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "norm_eps"}
_META_KEYS |= {"multiple_of", "ffn_dim_multiplier", "rope_theta", "use_scaled_rope"}
_META_KEYS |= {"rope_scaling_factor", "rope_high_freq_factor", "max_seq_len", "max_batch_size"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the maths of a Llama model, and nothing else.

    Hugging Face's names: dim hidden_size, n_layers num_hidden_layers, n_heads num_attention_heads,
    n_kv_heads num_key_value_heads, ffn_dim intermediate_size, norm_eps rms_norm_eps, max_seq_len
    max_position_embeddings, tie_embeddings tie_word_embeddings, activation hidden_act.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_seq_len: int
    tie_embeddings: bool
    activation: str
    attention_bias: bool
    mlp_bias: bool

    def __post_init__(self):
        bad = []
        # The largest Llama (405B) has 126 layers, dim 16384, ffn 53248: a generous multiple of each,
        # so that a corrupt file is refused before anything is allocated.
        limits = dict(vocab_size=2**24, dim=2**18, n_layers=4096, n_heads=2**14, n_kv_heads=2**14)
        limits |= dict(head_dim=2**14, ffn_dim=2**20, max_seq_len=2**31 - 1)
        for name, most in limits.items():
            value = getattr(self, name)
            if not is_int(value) or not 1 <= value <= most:
                bad.append(f"{name}={value!r:.80}, expected an integer in 1..{most}")
        for name, most in dict(norm_eps=1.0, rope_theta=1e12).items():
            value = getattr(self, name)
            if not is_number(value) or not 0 < value <= most:
                bad.append(f"{name}={value!r:.80}, expected a number above 0, at most {most:g}")
        for name in ("tie_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                bad.append(f"{name}={getattr(self, name)!r:.80}, expected true or false")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS.values():
            names = ", ".join(sorted(set(ACTIVATIONS.values())))
            bad.append(f"activation={self.activation!r:.80} is not supported ({names})")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            bad.append(f"rope_scaling={self.rope_scaling!r:.80}, expected a RopeScaling or None")
        raise_all("model config", bad)
        if self.n_heads % self.n_kv_heads:
            bad.append(f"n_heads={self.n_heads} is no multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            bad.append(f"head_dim={self.head_dim} is odd: RoPE rotates pairs")
        factors = self.rope_scaling.factors if self.rope_scaling else ()
        if factors and len(factors) != self.head_dim // 2:
            bad.append(f"{len(factors)} rope factors for head_dim={self.head_dim}")
        raise_all("model config", bad)

    @property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix of a layer, by its name."""
        return layout.matrix_shapes(self)

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied head is counted once."""
        return layout.n_params(self)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """From a Hugging Face `config.json`, in either dialect (`rope_theta` + `rope_scaling`, or
        transformers 5's `rope_parameters`).

        A key that is absent has the value that transformers' `LlamaConfig` gives it.
        Raises ConfigError that lists every problem at once.
        """
        _check_hf_is_llama(config)
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        require(config, (*needed, "intermediate_size"), "config.json")
        heads, dim = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim")
        if head_dim is None:
            head_dim = _divide(dim, heads, "hidden_size", "num_attention_heads")
        kv_heads = config.get("num_key_value_heads")
        act = config.get("hidden_act", "silu")
        theta, scaling = rope_from_hf(config)
        return cls(
            vocab_size=config["vocab_size"],
            dim=dim,
            n_layers=config["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            ffn_dim=config["intermediate_size"],
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_seq_len=config.get("max_position_embeddings", 2048),
            tie_embeddings=config.get("tie_word_embeddings", False),
            activation=ACTIVATIONS.get(act, act) if isinstance(act, str) else act,
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers (4 and 5) reads back as this config."""
        hf_names = {"gelu_tanh": "gelu_pytorch_tanh"}
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "factors":
            raise ConfigError(
                "this model's RoPE factors follow no rule that config.json can say; "
                "use the GGUF file itself"
            )
        rope = None if scaling is None else {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling is not None and scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_len,
            }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn_dim,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope,
            "max_position_embeddings": self.max_seq_len,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": hf_names.get(self.activation, self.activation),
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }

    @classmethod
    def from_meta(
        cls,
        params: Mapping[str, Any],
        *,
        vocab_size: int | None = None,
        tie_embeddings: bool = False,
        max_seq_len: int | None = None,
    ) -> "ModelConfig":
        """From Meta's `params.json`.

        The file leaves out what Meta's code fixes: RoPE's three bands (factor 8, or 32 for the two
        shapes of Llama 3.2), the context length, and in old files the vocabulary (-1).

        Args:
            params: the parsed file.
            vocab_size: rows of `tok_embeddings.weight`, for files that say -1.
            tie_embeddings: true where the checkpoint has no `output.weight`.
            max_seq_len: overrides the generation's own context length.
        """
        require(params, ("dim", "n_layers", "n_heads", "norm_eps", "multiple_of"), "params.json")
        # Vision, experts, quantisation and LoRA each bring keys of their own.
        if unknown := sorted(key for key in params if key not in _META_KEYS and params[key]):
            raise ConfigError(
                f"params.json has {', '.join(unknown):.200}: only dense text Llama is supported"
            )
        dim, heads = params["dim"], params["n_heads"]
        vocab = params.get("vocab_size", -1)
        if vocab == -1 and vocab_size is not None:
            vocab = vocab_size
        kv_heads, theta = params.get("n_kv_heads"), params.get("rope_theta", 10000.0)
        scaled = params.get("use_scaled_rope", False)
        if not isinstance(scaled, bool):
            raise ConfigError(f"params.json use_scaled_rope={scaled!r:.80}, expected true or false")
        context = 131072 if scaled else 8192 if theta == 500000.0 else 4096
        if scaled:
            is_3_2 = (dim, params["n_layers"]) in ((2048, 16), (3072, 28))
            factor = params.get("rope_scaling_factor", 32.0 if is_3_2 else 8.0)
            scaling = llama3_scaling(factor, high=params.get("rope_high_freq_factor", 4.0))
        return cls(
            vocab_size=vocab,
            dim=dim,
            n_layers=params["n_layers"],
            n_heads=heads,
            n_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=params.get("head_dim") or _divide(dim, heads, "dim", "n_heads"),
            ffn_dim=_meta_ffn_dim(params),
            norm_eps=params["norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling if scaled else None,
            max_seq_len=max_seq_len or params.get("max_seq_len") or context,
            tie_embeddings=tie_embeddings,
            activation="silu",
            attention_bias=False,
            mlp_bias=False,
        )

    def to_meta(self) -> dict[str, Any]:
        """The `params.json` of this config. Raises ConfigError where Meta's layout cannot say it."""
        if self.attention_bias or self.mlp_bias or self.activation != "silu":
            raise ConfigError("Meta's layout has no biases and only SiLU; export with format='hf'")
        # ffn_dim = multiple_of·⌈…⌉ with multiple_of = ffn_dim gives back ffn_dim exactly.
        base = int(2 * (4 * self.dim) / 3)
        out = {
            "dim": self.dim,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "vocab_size": self.vocab_size,
            "multiple_of": self.ffn_dim,
            "norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
        }
        if base > self.ffn_dim:
            # Half a unit more, so that truncation gives ffn_dim and not one less.
            out["ffn_dim_multiplier"] = (self.ffn_dim + 0.5) / base
        if self.head_dim * self.n_heads != self.dim:
            raise ConfigError("Meta's layout has head_dim = dim / n_heads; export with format='hf'")
        if self.rope_scaling is not None:
            s = self.rope_scaling
            if dataclasses.replace(s, factor=8.0, high_freq_factor=4.0) != llama3_scaling(8.0):
                raise ConfigError(
                    f"Meta's layout has only llama3 RoPE scaling, this model has {s.kind}; "
                    "export with format='hf'"
                )
            out |= {"use_scaled_rope": True, "rope_scaling_factor": s.factor}
            out |= {"rope_high_freq_factor": s.high_freq_factor}
        if ModelConfig.from_meta(out, tie_embeddings=self.tie_embeddings).ffn_dim != self.ffn_dim:
            raise ConfigError(f"Meta's layout cannot say ffn_dim={self.ffn_dim}; use format='hf'")
        return out

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        tie_embeddings: bool,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        rope_factors: np.ndarray | None = None,
    ) -> "ModelConfig":
        """From the key-value part of a GGUF file.

        Args:
            metadata: plain Python values by key.
            tie_embeddings: true where the file has no `output.weight`.
            attention_bias, mlp_bias: true where the file has such tensors; no key says it.
            rope_factors: [head_dim / 2] the tensor `rope_freqs.weight` where the file has it.
        """
        arch = metadata.get("general.architecture")
        if arch != "llama":
            raise ConfigError(f"GGUF general.architecture is {arch!r:.80}, expected 'llama'")
        if metadata.get("llama.expert_count", 0):
            raise ConfigError("GGUF llama.expert_count is not 0: only dense Llama is supported")
        keys = dict(
            dim="embedding_length",
            n_layers="block_count",
            n_heads="attention.head_count",
            ffn_dim="feed_forward_length",
            norm_eps="attention.layer_norm_rms_epsilon",
            max_seq_len="context_length",
        )
        keys = {ours: f"llama.{theirs}" for ours, theirs in keys.items()}
        require(metadata, tuple(keys.values()), "GGUF metadata")
        fields = {ours: metadata[theirs] for ours, theirs in keys.items()}
        heads = fields["n_heads"]
        head_dim = metadata.get("llama.attention.key_length")
        if head_dim is None:
            head_dim = _divide(fields["dim"], heads, keys["dim"], keys["n_heads"])
        for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
            if metadata.get(key, head_dim) != head_dim:
                raise ConfigError(f"GGUF {key}={metadata[key]!r:.80}, expected head_dim={head_dim}")
        vocab = metadata.get("llama.vocab_size")
        if vocab is None:
            tokens = metadata.get("tokenizer.ggml.tokens")
            vocab = len(tokens) if isinstance(tokens, list) else None
        fields["norm_eps"] = shortest(fields["norm_eps"])
        return cls(
            **fields,
            vocab_size=vocab,
            n_kv_heads=metadata.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            rope_theta=shortest(metadata.get("llama.rope.freq_base", 10000.0)),
            rope_scaling=rope_from_gguf(metadata, rope_factors, head_dim),
            tie_embeddings=tie_embeddings,
            activation="silu",
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
        )


def _divide(total: Any, parts: Any, total_name: str, parts_name: str) -> int:
    if not is_int(total) or not is_int(parts) or parts <= 0 or total <= 0 or total % parts:
        raise ConfigError(
            f"{total_name}={total!r:.80} is no multiple of {parts_name}={parts!r:.80}, and no head_dim is given"
        )
    return total // parts


def _check_hf_is_llama(config: Mapping[str, Any]) -> None:
    code = [key for key in ("auto_map", "trust_remote_code", "custom_pipelines") if config.get(key)]
    if code:
        message = f"config.json names code ({', '.join(code)}): ignored, the built-in Llama is used"
        warnings.warn(message, stacklevel=3)
    kind, archs = config.get("model_type"), config.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or archs != ["LlamaForCausalLM"]:
        raise ConfigError(
            f"config.json says model_type={kind!r:.80}, architectures={archs!r:.80}; "
            "expected 'llama' and ['LlamaForCausalLM']"
        )
    method = config.get("quantization_config") or config.get("compression_config")
    if method is not None:
        method = method.get("quant_method") if isinstance(method, Mapping) else method
        raise ConfigError(
            f"unsupported quantization {method!r:.80} in config.json; "
            "use the unquantized checkpoint, or a GGUF file"
        )


def _meta_ffn_dim(params: Mapping[str, Any]) -> int:
    """The width that Meta's FeedForward computes: 2/3 of 4 · dim, scaled, rounded up."""
    dim, multiple = params["dim"], params["multiple_of"]
    for key, value in dict(dim=dim, multiple_of=multiple).items():
        if not is_int(value) or not 1 <= value <= 2**20:
            raise ConfigError(f"params.json {key}={value!r:.80}, expected a positive integer")
    ffn = int(2 * (4 * dim) / 3)
    multiplier = params.get("ffn_dim_multiplier")
    if multiplier is not None:
        if not is_number(multiplier) or not 0 < multiplier < 1e3:
            raise ConfigError(f"params.json ffn_dim_multiplier={multiplier!r:.80}, expected > 0")
        ffn = int(multiplier * ffn)
    return multiple * ((ffn + multiple - 1) // multiple)
