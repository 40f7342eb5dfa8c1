"""Tokenizers against the programs that define them: Meta's, transformers, sentencepiece, llama.cpp."""

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from transformers import PreTrainedTokenizerFast

from models.llama.tokenizer import check_against_model, decode_utf8, load_tokenizer
from models.llama.tokenizers.gguf import GGUF_PATTERNS, TURN_ENDS
from tests.oracles import tokenizer_files as oracle
from tests.test_tokenizer_save import PATTERN_NAMES, small_metadata
from utils.errors import ArtifactError, DataError, SamplingError

TEXTS = [*oracle.HOSTILE, *oracle.random_texts(80)]
KINDS = ["llama3", "llama3_json", "smollm_gguf", "smollm_json"]
KINDS += ["sentencepiece", "sentencepiece_gguf", "llama2_json", "llama2_json_legacy"]


def after_round_trip(kind: str, text: str) -> str:
    """What decoding gives back of a text: all of it, but for what a kind of file cannot hold."""
    if kind.startswith("smollm"):
        # No token for some bytes; llama.cpp and transformers drop them too (see HOSTILE).
        missing = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2])
        return text.encode().translate(None, missing).decode(errors="replace")
    if kind.startswith("llama3"):
        return text
    # sentencepiece writes a space as "▁"; Metaspace puts none before a text that starts with one.
    return text.replace("▁", " ").removeprefix(" " if kind == "llama2_json" else "")


