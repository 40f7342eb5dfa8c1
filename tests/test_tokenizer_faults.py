"""Broken and hostile tokenizer files: one typed error each, at load, and nothing approximated."""

import base64
import functools
import json
import re
import struct

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from models.llama.tokenizer import Tokenizer, check_against_model, load_tokenizer, read_gguf
from models.llama.tokenizers.spec import read_tokenizer_json
from models.llama.tokenizers.model import (
    parse_model,
    parse_ranks,
    read_sentencepiece,
    serialize_model,
)
from tests.oracles import tokenizer_files as oracle
from utils.errors import ArtifactError


def tiktoken_lines() -> list[bytes]:
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the"]
    return [base64.b64encode(t) + b" %d" % i for i, t in enumerate(tokens)]


@functools.cache
def small_json_text() -> str:
    return json.dumps(oracle.llama2_json(oracle.sentencepiece_model(), False))


def small_json() -> dict:
    return json.loads(small_json_text())


CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


# tiktoken ------------------------------------------------------------------------------------


@pytest.mark.covers("B1")
@pytest.mark.parametrize(
    "line",
    [
        b"dGg",  # no rank
        b"dGg= ",
        b"dGg 5",  # no padding
        b"en!p6 5",
        b"d Gg= 5",
        b"dGg= 5 6",
        b"dGg= -5",
        b"dGg= +5",
        b"dGg= 5.0",
        b"dGg= 1099511627776",
        b"dGg= 5\r",
        b"dGg=  5",
        b"dGg=\t5",
        b" 5",
        b"",
        "dGg= ٥".encode(),
        b"\xff\xfe",
    ],
)
def test_bad_tiktoken_line(line):
    lines = tiktoken_lines()
    assert len(parse_ranks(b"\n".join(lines) + b"\n")) == 258
    with pytest.raises(ArtifactError, match="^line 101: "):
        parse_ranks(b"\n".join([*lines[:100], line, *lines[100:]]))


@pytest.mark.covers("B2")
def test_inconsistent_tiktoken_ranks():
    lines = tiktoken_lines()
    cases = {
        "line 259: token b'the' is empty or appears twice": [*lines, b"dGhl 258"],
        "ranks are not 0 to 258": [*lines, b"dGhlbg== 257"],
        "ranks are not 0 to 256": [*lines[:256], lines[257]],
        "no token for 1 of the 256 bytes, first 0x7": [
            *lines[:7],
            base64.b64encode(b"zz") + b" 7",
            *lines[8:],
        ],
    }
    for message, broken in cases.items():
        with pytest.raises(ArtifactError, match=re.escape(message)):
            parse_ranks(b"\n".join(broken))


@pytest.mark.covers("B1", "B2", "B3")
def test_other_tiktoken_files_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(tiktoken_lines()))
    with pytest.raises(ArtifactError, match="tokenizer.model: a tiktoken file with 258 tokens"):
        load_tokenizer(tmp_path)


@pytest.mark.covers("B1", "B2")
@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_tiktoken(data):
    whole = b"\n".join(tiktoken_lines())
    at = data.draw(st.integers(0, len(whole) - 1))
    new = data.draw(st.sampled_from([b"", b"\n", b" ", b"0", b"=", b"\0", b"\xff", b"A 9\n"]))
    try:
        ranks = parse_ranks(whole[:at] + new + whole[at + data.draw(st.integers(0, 3)) :])
    except ArtifactError:
        return
    assert sorted(ranks.values()) == list(range(len(ranks)))
    assert {bytes([b]) for b in range(256)} <= ranks.keys()


# Which kind ----------------------------------------------------------------------------------


@pytest.mark.covers("B3")
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "x.bin"])
def test_kind_is_found_from_content(tmp_path, name):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / name
    path.write_bytes(oracle.sentencepiece_model())
    assert load_tokenizer(path).encode("the", bos=True)[0] == 1
    path.write_bytes(oracle.LLAMA3_MODEL.read_bytes())
    assert load_tokenizer(path).vocab_size == 128256
    path.write_text(" \n " + json.dumps(small_json(), indent=1))
    assert load_tokenizer(path).adds_bos
    oracle.write_tokenizer_gguf(path, oracle.sentencepiece_metadata(oracle.sentencepiece_model()))
    assert load_tokenizer(path).stop_ids == {2}


