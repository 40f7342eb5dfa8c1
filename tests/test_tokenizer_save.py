"""write_tokenizer: one tokenizer before and after, for our loader and for transformers'."""

import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from models.llama.chat_format import chat_format_for
from models.llama.tokenizer import Tokenizer, load_tokenizer
from models.llama.tokenizers.model import parse_model
from models.llama.tokenizers.save import write_tokenizer
from tests.oracles import tokenizer_files as oracle
from utils.errors import ArtifactError

# One name of each pattern, and Llama 3's without whole words.
PATTERN_NAMES = ["default", "smollm", "gpt-2", "llama-bpe", "smaug-bpe"]
TEXTS = [*oracle.HOSTILE, *oracle.random_texts(150)]
FIELDS = ("vocab_size", "special_tokens", "bos_id", "eos_id", "pad_id", "stop_ids", "adds_bos")
FIELDS += ("chat_templates", "strips_first_space", "hidden_ids")
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def exported(source: Path, folder: Path) -> Path:
    """The folder with the tokenizer, and a config.json as in every export of a model."""
    folder.mkdir()
    write_tokenizer(source, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(ours: Tokenizer, again: Tokenizer) -> None:
    for field in FIELDS:
        assert getattr(again, field) == getattr(ours, field), field
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text)
        assert again.encode(text, allow_special=True) == ours.encode(text, allow_special=True)
    for i in range(ours.vocab_size):
        assert again.token_bytes(i) == ours.token_bytes(i)


def assert_transformers_agrees(ours: Tokenizer, folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text, allow_special=True)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [ours.bos_id] * ours.adds_bos + ids
        assert theirs.decode(ids) == ours.decode(ids)
        plain = ours.decode(ids, skip_special=True)
        assert theirs.decode(ids, skip_special_tokens=True) == plain
    assert len(theirs) == ours.vocab_size
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ids == (ours.bos_id, ours.eos_id, ours.pad_id)
    if ours.chat_template:
        chats = [[("user", "a  12")], [("system", "½"), ("user", " x\n"), ("assistant", "3 4")]]
        for chat in chats:
            messages = [{"role": role, "content": content} for role, content in chat]
            asks = chat[-1][0] == "user"
            ids = theirs.apply_chat_template(messages, add_generation_prompt=asks)["input_ids"]
            assert chat_format_for(ours).encode_chat(messages, asks) == ids


def assert_export_is_complete(source: Path, folder: Path) -> None:
    """The export is what the source is, for both; its own export equals it byte for byte."""
    ours = load_tokenizer(source)
    assert_same(ours, load_tokenizer(folder))
    assert_transformers_agrees(ours, folder)
    written = contents(folder)
    assert contents(exported(folder, folder.with_name("again"))) == written
    generation = json.loads(written["generation_config.json"])
    assert set(generation["eos_token_id"]) == ours.stop_ids
    assert generation.get("bos_token_id") == ours.bos_id


@pytest.mark.covers("D31")
def test_the_default_model(tmp_path, default_model_path):
    folder = exported(default_model_path, tmp_path / "out")
    assert_export_is_complete(default_model_path, folder)
    assert AutoTokenizer.from_pretrained(folder).encode("a  12") == [81, 256, 33, 34]
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(contents(folder)) == names


@pytest.mark.slow
@pytest.mark.covers("D31")
def test_metas_llama3(tmp_path):
    folder = exported(oracle.LLAMA3_MODEL, tmp_path / "out")
    assert_export_is_complete(oracle.LLAMA3_MODEL, folder)
    written = json.loads((folder / "tokenizer.json").read_text())
    assert written["model"]["merges"] == json.loads(oracle.llama3_json())["model"]["merges"]
    # For Meta's own code.
    assert (folder / "tokenizer.model").read_bytes() == oracle.LLAMA3_MODEL.read_bytes()


def small_metadata(path: Path, **changes) -> dict:
    """The default model's tokenizer with its first 1500 tokens and the merges that build them."""
    metadata = oracle.tokenizer_metadata(path)
    for name, count in (("tokens", 1500), ("token_type", 1500), ("merges", 1248)):
        metadata[f"tokenizer.ggml.{name}"] = metadata[f"tokenizer.ggml.{name}"][:count]
    return metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