@pytest.fixture(scope="session")
def files(tmp_path_factory, default_model_path) -> dict[str, Path]:
    """A path of each kind of tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    metadata = oracle.tokenizer_metadata(default_model_path)
    model = oracle.sentencepiece_model()
    (root / "sp.model").write_bytes(model)
    found = {"llama3": oracle.LLAMA3_MODEL, "smollm_gguf": default_model_path}
    found["sentencepiece"] = root / "sp.model"
    found["sentencepiece_gguf"] = oracle.write_tokenizer_gguf(
        root / "sp.gguf", oracle.sentencepiece_metadata(model)
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llama3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    smollm = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    for name, spec, config in (
        ("llama3_json", oracle.llama3_json(), llama3),
        ("smollm_json", json.dumps(oracle.smollm_json(metadata)), smollm),
        ("llama2_json", json.dumps(oracle.llama2_json(model, False)), roles),
        ("llama2_json_legacy", json.dumps(oracle.llama2_json(model, True)), roles),
    ):
        found[name] = root / name
        found[name].mkdir()
        (found[name] / "tokenizer.json").write_text(spec)
        config = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
        (found[name] / "tokenizer_config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="session")
def load(files):
    cache = {}

    def get(kind: str):
        if kind not in cache:
            cache[kind] = load_tokenizer(files[kind])
        return cache[kind]

    return get


def test_llama3_equals_metas_reference(load):
    ours, meta = load("llama3"), MetaTokenizer(oracle.LLAMA3_MODEL)
    for text in TEXTS:
        assert ours.encode(text) == meta.encode(text, bos=False, eos=False)
        special = meta.encode(text, bos=True, eos=True, allowed_special="all")
        assert ours.encode(text, bos=True, eos=True, allow_special=True) == special
        assert ours.decode(special) == meta.decode(special)
    assert ours.special_tokens == meta.special_tokens
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (meta.n_words, meta.bos_id, meta.eos_id)
    assert ours.stop_ids == {128001, 128008, 128009} == set(meta.stop_tokens)
    assert ours.pad_id == 128004 == meta.pad_id and ours.adds_bos


@pytest.mark.parametrize("kind", [k for k in KINDS if "json" in k])
def test_tokenizer_json_equals_transformers(files, load, kind):
    ours, theirs = load(kind), PreTrainedTokenizerFast.from_pretrained(files[kind])
    for text in TEXTS:
        special = ours.encode(text, allow_special=True)
        assert special == theirs.encode(text, add_special_tokens=False)
        if not any(i in special for i in ours.special_tokens.values()):
            assert ours.encode(text) == special
            assert ours.encode(text, bos=ours.adds_bos) == theirs.encode(text)
        assert ours.decode(special) == theirs.decode(special)
        assert ours.decode(special, skip_special=True) == theirs.decode(
            special, skip_special_tokens=True
        )
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_the_kinds_of_one_tokenizer_agree(load):
    for text in TEXTS:
        assert load("llama3").encode(text) == load("llama3_json").encode(text)
        assert load("smollm_gguf").encode(text) == load("smollm_json").encode(text)
        assert load("sentencepiece").encode(text) == load("sentencepiece_gguf").encode(text)
    for a, b in (("llama3", "llama3_json"), ("smollm_gguf", "smollm_json")):
        for field in ("special_tokens", "bos_id", "pad_id", "adds_bos", "vocab_size"):
            assert getattr(load(a), field) == getattr(load(b), field), field
    assert load("llama3").stop_ids == load("llama3_json").stop_ids
    # llama.cpp also stops at the name of a repository, which starts another file.
    assert load("smollm_json").stop_ids == load("smollm_gguf").stop_ids - {4} == {0, 2}


@pytest.mark.covers("R22")
@pytest.mark.parametrize("pre", PATTERN_NAMES)
def test_gguf_equals_llama_cpp(tmp_path, default_model_path, pre):
    metadata = oracle.tokenizer_metadata(default_model_path) | {"tokenizer.ggml.pre": pre}
    path = default_model_path
    if pre != "smollm":
        path = oracle.write_tokenizer_gguf(tmp_path / "a.gguf", metadata)
    ours, llama_cpp = load_tokenizer(path), oracle.LlamaCpp(path)
    for text in TEXTS:
        assert ours.encode(text) == llama_cpp.encode(text)
        assert ours.encode(text, allow_special=True) == llama_cpp.encode(text, parse_special=True)
    if pre == "smollm":
        assert ours.encode("a  12") == [81, 256, 33, 34]


@pytest.mark.slow
@pytest.mark.covers("R22")
def test_every_name_of_a_pattern_is_llama_cpps(tmp_path, default_model_path):
    for pre in GGUF_PATTERNS:
        metadata = small_metadata(default_model_path) | {"tokenizer.ggml.pre": pre}
        path = oracle.write_tokenizer_gguf(tmp_path / "a.gguf", metadata)
        ours, llama_cpp = load_tokenizer(path), oracle.LlamaCpp(path)
        for text in TEXTS[:40]:
            assert ours.encode(text) == llama_cpp.encode(text), pre


@pytest.mark.covers("R19")
@pytest.mark.parametrize(
    "names",
    [
        ["<|im_start|>", "<|im_end|>"],
        [name for name in TURN_ENDS if name not in ("<|call|>", "<|calls|>", "<|tool_response>")],
        ["<|call|>", "<|return|>", "<|end|>", "<|fim_pad|>", "<|repo_name|>"],
    ],
)
def test_gguf_stops_where_llama_cpp_stops(tmp_path, names):
    """The metadata name `</s>` alone, or nothing; a type other than CONTROL does not matter."""
    metadata = oracle.sentencepiece_metadata(oracle.sentencepiece_model())
    for n, name in enumerate(set(names) - {"</s>"}):
        metadata["tokenizer.ggml.tokens"].append(name)
        metadata["tokenizer.ggml.scores"].append(0.0)
        metadata["tokenizer.ggml.token_type"].append(3 + n % 2)
    path = oracle.write_tokenizer_gguf(tmp_path / "a.gguf", metadata)
    ours = load_tokenizer(path)
    assert ours.stop_ids == oracle.LlamaCpp(path).stop_ids()
    assert ours.stop_ids <= ours.hidden_ids


@pytest.mark.covers("R19")
@pytest.mark.parametrize(
    "config, template, stops",
    [({}, "", {2, 380, 381}), ({"eos_token_id": 2}, "", {2})]
    + [({"eos_token_id": 2}, "{{ 'x<|im_end|>' }}", {2, 380})],
)
def test_the_end_of_a_turn_that_no_hugging_face_file_names(tmp_path, config, template, stops):
    spec = oracle.llama2_json(oracle.sentencepiece_model(), False)
    added = {"<|im_end|>": 380, "<|endoftext|>": 381}
    spec["added_tokens"] += [{"id": i, "content": n, "special": True} for n, i in added.items()]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    roles = {"eos_token": "</s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).stop_ids == stops


@pytest.mark.covers("R24")
@pytest.mark.parametrize("where", ["json", "tag", "model", "decoder"])
def test_a_pad_token_that_the_model_has_no_row_for(tmp_path, where):
    """Llama 2's own files had 32001 tokens for 32000 rows; nothing needs a pad token."""
    config, added = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}, {"<pad>": 380}
    if where in ("model", "decoder"):
        (tmp_path / "tokenizer.model").write_bytes(oracle.sentencepiece_model())
        entry = {"added_tokens_decoder": {"380": {"content": "<pad>"}}}
        config |= entry if where == "decoder" else {}
        added = added if where == "model" else {}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    else:
        spec = oracle.llama2_json(oracle.sentencepiece_model(), False)
        spec["added_tokens"].append({"id": 380, "content": "<pad>", "special": where == "json"})
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        if where == "tag":
            config["pad_token"] = ""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="pad token.*unused"):
        tokenizer = load_tokenizer(tmp_path)
        check_against_model(tokenizer, 380)
    assert tokenizer.pad_id is None and tokenizer.encode("the", bos=True)[0] == 1