@pytest.mark.covers("B3")
def test_files_of_no_kind(tmp_path):
    cases = {
        b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
        b"<!DOCTYPE html>": "unknown kind of tokenizer",
        b"": "0 bytes",
        b"PK\3\4": "unknown kind",
        b"\x80\x02}": "unknown kind",
        b'{"model": ': "not valid JSON",
        b'{"a": 1, "a": 2}': "duplicate key",
        b'{"a": NaN}': "NaN is not JSON",
        b'{"a":' + b"[" * 100_000: "nested too deeply|not valid JSON",
        b"\n" + b"\xff" * 5000 + b"\1": "bad number before byte 11",
        b"\n\xff\xff\xff\xff\x7f": "truncated",
        b"GGUF": "the version takes 4 bytes",
    }
    for content, message in cases.items():
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ArtifactError, match=message) as caught:
            load_tokenizer(tmp_path)
        assert "tokenizer.model" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match="cannot read"):
        load_tokenizer(tmp_path / "absent")


# sentencepiece -------------------------------------------------------------------------------


@pytest.mark.covers("B3")
def test_sentencepiece_is_read_and_written_whole():
    model = parse_model(oracle.sentencepiece_model(markup=True))
    again = serialize_model(model)
    assert parse_model(again) == model and model.adds_space
    theirs = sentencepiece.SentencePieceProcessor(model_proto=oracle.sentencepiece_model(True))
    ours = sentencepiece.SentencePieceProcessor(model_proto=again)
    for text in [*oracle.HOSTILE, *oracle.random_texts(50)]:
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.covers("B3")
def test_truncated_sentencepiece():
    model = oracle.sentencepiece_model()
    last = len(model) - 200  # TrainerSpec and NormalizerSpec stand at the end
    for end in [*range(0, 100), *range(last, len(model), 3), len(model) - 1]:
        with pytest.raises(ArtifactError, match="truncated|no pieces|is broken"):
            parse_model(model[:end])


@pytest.mark.covers("B3")
@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_sentencepiece(data):
    model = bytearray(oracle.sentencepiece_model())
    for _ in range(data.draw(st.integers(1, 3))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    try:
        tokenizer = Tokenizer(read_sentencepiece(parse_model(bytes(model)), {}))
    except ArtifactError:
        return
    ids = tokenizer.encode("the cat\n <s>")
    assert not set(ids) & set(tokenizer.special_tokens.values())
    tokenizer.decode(range(tokenizer.vocab_size))


@pytest.mark.covers("B4")
@pytest.mark.parametrize(
    "name, content",
    [
        ("added_tokens.json", {"<|im_end|>": 380}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"380": {"content": "<|im_end|>"}}}),
    ],
)
def test_tokens_that_were_added_to_sentencepiece(tmp_path, name, content):
    (tmp_path / "tokenizer.model").write_bytes(oracle.sentencepiece_model())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"1": {"content": "<s>"}}})
    )
    load_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="adds tokens that tokenizer.model does not hold"):
        load_tokenizer(tmp_path)


# tokenizer.json ------------------------------------------------------------------------------


def _without(key):
    return lambda spec: spec["model"].pop(key)


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(spec):
        for key in path:
            spec = spec[key]
        spec[last] = value

    return change


@pytest.mark.covers("B4")
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model"), "model type None"),
        (_set("model", "type", "Unigram"), "model type 'Unigram', expected 'BPE'"),
        (_without("merges"), "model.merges a list"),
        (_without("vocab"), "model.vocab"),
        (_set("model", "vocab", []), "model.vocab"),
        (_set("model", "merges", [["▁the", "zzz"]]), "zzz"),
        (_set("model", "merges", ["t h e"]), "merge 0 is 't h e'"),
        (_set("model", "merges", [["t", 5]]), "merge 0"),
        (_set("model", "merges", [["t"]]), "merge 0"),
        (_set("model", "merges", [7]), "merge 0"),
        (_set("model", "vocab", "▁the", -1), "run from -1"),
        (_set("model", "vocab", "▁the", 1 << 40), "to 1099511627776"),
        (_set("model", "vocab", "▁the", 4.0), "not an integer"),
        (_set("model", "vocab", "▁the", True), "not an integer"),
        (_set("model", "vocab", "new", 5), "have the same id"),
        (_set("model", "vocab", "\ud800", 999), "surrogate|inconsistent"),
        (_set("model", "end_of_word_suffix", "</w>"), "suffixes"),
        (_set("pre_tokenizer", {"type": "Alien"}), "unknown normalizer or pre_tokenizer"),
        (_set("normalizer", {"type": "Alien"}), "unknown normalizer or pre_tokenizer"),
        (_set("decoder", {"type": "WordPiece"}), "decoder"),
        (_set("decoder", None), "decoder"),
        (_set("added_tokens", [{"id": 5, "content": "<x>"}]), "and '<x>' have the same id 5"),
        (
            _set("added_tokens", [{"id": 999, "content": "▁the"}]),
            "token '▁the' has the ids [0-9]+ and 999",
        ),
        (_set("added_tokens", [{"id": -4, "content": "<x>"}]), "run from -4"),
        (_set("added_tokens", [{"id": 1 << 33, "content": "<x>"}]), "to 8589934592"),
        (_set("added_tokens", [{"content": "<x>"}]), "no id or no content"),
        (_set("added_tokens", [{"id": 999}]), "no id or no content"),
        (_set("added_tokens", ["<x>"]), "no id or no content"),
        (_set("added_tokens", {"a": 1}), "added_tokens"),
        (_set("model", "unk_token", "<none>"), "unk_token"),
    ],
)
def test_broken_tokenizer_json(tmp_path, change, message):
    spec = small_json()
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ArtifactError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.covers("B4", "B6")
def test_an_added_token_beyond_the_model_is_refused():
    spec = small_json()
    spec["added_tokens"].append({"id": 5000, "content": "<x>", "special": True})
    tokenizer = Tokenizer(read_tokenizer_json(spec, CONFIG))
    assert tokenizer.vocab_size == 5001 and tokenizer.decode([400]) == "\ufffd"
    with pytest.raises(ArtifactError, match="ids up to 5000, the model 380 rows"):
        check_against_model(tokenizer, 380)