@pytest.mark.covers("D31")
@pytest.mark.parametrize("pre", PATTERN_NAMES)
def test_gguf_with_each_way_to_split(tmp_path, default_model_path, pre):
    """With BOS, several stop ids, a pad token of its own, added tokens that are text, templates."""
    metadata = small_metadata(default_model_path, pre=pre, add_bos_token=True)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens += ["the end", "<tag>", "   ", "123"]
    types += [4, 4, 4, 4]
    metadata["tokenizer.ggml.merges"].pop()  # token 1499 can only be had whole
    metadata |= {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.padding_token_id": 0}
    template = metadata["tokenizer.chat_template"]
    source = oracle.write_tokenizer_gguf(tmp_path / "a.gguf", metadata)
    folder = exported(source, tmp_path / "out")
    assert_export_is_complete(source, folder)
    ours = load_tokenizer(folder)
    assert ours.stop_ids == {0, 2, 4, 5} and ours.pad_id == 0 and ours.adds_bos
    assert ours.special_tokens["<tag>"] == 1501 and ours.chat_template == template
    assert (ours.encode(ours.decode([1499])) == [1499]) == (pre == "llama-bpe")
    assert 1500 in ours.encode("the end") and 1501 not in ours.encode("<tag>")


@pytest.mark.covers("D31")
def test_gguf_without_roles(tmp_path, default_model_path):
    """No BOS, no EOS but an end of turn, a pad token that is text, no template."""
    metadata = small_metadata(default_model_path, eot_token_id=2, padding_token_id=700)
    for name in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"):
        del metadata[name]
    del metadata["tokenizer.chat_template"]
    source = oracle.write_tokenizer_gguf(tmp_path / "a.gguf", metadata)
    ours, again = load_tokenizer(source), load_tokenizer(exported(source, tmp_path / "out"))
    assert (again.bos_id, again.eos_id, again.stop_ids) == (None, None, {0, 2, 4})
    # To name it would make a control token of a word.
    assert (ours.pad_id, again.pad_id) == (700, None)
    ours.pad_id = None
    assert_same(ours, again)


def sentencepiece_source(kind: str, root: Path) -> Path:
    model = oracle.sentencepiece_model(markup=kind == "markup")
    if kind == "gguf":
        metadata = oracle.sentencepiece_metadata(model)
        metadata["tokenizer.chat_template"] = "{{ bos_token + messages[0]['content'] }}"
        return oracle.write_tokenizer_gguf(root / "a.gguf", metadata)
    (root / "sp.model").write_bytes(model)
    return root / "sp.model"


@pytest.mark.covers("D31")
@pytest.mark.parametrize("kind", ["model", "gguf", "markup"])
def test_sentencepiece(tmp_path, kind):
    source = sentencepiece_source(kind, tmp_path)
    folder = exported(source, tmp_path / "out")
    ours, again = load_tokenizer(source), load_tokenizer(folder)
    assert_same(ours, again)
    written = contents(folder)
    assert contents(exported(folder, tmp_path / "again")) == written
    if kind == "gguf":
        entries = parse_model(written["tokenizer.model"]).entries
        assert entries == parse_model(oracle.sentencepiece_model()).entries
        assert again.chat_template
    else:
        assert written["tokenizer.model"] == source.read_bytes()
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, 2, 380)
    for name, token_id in ours.special_tokens.items():
        assert theirs.encode(name, add_special_tokens=False) == [token_id]
    if kind == "markup":  # transformers does not know sentencepiece's user-defined pieces
        return
    # transformers' Metaspace puts no space before a text that starts with one; sentencepiece does.
    plain = {text: [p for p in ours.split_special(text) if isinstance(p, str)] for text in TEXTS}
    texts = [text for text in TEXTS if not any(p[0] in " ▁" for p in plain[text])]
    assert len(texts) > 100
    for text in texts:
        ids = ours.encode(text, bos=True, allow_special=True)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special=True)


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    """A folder as on the Hub, with all the files that a tokenizer can have, and others."""
    folder = tmp_path / "hub"
    folder.mkdir()
    spec = oracle.llama2_json(oracle.sentencepiece_model(), False)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer.model").write_bytes(oracle.sentencepiece_model())
    config = ROLES | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(ROLES))
    (folder / "added_tokens.json").write_text('{"<s>": 1}')
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2,   "top_p": 0.9}')
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    (folder / "model.safetensors").write_text("weights")
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.mark.covers("D31")
def test_a_folder_of_hugging_faces_is_copied(tmp_path, hf_folder):
    (tmp_path / "out").mkdir()
    write_tokenizer(hf_folder, tmp_path / "out")
    others = {"config.json", "model.safetensors", "notes.txt"}
    want = {name: data for name, data in contents(hf_folder).items() if name not in others}
    assert contents(tmp_path / "out") == want
    assert_same(load_tokenizer(hf_folder), load_tokenizer(tmp_path / "out"))