@pytest.mark.covers("R24")
def test_a_pad_token_in_no_vocabulary_and_empty_names(tmp_path):
    spec = oracle.llama2_json(oracle.sentencepiece_model(), False)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"eos_token": "</s>", "bos_token": "", "unk_token": "", "pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"pad token '\[PAD\]' is not in the vocabulary: unused"):
        tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id is None and tokenizer.eos_id == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gguf_says_whether_a_prompt_starts_with_bos(tmp_path, default_model_path, kind):
    """Where it does not, sentencepiece's prompts and Llama 3's do, others do not."""
    metadata = small_metadata(default_model_path)
    if kind == "llama":
        metadata = oracle.sentencepiece_metadata(oracle.sentencepiece_model())
    found = {}
    for pre, says in itertools.product(("smollm", "llama-bpe"), (True, False, None)):
        more = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": says}
        given = {key: value for key, value in (metadata | more).items() if value is not None}
        path = oracle.write_tokenizer_gguf(tmp_path / f"{pre}-{says}.gguf", given)
        found[pre, says] = load_tokenizer(path).adds_bos
    implied = {"smollm": kind == "llama", "llama-bpe": True}
    assert found == {(pre, says): implied[pre] if says is None else says for pre, says in found}


@pytest.mark.parametrize("adds_space", [True, False])
def test_sentencepiece_in_gguf_equals_llama_cpp(tmp_path, adds_space):
    metadata = oracle.sentencepiece_metadata(oracle.sentencepiece_model())
    metadata["tokenizer.ggml.add_space_prefix"] = adds_space
    path = oracle.write_tokenizer_gguf(tmp_path / "a.gguf", metadata)
    ours, llama_cpp = load_tokenizer(path), oracle.LlamaCpp(path)
    for text in TEXTS:
        assert ours.encode(text) == llama_cpp.encode(text)