@pytest.mark.covers("B4")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_tokenizer_json(data):
    spec = small_json()
    spec["model"]["merges"] = spec["model"]["merges"][:20]
    at: object = spec
    while isinstance(at, (dict, list)) and at:
        keys = sorted(at) if isinstance(at, dict) else range(len(at))
        parent, key = at, data.draw(st.sampled_from(keys))
        at = at[key]
        if data.draw(st.integers(0, 2)) == 0:
            break
    junk = [None, True, -1, 1 << 70, 0.5, "", "x", "\ud800", [], {}, [[]], {"type": "x"}]
    parent[key] = data.draw(st.sampled_from(junk))
    try:
        tokenizer = Tokenizer(read_tokenizer_json(spec, CONFIG))
    except ArtifactError:
        return
    control = set(tokenizer.special_tokens.values()) - {0}
    assert not set(tokenizer.encode("the cat <s> x\n")) & control
    tokenizer.decode(range(tokenizer.vocab_size))


def test_settings_of_training_runs_are_ignored(tmp_path):
    """Truncation, padding and dropout in the file must not touch a prompt."""
    spec = small_json()
    expected = Tokenizer(read_tokenizer_json(spec, CONFIG)).encode("the cat sat on the mat")
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst"}
    spec["truncation"]["stride"] = 0
    spec["padding"] = {"strategy": {"Fixed": 50}, "direction": "Left", "pad_id": 0}
    spec["padding"] |= {"pad_type_id": 0, "pad_token": "<s>", "pad_to_multiple_of": None}
    spec["model"]["dropout"] = 0.9
    tokenizer = Tokenizer(read_tokenizer_json(spec, CONFIG))
    assert all(tokenizer.encode("the cat sat on the mat") == expected for _ in range(5))


# Ends of a text ------------------------------------------------------------------------------


