"""Rows and prompts of plain text: seams, spaces, tags, names of control tokens."""

import json

import pytest

from models.llama.decoding import GenerationConfig
from models.llama.generation import RowText
from models.llama.tokenizer import load_tokenizer, plain_prompt
from tests.oracles import tokenizer_files as oracle
from trainers.data import DataConfig, load_dataset
from trainers.plain_rows import encode_plain
from utils.errors import SamplingError

PARTS = [("2 plus 2 is", " 4."), ("2 plus 2 is ", "4."), ("the cat", "\n  sat"), ("", "the cat")]
PARTS += [("the", " "), ("the <s>", "  x"), ("the cat\n\n", "the")]


@pytest.fixture(scope="module", params=["model", "json", "legacy", "gguf"])
def tokenizer(request, tmp_path_factory):
    """Each kind of file that puts a space before a text."""
    folder = tmp_path_factory.mktemp(request.param)
    model = oracle.sentencepiece_model(markup=True)
    if request.param == "model":
        (folder / "tokenizer.model").write_bytes(model)
    elif request.param == "gguf":
        metadata = oracle.sentencepiece_metadata(oracle.sentencepiece_model())
        return load_tokenizer(oracle.write_tokenizer_gguf(folder / "a.gguf", metadata))
    else:
        spec = oracle.llama2_json(oracle.sentencepiece_model(), request.param == "legacy")
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return load_tokenizer(folder)


@pytest.mark.covers("R8")
@pytest.mark.parametrize("prompt, text", PARTS)
def test_a_completion_continues_its_prompt(tokenizer, prompt, text):
    asked, said = encode_plain(prompt, text, tokenizer, markup=False)
    assert tokenizer.decode(asked + said, skip_special=True) == prompt + text
    assert asked == tokenizer.encode(prompt, bos=True) and said[-1] == tokenizer.eos_id
    if prompt == "2 plus 2 is":  # the whole text has a word's end there, and so the same ids
        assert asked + said[:-1] == tokenizer.encode(prompt + text, bos=True)


@pytest.mark.covers("R7")
def test_a_completions_text_continues_its_prompts(tokenizer):
    ids = tokenizer.encode("the cat sat on the mat", bos=True)
    whole = tokenizer.decode(ids, skip_special=True)
    for k in range(1, len(ids)):
        before = tokenizer.decode(ids[:k], skip_special=True)
        after = tokenizer.decode(ids[k:], skip_special=True, after=ids[k - 1])
        assert before + after == whole
        stream = tokenizer.stream(True, ids[k - 1])
        assert "".join(map(stream.push, ids[k:])) + stream.finish() == after
        # An answer in a chat starts a text, also where the template ends in plain text.
        answer = tokenizer.answers.decode(ids[k:], skip_special=True, after=ids[k - 1])
        assert answer == tokenizer.decode(ids[k:], skip_special=True) == after.removeprefix(" ")


@pytest.mark.covers("R12")
def test_markup_in_a_file_that_is_trusted(tokenizer):
    written = "<s>the cat</s> the mat</s>\n"
    ids = sum(encode_plain("", written, tokenizer, markup=True), [])
    assert [i for i in ids if i in (1, 2)] == [1, 2, 2]  # its own BOS and EOS, and no others
    ids = sum(encode_plain("", "the cat", tokenizer, markup=True), [])
    assert ids == tokenizer.encode("the cat", bos=True, eos=True)
    plain = sum(encode_plain("", written, tokenizer, markup=False), [])
    assert plain == tokenizer.encode(written, bos=True, eos=True)
    assert tokenizer.decode(plain, skip_special=True) == written


@pytest.mark.covers("R12", "R28")
def test_rows_with_names_of_control_tokens_are_counted(tmp_path, default_model_path):
    smollm, talk = load_tokenizer(default_model_path), "<|im_start|>user\nhi<|im_end|>\n"
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a<|im_end|>"}]
    rows = [{"text": talk}, {"text": "plain"}, {"prompt": "a", "completion": talk}]
    rows += [{"messages": said}, {"messages": [said[0], said[1] | {"content": "ok"}]}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="3 rows hold names of control tokens.*--markup"):
        data = load_dataset(path, smollm, DataConfig(shuffle=False))
    assert data.counts["with_markup"] == 3
    assert 1 not in data.largest_batch()["tokens"][:1] if len(data) > 8 else True
    with pytest.warns(UserWarning, match="1 rows hold"):
        trusted = load_dataset(path, smollm, DataConfig(shuffle=False, markup=True))
    (batch,) = trusted.epoch_batches()
    assert batch["tokens"][0][:8].tolist() == [1, 4093, 198, 6004, 2, 198, 0, 0]
    assert trusted.digest != data.digest


@pytest.mark.covers("R12")
def test_a_raw_prompt_with_names_of_control_tokens(default_model_path):
    smollm, talk = load_tokenizer(default_model_path), "<|im_start|>user\nhi<|im_end|>\n"
    with pytest.warns(UserWarning, match=r"holds <\|im_start\|>.*--chat.*--markup"):
        assert plain_prompt(talk, smollm) == smollm.encode(talk)
    assert plain_prompt(talk, smollm, markup=True) == smollm.encode(talk, allow_special=True)


@pytest.mark.covers("R9")
def test_a_stop_text_that_is_the_name_of_a_control_token(default_model_path):
    smollm = load_tokenizer(default_model_path)
    row = RowText(smollm, GenerationConfig(stop_strings=("<|im_start|>",)))
    for i in [*smollm.encode("ab"), smollm.special_tokens["<|im_start|>"]]:
        assert not row.stopped
        row.push(i)
    assert row.stopped and row.text == "ab"
    spelt = RowText(smollm, GenerationConfig(stop_strings=("<|im_start|>",)))
    for i in smollm.encode("ab<|im_start|>"):  # letter by letter
        spelt.push(i)
    assert spelt.stopped and spelt.text == "ab"
    for more in ("<|im_end|>\n", "a<|im_end|>", "<|im_end|><|im_start|>"):
        with pytest.raises(SamplingError, match="holds the name of a control token and more"):
            RowText(smollm, GenerationConfig(stop_strings=(more,)))
