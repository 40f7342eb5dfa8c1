"""What is only true of Llama's relatives: Qwen2, Qwen3 and Mistral.

Their logits, loaders, exports, gradients and caches are rows of tables elsewhere (`tests.tiny.VARIANTS`).
"""

import json

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from models.llama.chat_format import chat_format_for
from models.llama.config import ModelConfig
from models.llama.formats import hf
from models.llama.layout import FAMILIES
from models.llama.load import load_checkpoint, save_checkpoint
from models.llama.model import LLaMa
from models.llama.presets import PRESETS
from models.llama.tokenizer import load_tokenizer
from models.llama.tokenizers.gguf import gguf_form
from tests import tiny
from tests.oracles import tokenizer_files
from tests.test_config import assert_reads_as
from tests.test_messages import chat, folder, jsonl, real
from tests.test_tokenizer_save import small_metadata
from tests.tiny_gguf import write_gguf
from trainers.data import DataConfig, load_dataset
from utils.errors import ConfigError, DataError

SIZES = dict(vocab_size=64, hidden_size=256, intermediate_size=96)
SIZES |= dict(num_hidden_layers=2, num_attention_heads=32)
RELATIVES = [name for name in FAMILIES if name != "llama"]


@pytest.mark.parametrize("given", [{}, dict(head_dim=16), dict(attention_bias=True)])
@pytest.mark.parametrize("family", RELATIVES)
def test_absent_and_given_keys_are_read_as_by_transformers(family, given):
    given = SIZES | dict(model_type=family, sliding_window=None) | given
    if family != "qwen3":  # their classes do not read attention_bias
        assert not hf.to_config(given).attention_bias
        given.pop("attention_bias", None)
    assert_reads_as(hf.to_config(given), AutoConfig.for_model(**given))


WINDOWS = [
    dict(sliding_window=32),
    dict(sliding_window=64),
    dict(sliding_window=None),
    dict(use_sliding_window=True, max_window_layers=0),
    dict(use_sliding_window=True, sliding_window=32, max_window_layers=1),
    dict(use_sliding_window=True, sliding_window=32, max_window_layers=2),
    dict(use_sliding_window=True, sliding_window=32),
    dict(use_sliding_window=True, sliding_window=64, max_window_layers=0),
    dict(use_sliding_window=True, sliding_window=32, layer_types=["full_attention"] * 2),
    dict(sliding_window=32, use_sliding_window=True, max_window_layers=2)
    | dict(layer_types=["full_attention", "sliding_attention"]),
]


@pytest.mark.covers("A37")
@pytest.mark.parametrize("given", WINDOWS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_within_a_window_is_refused_by_name(family, given):
    given = SIZES | dict(model_type=family, max_position_embeddings=64) | given
    theirs = AutoConfig.for_model(**given)
    window = getattr(theirs, "sliding_window", None) if family != "llama" else None
    types = getattr(theirs, "layer_types", None) if family != "mistral" else None
    narrow = window is not None and window < 64
    if family in ("qwen2", "qwen3"):
        narrow = narrow and "sliding_attention" in types
    if not narrow:
        assert_reads_as(hf.to_config(given), theirs)
    else:
        with pytest.raises(ConfigError, match=f"sliding_window={window}: attention within"):
            hf.to_config(given)


@pytest.mark.covers("A37")
def test_a_window_beside_no_context_is_transformers_default():
    """MistralConfig has a window where config.json says nothing; an export says that there is none."""
    with pytest.raises(ConfigError, match="sliding_window=4096"):
        hf.to_config(SIZES | dict(model_type="mistral"))
    written = hf.from_config(PRESETS["mistral-7b-v0.3"])
    assert written["sliding_window"] is None
    assert AutoConfig.for_model(**written).sliding_window is None


@pytest.mark.covers("A37")
@pytest.mark.parametrize("family", RELATIVES)
def test_yarn_and_other_scalings_are_refused_by_name(family):
    scaling = dict(type="yarn", factor=4.0, original_max_position_embeddings=32768)
    with pytest.raises(ConfigError, match="'yarn' is not supported"):
        hf.to_config(SIZES | dict(model_type=family, rope_scaling=scaling))


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].family != "llama"])
def test_presets_come_back_from_config_json(name):
    config = PRESETS[name]
    assert hf.to_config(json.loads(json.dumps(hf.from_config(config)))) == config