def test_stop_ids_that_only_config_json_names_are_kept(tmp_path, hf_folder):
    (hf_folder / "generation_config.json").write_text('{"top_p": 0.9, "pad_token_id": 3}')
    folder = exported(hf_folder, tmp_path / "out")
    assert load_tokenizer(folder).stop_ids == load_tokenizer(hf_folder).stop_ids == {2, 7}
    generation = json.loads((folder / "generation_config.json").read_text())
    want = {"top_p": 0.9, "bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 3}
    assert generation == want


def test_a_single_file_is_taken_with_what_lies_beside_it(tmp_path, hf_folder):
    """tokenizer.model was asked for: the tokenizer.json beside it may not win in the export."""
    folder = exported(hf_folder / "tokenizer.model", tmp_path / "out")
    assert not (folder / "tokenizer.json").exists()
    assert_same(load_tokenizer(hf_folder / "tokenizer.model"), load_tokenizer(folder))
    shutil.move(hf_folder / "tokenizer.json", hf_folder / "other.name")
    folder = exported(hf_folder / "other.name", tmp_path / "json")
    assert not (folder / "tokenizer.model").exists()
    assert_same(load_tokenizer(hf_folder / "other.name"), load_tokenizer(folder))


@pytest.mark.parametrize("place", ["model/original/tokenizer.model", "tokenizer.model"])
def test_metas_folders(tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "params.json").write_text("{}")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ bos_token }}")
    (tmp_path / place).write_bytes(oracle.sentencepiece_model())
    folder = exported(tmp_path / "model", tmp_path / "out")
    assert_same(load_tokenizer(tmp_path / "model"), load_tokenizer(folder))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.encode("the cat") == load_tokenizer(folder).encode("the cat", bos=True)
    assert theirs.chat_template == "{{ bos_token }}"


@pytest.mark.covers("D31", "R2", "R30")
def test_words_and_tags_of_a_gguf_file_stay_what_they_are(tmp_path, default_model_path):
    """A word that the template has too is a word, and a tag is shown, before and after."""
    metadata = small_metadata(default_model_path)
    for name in ("You are", "<think>"):
        metadata["tokenizer.ggml.tokens"].append(name)
        metadata["tokenizer.ggml.token_type"].append(4)
    source = oracle.write_tokenizer_gguf(tmp_path / "a.gguf", metadata)
    folder = exported(source, tmp_path / "out")
    assert_export_is_complete(source, folder)
    ours = load_tokenizer(folder)
    assert ours.encode("You are<think>")[0] == 1500 and 1501 not in ours.encode("You are<think>")
    theirs = AutoTokenizer.from_pretrained(folder)
    said = [1, 1500, 1501, 2]
    assert theirs.decode(said, skip_special_tokens=True) == "You are<think>"
    assert ours.decode(said, skip_special=True) == "You are<think>"


def test_bad_sources(tmp_path, hf_folder):
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="nowhere"):
        write_tokenizer(tmp_path / "nowhere", tmp_path / "out")
    (hf_folder / "added_tokens.json").unlink(missing_ok=True)
    (hf_folder / "added_tokens.json").symlink_to("nowhere")  # git-annex: not fetched yet
    with pytest.raises(ArtifactError, match="added_tokens.json: no such file"):
        write_tokenizer(hf_folder, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_sentencepiece_itself_reads_the_model_from_a_gguf_file(tmp_path):
    folder = exported(sentencepiece_source("gguf", tmp_path), tmp_path / "out")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    original = sentencepiece.SentencePieceProcessor(model_proto=oracle.sentencepiece_model())
    for text in TEXTS:
        assert theirs.encode(text) == original.encode(text)


@pytest.mark.covers("D31", "B7", "R30")
def test_tags_of_a_sentencepiece_gguf(tmp_path):
    """A tag is no control token for other programs: it keeps its type, and text never becomes it."""
    metadata = oracle.sentencepiece_metadata(oracle.sentencepiece_model(markup=True))
    tag = metadata["tokenizer.ggml.tokens"].index("<|im_end|>")
    metadata["tokenizer.ggml.tokens"][tag] = "<think>"
    metadata["tokenizer.ggml.token_type"][tag] = 4
    source = oracle.write_tokenizer_gguf(tmp_path / "a.gguf", metadata)
    folder = exported(source, tmp_path / "out")
    assert_same(load_tokenizer(source), load_tokenizer(folder))
    assert parse_model((folder / "tokenizer.model").read_bytes()).entries[tag].type == 4
    assert tag not in load_tokenizer(folder).encode("<think>")
    assert tag not in load_tokenizer(folder).hidden_ids


def test_roles_of_a_sentencepiece_gguf(tmp_path):
    """A chat model's: another end of text, no BOS before prompts."""
    metadata = oracle.sentencepiece_metadata(oracle.sentencepiece_model(markup=True))
    tokens = metadata["tokenizer.ggml.tokens"]
    end = tokens.index("<|im_end|>")
    metadata |= {"tokenizer.ggml.eos_token_id": end, "tokenizer.ggml.padding_token_id": 2}
    metadata["tokenizer.ggml.token_type"][end] = 3
    metadata["tokenizer.ggml.add_bos_token"] = False
    source = oracle.write_tokenizer_gguf(tmp_path / "a.gguf", metadata)
    folder = exported(source, tmp_path / "out")
    ours = load_tokenizer(source)
    assert (ours.eos_id, ours.stop_ids, ours.pad_id, ours.adds_bos) == (end, {2, end}, 2, False)
    assert_same(ours, load_tokenizer(folder))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (end, 2)
    assert theirs.encode("the<|im_end|>") == ours.encode("the<|im_end|>", allow_special=True)
