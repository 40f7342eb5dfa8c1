"""ModelConfig: read right from each format, and every absurd file refused."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.sku_list import all_registered_models
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from models.llama.config import ModelConfig, RopeScaling
from models.llama.presets import PRESETS
from models.llama.formats import hf, meta
from tests import tiny
from utils.errors import ConfigError
from utils.files import parse_json, read_json

HF = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=64,
)
META = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=32)
META |= dict(multiple_of=8, norm_eps=1e-5, rope_theta=10000.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=8192)


def assert_reads_as(ours: ModelConfig, theirs: LlamaConfig) -> None:
    """Our reading of a file is that of transformers."""
    assert (ours.vocab_size, ours.dim) == (theirs.vocab_size, theirs.hidden_size)
    assert (ours.n_layers, ours.ffn_dim) == (theirs.num_hidden_layers, theirs.intermediate_size)
    assert (ours.n_heads, ours.n_kv_heads) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    width = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or width)
    assert (ours.family, ours.norm_eps) == (theirs.model_type, theirs.rms_norm_eps)
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    for name in ("attention_bias", "mlp_bias"):
        assert getattr(ours, name) == getattr(theirs, name, False)
    names = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}
    assert ours.activation == names.get(theirs.hidden_act, theirs.hidden_act)
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    kind = None if rope["rope_type"] == "default" else rope["rope_type"]
    assert (ours.rope_scaling and ours.rope_scaling.kind) == kind
    if kind:
        assert ours.rope_scaling.factor == rope["factor"]
    if kind == "llama3":
        scaling = ours.rope_scaling
        assert scaling.original_max_len == rope["original_max_position_embeddings"]
        assert (scaling.low_freq_factor, scaling.high_freq_factor) == (
            rope["low_freq_factor"],
            rope["high_freq_factor"],
        )


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_from_hf_reads_what_transformers_wrote(name):
    path, model = tiny.hf_model(name)
    assert_reads_as(hf.to_config(read_json(path / "config.json")), model.config)


# Keys that a file may leave out, each with values that it may have.
OPTIONAL = {
    "num_key_value_heads": [1, 2, 4],
    "head_dim": [4, 8],
    "rms_norm_eps": [1e-5],
    "max_position_embeddings": [64],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True],
    "mlp_bias": [True],
    "hidden_act": ["silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh"],
    "rope_theta": [500000.0, 10000],
    "rope_scaling": [{}, dict(type="linear", factor=4.0), dict(rope_type="linear", factor=2)]
    + [dict(type="linear", factor=2.0, rope_theta=700.0), dict(rope_type="default")]
    + [LLAMA3, {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}]
    + [LLAMA3 | dict(partial_rotary_factor=None), dict(factor=4.0)],
    "rope_parameters": [{}, dict(rope_theta=700.0), dict(rope_type="default", rope_theta=9.0)]
    + [LLAMA3 | dict(rope_theta=5e5), dict(rope_type="linear", factor=2.0)],
    "partial_rotary_factor": [1.0],
    "architectures": [["LlamaForCausalLM"], ["LLaMAForCausalLM"]],
    "pretraining_tp": [1],
    "quantization_config": [],
    "auto_map": [],
}
SIZES = {k: HF[k] for k in ("model_type", "vocab_size", "hidden_size", "intermediate_size")}
SIZES |= {k: HF[k] for k in ("num_hidden_layers", "num_attention_heads")}


@pytest.mark.covers("R23")
@pytest.mark.parametrize(
    "change",
    [{}, *({key: value} for key in OPTIONAL for value in (None, *OPTIONAL[key]))],
    ids=repr,
)
@pytest.mark.parametrize("rest", [{}, dict(rope_theta=1234.5, max_position_embeddings=16384)])
def test_optional_keys_are_read_as_by_transformers(change, rest):
    """Absent, null and given; where transformers takes no null, neither do we."""
    given = json.loads(json.dumps(SIZES | rest | change))
    try:
        theirs = LlamaConfig.from_dict(json.loads(json.dumps(given)))
        assert theirs.rope_parameters["rope_theta"] is not None
    except (StrictDataclassError, AssertionError):
        with pytest.raises(ConfigError):
            hf.to_config(given)
    else:
        assert_reads_as(hf.to_config(given), theirs)


def test_null_within_rope_scaling_is_absent():
    """transformers keeps such a null and fails on it later."""
    linear = dict(rope_type="linear", factor=4.0)
    for null in (dict(type=None), dict(rope_theta=None), dict(low_freq_factor=None), dict(x=None)):
        assert hf.to_config(HF | dict(rope_scaling=linear | null)) == hf.to_config(
            HF | dict(rope_scaling=linear)
        )
    named_by_the_old_key = dict(rope_type=None, type="linear", factor=4.0)
    assert hf.to_config(HF | dict(rope_scaling=named_by_the_old_key)).rope_scaling.factor == 4.0


_configs = st.builds(
    ModelConfig,
    vocab_size=st.integers(1, 10**6),
    dim=st.integers(1, 2**18),
    n_layers=st.integers(1, 200),
    n_heads=st.just(8),
    n_kv_heads=st.sampled_from([1, 2, 8]),
    head_dim=st.sampled_from([2, 64, 128]),
    ffn_dim=st.integers(1, 2**20),
    norm_eps=st.sampled_from([1e-5, 1e-6]),
    rope_theta=st.floats(1, 1e7),
    rope_scaling=st.sampled_from(
        [
            None,
            RopeScaling(kind="linear", factor=3.0),
            RopeScaling(kind="llama3", factor=32.0, high_freq_factor=4.0, original_max_len=8192),
        ]
    ),
    max_seq_len=st.integers(1, 2**31 - 1),
    tie_embeddings=st.booleans(),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(_configs)
def test_to_hf_comes_back(config):
    assert hf.to_config(json.loads(json.dumps(hf.from_config(config)))) == config


@settings(derandomize=True, max_examples=200, deadline=None)
@given(dim=st.integers(1, 2**12).map(lambda n: n * 16), ffn=st.integers(1, 2**18))
def test_to_meta_comes_back_for_any_width(dim, ffn):
    sizes = dict(hidden_size=dim, head_dim=dim // 8, intermediate_size=ffn)
    config = hf.to_config(HF | sizes | dict(num_attention_heads=8))
    assert meta.to_config(meta.from_config(config), max_seq_len=64) == config


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("llama-3")])
def test_presets_agree_with_metas_own_list(name):
    # The list's Llama 2 entries carry Llama 3's numbers: it is no oracle for those.
    descriptor = name if name.startswith("llama-3-") else name.replace("llama-", "llama")
    model = next(m for m in all_registered_models() if m.descriptor().lower() == descriptor)
    preset = PRESETS[name]
    ours = meta.to_config(dict(model.arch_args), tie_embeddings=preset.tie_embeddings)
    assert ours == preset


@pytest.mark.parametrize("name", PRESETS)
def test_n_params_is_what_transformers_builds(name):
    config = PRESETS[name]
    with torch.device("meta"):
        theirs = AutoConfig.for_model(**(hf.from_config(config) | dict(num_hidden_layers=1)))
        model = AutoModelForCausalLM.from_config(theirs)
    one_layer = sum(p.numel() for p in model.model.layers.parameters())
    rest = sum(p.numel() for p in model.parameters()) - one_layer
    assert config.n_params == one_layer * config.n_layers + rest


def test_n_params_with_biases():
    _, model = tiny.hf_model("biases")
    config = hf.to_config(model.config.to_dict())
    assert config.n_params == sum(p.numel() for p in model.parameters())


def test_from_meta_takes_the_vocabulary_of_old_files_from_the_tensor():
    config = meta.to_config(META | dict(vocab_size=-1), vocab_size=77)
    assert config.vocab_size == 77
    with pytest.raises(ConfigError, match="vocab_size=-1"):
        meta.to_config(META | dict(vocab_size=-1))


ABSURD_HF = [
    *[dict(hidden_size=n) for n in (0, -1, 2**40, True, 16.0, "16", None, [16])],
    *[dict(hidden_size=n, head_dim=4) for n in (0, -1, 2**40, True, 16.0, "16", [16])],
    *[dict(num_key_value_heads=n) for n in (3, 0, -2, 8.0, True)],
    *[dict(num_attention_heads=n) for n in (0, 3, -4, 4.0, True, "4")],
    *[dict(vocab_size=n) for n in (0, 10**12, -1, 32.0, True)],
    *[dict(num_hidden_layers=n) for n in (0, 10**6, -2, 2.0, True)],
    *[dict(intermediate_size=n) for n in (0, 2**40, 24.0)],
    *[dict(head_dim=n) for n in (0, 3, -4, 4.0, True, 2**20)],
    *[dict(rope_theta=n) for n in (0, -1.0, float("inf"), float("nan"), True, "1e4", 10**400)],
    *[dict(rms_norm_eps=n) for n in (0, -1e-5, float("nan"), None, 2.0, True)],
    *[dict(max_position_embeddings=n) for n in (0, -1, 64.0, True, 2**40)],
    *[dict(tie_word_embeddings=n) for n in (1, "true", None)],
    *[dict(attention_bias=n) for n in (1, "no")],
    dict(mlp_bias=0),
]


@pytest.mark.covers("A23")
@pytest.mark.parametrize("change", ABSURD_HF, ids=repr)
def test_absurd_hf_config(change):
    with pytest.raises(ConfigError) as e:
        hf.to_config(HF | change)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.covers("A23")
def test_a_config_names_all_of_its_problems():
    with pytest.raises(ConfigError) as e:
        hf.to_config(HF | dict(vocab_size=0, rms_norm_eps=-1, num_hidden_layers=10**6))
    for name in ("vocab_size=0", "norm_eps=-1", "n_layers=1000000"):
        assert name in str(e.value)


@pytest.mark.covers("A23")
@pytest.mark.parametrize(
    "change",
    [
        *[dict(dim=n) for n in (0, -1, 2**40, True, 16.0, None)],
        *[dict(n_heads=n) for n in (0, 3, True, 4.0)],
        *[dict(n_kv_heads=n) for n in (3, 0, True)],
        *[dict(multiple_of=n) for n in (0, -8, 8.0, 2**40)],
        *[dict(ffn_dim_multiplier=n) for n in (0, -1, float("inf"), "1", True)],
        *[dict(rope_theta=n) for n in (0, None, float("inf"))],
        *[dict(norm_eps=n) for n in (0, None, float("nan"))],
        *[dict(n_layers=n) for n in (0, 10**6, 2.0)],
        dict(use_scaled_rope="yes"),
        dict(use_scaled_rope=True, rope_scaling_factor=0),
        dict(moe_args={"num_experts": 16}),
        dict(quantization_args={"group_size": 256}),
        dict(vision_chunk_size=448),
        dict(rope_freq_base=500000.0),
    ],
    ids=repr,
)
def test_absurd_meta_params(change):
    with pytest.raises(ConfigError):
        meta.to_config(META | change)


@pytest.mark.covers("A24")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(model_type="gemma"), "gemma"),
        (dict(model_type="qwen2"), "qwen2.*LlamaForCausalLM"),
        (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (dict(hidden_act="quick_gelu"), "quick_gelu"),
        (dict(hidden_act=["silu"]), "activation"),
        *[(dict(rope_scaling=dict(rope_type=k, factor=2.0)), k) for k in ("dynamic", "yarn", "x")],
        *[(dict(rope_scaling=dict(type=k, factor=2.0)), k) for k in ("dynamic", "longrope")],
        (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, beta_fast=32)), "yarn"),
        (dict(rope_parameters={"full_attention": dict(rope_type="default")}), "full_attention"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor"),
        (dict(rope_scaling=LLAMA3 | dict(factor=0)), "factor=0"),
        (dict(rope_scaling=LLAMA3 | dict(high_freq_factor=1.0)), "low < high"),
        (dict(rope_scaling=LLAMA3, rope_parameters=LLAMA3 | dict(factor=32.0)), "factor"),
        (dict(rope_scaling="linear"), "rope_scaling"),
        (dict(rope_scaling=dict(type="linear")), "factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_unknown_maths_is_refused_by_name(change, named):
    with pytest.raises(ConfigError, match=named):
        hf.to_config(HF | change)


@pytest.mark.covers("A24")
@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
def test_keys_that_name_code_are_ignored_with_a_note(key):
    value = {"AutoModelForCausalLM": "modeling_evil.Evil"} if key == "auto_map" else True
    with pytest.warns(UserWarning, match=key):
        assert hf.to_config(HF | {key: value}) == hf.to_config(HF)
    hidden = HF | dict(_attn_implementation="evil/kernel", _attn_implementation_autoset=True)
    assert hf.to_config(hidden) == hf.to_config(HF)


@pytest.mark.covers("A25")
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_quantised_hf_config(method):
    for key in ("quantization_config", "compression_config"):
        with pytest.raises(ConfigError, match=f"unsupported quantization '{method}'"):
            hf.to_config(HF | {key: {"quant_method": method}})


BAD_JSON = {
    "empty": b"",
    "not JSON": b"{vocab_size: 3}",
    "cut": json.dumps(HF).encode()[:-1],
    "two": b"{}{}",
    "array": b"[]",
    "NaN": b'{"rms_norm_eps": NaN}',
    "Infinity": b'{"rope_theta": -Infinity}',
    "duplicate": b'{"vocab_size": 1, "hidden_size": 2, "vocab_size": 3}',
    "nested duplicate": b'{"rope_scaling": {"factor": 1, "factor": 8}}',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": json.dumps(HF).encode("utf-16"),
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "huge integer": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "large": b'{"a": "' + b"x" * (1 << 20) + b'"}',
}


@pytest.mark.covers("A22")
@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json(tmp_path, case):
    path = tmp_path / "config.json"
    path.write_bytes(BAD_JSON[case])
    with pytest.raises(ConfigError, match="config.json") as e:
        read_json(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.covers("A22")
def test_duplicate_and_constant_are_named(tmp_path):
    with pytest.raises(ConfigError, match="duplicate key 'vocab_size'"):
        parse_json(BAD_JSON["duplicate"], "config.json")
    with pytest.raises(ConfigError, match="NaN"):
        parse_json(BAD_JSON["NaN"], "config.json")
    with pytest.raises(ConfigError, match="no such file"):
        read_json(tmp_path / "params.json")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.mark.covers("A22", "A23")
@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.sampled_from(sorted(HF)), st.sampled_from(sorted(META)), _json)
def test_any_value_of_any_key_is_read_or_refused(hf_key, meta_key, value):
    for read, fields, key in (
        (hf.to_config, HF, hf_key),
        (hf.to_config, HF, "rope_scaling"),
        (meta.to_config, META, meta_key),
    ):
        try:
            config = read(fields | {key: value})
        except ConfigError:
            continue
        assert hash(config) == hash(config)


@pytest.mark.covers("A22")
def test_every_cut_and_flip_of_a_config_is_read_or_refused():
    good = json.dumps(HF).encode()
    bad = [good[:n] for n in range(len(good))]
    bad += [
        good[:i] + bytes([good[i] ^ (1 << bit)]) + good[i + 1 :]
        for i in range(len(good))
        for bit in range(8)
    ]
    for data in bad:
        try:
            hf.to_config(parse_json(data, "config.json"))
        except ConfigError:
            pass