def test_what_a_family_cannot_say_is_refused():
    config = vars(PRESETS["qwen2.5-0.5b"])
    with pytest.raises(ConfigError, match="a qwen2 model has attention_bias=False"):
        ModelConfig(**config | dict(attention_bias=True))
    with pytest.raises(ConfigError, match="family='gemma'"):
        ModelConfig(**config | dict(family="gemma"))


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_metas_layout_has_no_place_for_their_parameters(tmp_path, name):
    config, params = load_checkpoint(tiny.hf_model(name)[0])
    with pytest.raises(ConfigError, match="no norms of q and k; export with format='hf'"):
        save_checkpoint(tmp_path / "out", config, params, format="meta")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_tokens_of_a_gguf_file_are_llama_cpps(tmp_path, name):
    """The order of q's and k's rows is llama.cpp's for each architecture."""
    metadata = tokenizer_files.sentencepiece_metadata(tokenizer_files.sentencepiece_model())
    sizes = dict(vocab_size=len(metadata["tokenizer.ggml.tokens"]), num_hidden_layers=2)
    model = tiny.random_model(AutoConfig.for_model(**(tiny.BASE | tiny.VARIANTS[name] | sizes)))
    path, prompt = tmp_path / "model.gguf", [1, 5, 9, 17, 40, 3]
    write_gguf(path, model.config, model.state_dict(), **metadata)
    theirs = tokenizer_files.LlamaCpp(path).complete(prompt, 12)
    config, params = load_checkpoint(path)
    logits = LLaMa(config).apply({"params": params}, np.array([prompt + theirs]))[0]
    assert np.argmax(logits[0, len(prompt) - 1 : -1], axis=-1).tolist() == theirs


def test_qwens_tokenizer_json_is_read_as_by_transformers(tmp_path, default_model_path):
    """Composed by NFC, split a digit at a time, and without BOS."""
    spec, _ = gguf_form(small_metadata(default_model_path) | {"tokenizer.ggml.pre": "qwen2"})
    spec["normalizer"] = {"type": "NFC"}
    config = dict(tokenizer_class="Qwen2Tokenizer", bos_token=None, unk_token=None)
    config |= dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", add_prefix_space=False)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.bos_id is None and not ours.adds_bos
    for text in [*tokenizer_files.HOSTILE, "e\u0301 12345 We'LL \u212b<|im_start|>"]:
        ids = ours.encode(text, allow_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.encode("e\u0301") == ours.encode("é")


@pytest.mark.parametrize("thinks", [True, False])
def test_enable_thinking_is_an_argument_of_qwen3s_template(tmp_path, thinks):
    path = folder(tmp_path / "m", real("qwen3"))
    form = chat_format_for(
        load_tokenizer(path), None, f'{{"enable_thinking": {str(thinks).lower()}}}'
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(path).apply_chat_template(
        chat("Hello"), add_generation_prompt=True, enable_thinking=thinks
    )["input_ids"]
    assert form.encode_chat(chat("Hello")) == theirs
    assert (form.tokenizer.special_tokens["</think>"] in theirs) is not thinks


def test_of_a_conversation_that_qwen3_rewrites_the_last_answer_is_learnt(tmp_path):
    """Its template leaves the thinking of earlier answers out."""
    tokenizer = load_tokenizer(folder(tmp_path / "m", real("qwen3")))
    rows = jsonl(tmp_path / "rows.jsonl", {"messages": chat("a", "b", "c", "d")})
    shape = dict(seq_len=128, batch_size=1)
    with pytest.raises(DataError, match="rewrites history.*--mask last"):
        load_dataset(rows, tokenizer, DataConfig(**shape))
    batch = next(load_dataset(rows, tokenizer, DataConfig(mask="last", **shape)).epoch_batches())
    learnt = tokenizer.decode(batch["tokens"][batch["target_mask"]].tolist())
    assert learnt == "<think>\n\n</think>\n\nd<|im_end|>"