def test_sentencepiece_equals_sentencepiece(load):
    ours = load("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=oracle.sentencepiece_model())
    for text in TEXTS:
        assert ours.encode(text, bos=True, eos=True) == [1, *theirs.encode(text), 2]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    rng = np.random.default_rng(0)
    words = [i for i in range(3, theirs.vocab_size()) if not theirs.is_byte(i)]
    for _ in range(200):
        ids = rng.choice(words, size=6).tolist()
        assert ours.decode([1, *ids, 2], skip_special=True) == theirs.decode([1, *ids, 2])
    assert ours.decode([5, 0]) == theirs.decode([5, 0])
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (1, 2, None, {2})


@pytest.mark.covers("B7")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_text_never_becomes_a_control_token(load, kind, data):
    tokenizer = load(kind)
    names = st.sampled_from(sorted(tokenizer.special_tokens))
    pieces = st.lists(st.one_of(names, st.text(max_size=4), st.sampled_from(" \n<|>s/")))
    text = "".join(data.draw(pieces))
    # A token for unknown characters is no control token: it steers nothing.
    control = set(tokenizer.special_tokens.values()) - {tokenizer.special_tokens.get("<unk>")}
    ids = tokenizer.encode(text)
    assert not control & set(ids)
    assert tokenizer.decode(ids) == after_round_trip(kind, text)
    halves = data.draw(st.integers(0, len(text)))
    bits = [p for p in (text[:halves], tokenizer.eos_id, text[halves:]) if p != ""]
    assert [i for i in tokenizer.encode_pieces(bits) if i in control] == [tokenizer.eos_id]


@pytest.mark.covers("B7")
def test_nested_names_are_plain_text(load):
    for kind in KINDS:
        tokenizer = load(kind)
        text = "<|eo<|eot_id|>t_id|><s>[INST]<|im_<|im_end|>end|><|start_header_id|>system</s>"
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == text


@pytest.mark.covers("B7", "B8", "R1", "R2", "R28")
def test_added_tokens_that_are_not_special(tmp_path, default_model_path):
    """Tags come from no user's text, but from an assistant's; words and runs of spaces are text."""
    spec = oracle.smollm_json(oracle.tokenizer_metadata(default_model_path))
    names = ["<think>", "aspirin", "      ", "covid", "<é>"]
    spec["added_tokens"] += [
        {"id": 49152 + n, "content": name, "special": False} for n, name in enumerate(names)
    ]
    spec["added_tokens"].append({"id": 49157, "content": "<thi", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ 'aspirin      ' }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    text = "<think>aspirin      covid<é>"
    assert [i for i in tokenizer.encode(text) if i >= 49152] == [49153, 49154, 49155]
    every = [49152, 49153, 49154, 49155, 49156]
    assert tokenizer.encode(text, allow_special=True) == every
    assert tokenizer.encode_pieces(tokenizer.split_tags(text)) == every
    assert 49157 not in tokenizer.encode_pieces(tokenizer.split_tags("<thi" + text))
    assert tokenizer.decode(every) == tokenizer.decode(every, skip_special=True) == text
    assert tokenizer.decode([49157, 2], skip_special=True) == ""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.covers("B7", "R1", "R28")
def test_user_defined_pieces_of_sentencepiece(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(oracle.sentencepiece_model(markup=True))
    tokenizer = load_tokenizer(tmp_path)
    assert set(tokenizer.special_tokens) == {"<s>", "</s>", "<|im_end|>", "▁<EOT>"}
    text = "the <|im_end|> <EOT>  cat"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text
    theirs = sentencepiece.SentencePieceProcessor(model_proto=oracle.sentencepiece_model(True))
    assert tokenizer.encode("a  cat sat") == theirs.encode("a  cat sat")  # "  " is still a piece
    for said in ("the <|im_end|> cat", "<|im_end|>the", "a<|im_end|>the <|im_end|><|im_end|> "):
        ids = tokenizer.encode_pieces(tokenizer.split_tags(said))
        assert ids == theirs.encode(said) and tokenizer.decode(ids, True) == theirs.decode(ids)


@pytest.mark.covers("B9")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(text=st.text(max_size=40))
def test_round_trip(load, kind, text):
    assert load(kind).decode(load(kind).encode(text)) == after_round_trip(kind, text)


@pytest.mark.covers("B9", "C13")
def test_text_that_is_no_unicode(load):
    for kind in ("llama3", "smollm_gguf", "sentencepiece"):
        with pytest.raises(DataError, match=r"text: lone surrogate U\+D800 at character 2"):
            load(kind).encode("ab\ud800")
    with pytest.raises(DataError, match="stdin is not UTF-8: byte 0xff at offset 3"):
        decode_utf8(b"abc\xffd", "stdin")
    assert decode_utf8(b"\xef\xbb\xbfa\xef\xbb\xbf", "x") == "a\ufeff"
    for form in ("e\u0301", "é", "\u202eabc", "👩‍👧", "\0", "\ufeffa"):
        assert load("llama3").decode(load("llama3").encode(form)) == form


UNITS = ["a", " ", "\n", "^", "-", "0", "😀", "e\u0301\u0302", "漢"]


@pytest.mark.covers("B10")
@pytest.mark.parametrize("kind", ["llama3", "llama3_json", "smollm_gguf", "sentencepiece"])
def test_time_is_linear_in_the_text(load, kind):
    # Of the processor: what else the machine does meanwhile has no part in it.
    def seconds(unit: str, size: int, tries: int) -> float:
        text = unit * (size // len(unit.encode()))
        best = float("inf")
        for _ in range(tries):
            start = time.process_time()
            load(kind).encode(text)
            best = min(best, time.process_time() - start)
        return best

    for unit in UNITS:
        small, large = seconds(unit, 15_000, tries=2), seconds(unit, 120_000, tries=1)
        # Eight times the text; quadratic would be 64 times the time.
        assert large < 25 * max(small, 0.002), (unit, small, large)
    start = time.process_time()
    load(kind).encode("a" * 1_000_000)
    assert time.process_time() - start < 5


@pytest.mark.covers("B10", "B11")
def test_long_runs_are_cut_as_metas_reference_cuts_them(load):
    meta = MetaTokenizer(oracle.LLAMA3_MODEL)
    words = "ab " * 140_000
    texts = ["a" * 25_000, "a" * 25_001, " " * 60_001, "x" + " " * 50_001 + "y", words]
    texts += ["é" * 25_003 + " b", "\x1c" * 25_003, "b" * 399_990 + " " * 30_000]
    texts += [unit * 30_000 for unit in UNITS]
    for text in texts:
        ids = meta.encode(text, bos=False, eos=False)
        assert load("llama3").encode(text) == ids
        assert load("llama3").decode(ids) == text
    # tokenizer.json has no such cuts: the same up to 25,000 characters in a run, not beyond.
    assert load("llama3_json").encode(" " * 25_000) == load("llama3").encode(" " * 25_000)
    assert load("llama3_json").encode(" " * 25_001) != load("llama3").encode(" " * 25_001)


@pytest.mark.covers("B12")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_stream_joins_to_decode(load, kind, data):
    tokenizer = load(kind)
    ids = data.draw(st.lists(st.integers(0, min(tokenizer.vocab_size, 600) - 1), max_size=12))
    ids += tokenizer.encode(data.draw(st.text(max_size=8)))
    for skip in (False, True):
        stream = tokenizer.stream(skip)
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) + stream.finish() == tokenizer.decode(ids, skip)


@pytest.mark.covers("B12")
def test_stream_holds_back_unfinished_characters(load):
    for kind in KINDS:
        ids = load(kind).encode("👩‍👧 漢é\U0001f9ff")
        stream = load(kind).stream()
        shown = [stream.push(i) for i in ids]
        assert "\ufffd" not in "".join(shown) and "" in shown and stream.finish() == ""
        assert "".join(shown) == "👩‍👧 漢é\U0001f9ff"
        cut = load(kind).stream()
        assert cut.push(ids[0]) + cut.push(ids[1]) in ("", "👩")
    ids = load("llama3").encode("\U0001f9ff")
    stream = load("llama3").stream()
    assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.finish() == "\ufffd"


def test_decoding_bytes_that_are_no_utf8_equals_the_references(load):
    meta, rng = MetaTokenizer(oracle.LLAMA3_MODEL), np.random.default_rng(0)
    for _ in range(100):
        ids = rng.integers(0, 256, size=6).tolist()
        assert load("llama3").decode(ids) == meta.decode(ids)


@pytest.mark.covers("B13")
@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary(load, kind):
    tokenizer = load(kind)
    for bad in (-1, tokenizer.vocab_size, 1 << 70, 1.5, None, "a"):
        for call in (lambda: tokenizer.decode([bad]), lambda: tokenizer.token_bytes(bad)):
            with pytest.raises(SamplingError, match="expected an integer from 0 to"):
                call()
    every = range(tokenizer.vocab_size)
    assert all(isinstance(tokenizer.token_bytes(i), bytes) for i in every)
    assert tokenizer.decode(np.array([5, 6], np.int32)) == tokenizer.decode([5, 6])


@pytest.mark.covers("B13")
def test_reserved_ids_are_literal(load):
    assert load("llama3").decode([128255]) == "<|reserved_special_token_245|>"
    assert load("llama3").decode([128255], skip_special=True) == ""


@pytest.mark.covers("B5", "B6")
def test_a_tokenizer_larger_than_the_model_is_refused(load):
    tokenizer = load("smollm_gguf")
    check_against_model(tokenizer, 49152)
    check_against_model(tokenizer, 60000)
    with pytest.raises(ArtifactError, match="ids up to 49151, the model 49151 rows"):
        check_against_model(tokenizer, 49151)


def test_folders(tmp_path, files):
    def copy(kind: str, name: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(files[kind].read_bytes())

    with pytest.raises(ArtifactError, match="empty"):
        load_tokenizer(tmp_path)
    copy("sentencepiece_gguf", "weights.gguf")
    assert load_tokenizer(tmp_path).vocab_size == 380
    copy("llama3", "original/tokenizer.model")
    assert load_tokenizer(tmp_path).vocab_size == 128256
    copy("sentencepiece", "tokenizer.model")
    assert load_tokenizer(tmp_path).vocab_size == 380
    copy("sentencepiece", "7B/consolidated.00.pth")
    with pytest.raises(ArtifactError, match="no tokenizer.model and 0 .gguf files"):
        load_tokenizer(tmp_path / "7B")
    (tmp_path / "7B" / "params.json").write_text("{}")
    assert load_tokenizer(tmp_path / "7B").vocab_size == 380
    spec = oracle.llama2_json(oracle.sentencepiece_model(), False)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "add_bos_token": false}')
    assert load_tokenizer(tmp_path).adds_bos is False


@pytest.mark.covers("B5")
def test_stop_ids_are_a_union(tmp_path, files, load):
    (tmp_path / "tokenizer.model").write_bytes(oracle.sentencepiece_model())
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(tmp_path).stop_ids == {2, 7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_tokenizer(tmp_path).stop_ids == {2, 5, 6}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 400}')
    with pytest.raises(ArtifactError, match="ids up to 400, the model 380 rows"):
        check_against_model(load_tokenizer(tmp_path), 380)
    assert load("llama3_json").stop_ids == {128001, 128008, 128009}