@pytest.mark.covers("B5")
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer_config.json", {}, "no end-of-sequence token"),
        ("tokenizer_config.json", {"eos_token": "<gone>"}, "eos_token '<gone>' is not in the voc"),
        ("tokenizer_config.json", {"eos_token": {"content": 5}}, "eos_token is 5, expected a str"),
        ("tokenizer_config.json", {"eos_token": ["</s>"]}, "eos_token is"),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": [2, -1]}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": [1.0]}, "eos_token_id"),
    ],
)
def test_missing_or_bad_eos(tmp_path, name, content, message):
    text = json.dumps(small_json())
    if not content:  # </s> would be found by its name
        text = text.replace("</s>", "<finis>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.covers("B5")
def test_missing_bos(tmp_path):
    spec = small_json()
    spec["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="no bos_token is named"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(ArtifactError, match="has no BOS token"):
        load_tokenizer(tmp_path).encode("the", bos=True)


# GGUF ----------------------------------------------------------------------------------------


def small_gguf() -> dict:
    tokens = [chr(256 + n) for n in range(68)] + [chr(c) for c in range(33, 127)] + ["Ġt", "<e>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["Ġ t"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }


@pytest.mark.covers("A32", "B4", "B5")
@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model", "bert", "tokenizer.ggml.model is 'bert'"),
        ("model", None, "tokenizer.ggml.model is None"),
        ("pre", "falcon", "tokenizer.ggml.pre is 'falcon'; known: .*default, .*gpt-2, .*smollm"),
        ("pre", ["a"], "tokenizer.ggml.pre"),
        ("tokens", None, "tokenizer.ggml.tokens is missing"),
        ("tokens", [1, 2], "tokenizer.ggml.tokens"),
        ("tokens", [], "tokenizer.ggml.tokens"),
        ("token_type", [1, 1], "token_type has 2 entries for 164 tokens"),
        ("token_type", [1.0] * 164, "token_type"),
        ("merges", None, "tokenizer.ggml.merges is missing"),
        ("merges", ["a b c"], "merge 0"),
        ("merges", ["a zz"], "zz"),
        ("eos_token_id", 164, "eos_token_id is 164 of 164 tokens"),
        ("bos_token_id", -1, "bos_token_id"),
        ("eot_token_id", "x", "eot_token_id"),
        ("padding_token_id", True, "padding_token_id"),
    ],
)
def test_broken_gguf_tokenizer(key, value, message):
    assert Tokenizer(read_gguf(small_gguf())).encode(" t<e>")[0] == 162
    with pytest.raises(ArtifactError, match=message):
        read_gguf(small_gguf() | {f"tokenizer.ggml.{key}": value})


@pytest.mark.covers("A32", "B4")
def test_broken_gguf_sentencepiece():
    good = oracle.sentencepiece_metadata(oracle.sentencepiece_model())
    scores, types = good["tokenizer.ggml.scores"], good["tokenizer.ggml.token_type"]
    for key, value, message in (
        ("scores", None, "tokenizer.ggml.scores is missing"),
        ("scores", scores[1:], "scores has 379 entries for 380 tokens"),
        ("token_type", [9, *types[1:]], "expected types 1 to 6"),
        ("token_type", [1] * 380, "no token is of the type UNKNOWN"),
        ("tokens", ["<unk>", "a", "a", *["b"] * 377], "sentencepiece refuses the model"),
    ):
        with pytest.raises(ArtifactError, match=message):
            read_gguf(good | {f"tokenizer.ggml.{key}": value})


@pytest.mark.covers("B4")
def test_gguf_without_a_name_for_the_pre_tokenizer_warns():
    metadata = small_gguf()
    del metadata["tokenizer.ggml.pre"]
    with pytest.warns(UserWarning, match="names no tokenizer.ggml.pre: using 'default'"):
        assert Tokenizer(read_gguf(metadata)).encode("t") == [151]


@pytest.mark.covers("B7")
def test_eos_of_gguf_is_a_control_token_whatever_its_type():
    metadata = small_gguf()
    metadata["tokenizer.ggml.merges"] += ["< e", "<e >"]
    metadata["tokenizer.ggml.tokens"].insert(0, "<e")
    metadata["tokenizer.ggml.token_type"] = [1] * 165
    metadata["tokenizer.ggml.eos_token_id"] = 164
    tokenizer = Tokenizer(read_gguf(metadata))
    assert tokenizer.special_tokens == {"<e>": 164}
    assert 164 not in tokenizer.encode("<e>") and tokenizer.decode(tokenizer.encode("<e>")) == "<e>"


@pytest.mark.covers("B7")
def test_a_control_token_that_is_a_whole_word():
    """With `ignore_merges` a word of the vocabulary is taken whole, before any merge."""
    metadata = small_gguf() | {"tokenizer.ggml.pre": "llama-bpe"}
    metadata["tokenizer.ggml.tokens"][-1] = "end"
    metadata["tokenizer.ggml.tokens"][0] = "dog"
    tokenizer = Tokenizer(read_gguf(metadata))
    assert tokenizer.encode("dog") == [0]
    assert tokenizer.encode("end", allow_special=True) == [163]
    assert len(tokenizer.encode("end")) == 3


@pytest.mark.covers("B7")
def test_an_unknown_byte_is_no_control_token():
    """The unknown token of a byte-level model is often its end of text."""
    metadata = small_gguf()
    vocab = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    spec = {"model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<e>"}}
    spec |= {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    }
    spec |= {"decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}
    tokenizer = Tokenizer(read_tokenizer_json(spec, {"eos_token": "<e>"}))
    assert tokenizer.special_tokens == {"<e>": 163}
    assert tokenizer.decode(tokenizer.encode("a\xffb")) == "ab"


@pytest.mark.covers("A32")
def test_a_duplicate_token_in_gguf():
    metadata = small_gguf()
    metadata["tokenizer.ggml.tokens"][3] = metadata["tokenizer.ggml.tokens"][4]
    with pytest.raises(ArtifactError, match="a token appears twice"):
        read_gguf(metadata)
