"""Added tokens of every kind: text, a user's ids and an assistant's, against the tokenizers library."""

import itertools
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from models.llama.chat.template import LLAMA2, LLAMA3, structural_words
from models.llama.chat_format import chat_format_for
from models.llama.tokenizer import Tokenizer
from models.llama.tokenizers.gguf import read_gguf
from models.llama.tokenizers.model import CONTROL, NORMAL, USER_DEFINED, Entry
from models.llama.tokenizers.model import parse_model, read_sentencepiece
from models.llama.tokenizers.spec import read_tokenizer_json
from tests.oracles import tokenizer_files as oracle
from trainers.plain_rows import encode_plain

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
TEXTS = ["a {} b", "{}", "a{}b", " {}\n{} c", "x {}{} ", "{}.", "ab", "({})"]


def library(name, flags):
    """A tokenizer of bytes with two special tokens and an added one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = [tokenizers.AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")]
    made.add_special_tokens(special)
    made.add_tokens([tokenizers.AddedToken(name, **flags)])
    return made


def kinds():
    for values in itertools.product((False, True), repeat=len(FLAGS)):
        for name in ("<think>", "aspirin"):
            around = CHATML.replace("\n{{ m['content'] }}", f"\n{name}\n{{{{ m['content'] }}}}")
            around = around.replace("assistant\n", f"assistant\n{name}\n")
            for template in (CHATML, f"You know {name}. " + CHATML, around):
                yield name, dict(zip(FLAGS, values)), template


@pytest.mark.covers("R1", "R2", "R28")
def test_every_kind_of_added_token():
    for name, flags, template in kinds():
        theirs = library(name, flags)
        config = {"eos_token": "<|im_end|>", "chat_template": template}
        ours = Tokenizer(read_tokenizer_json(json.loads(theirs.to_str()), config))
        is_tag = name == "<think>" or f"{name}\n" in template
        for text in (t.replace("{}", name) for t in TEXTS):
            kind = name, flags, text
            ids = theirs.encode(text, add_special_tokens=False).ids
            shown = theirs.decode([256, *ids, 257], skip_special_tokens=True)
            assert ours.decode([256, *ids, 257], skip_special=True) == shown, kind
            assert ours.encode(text, allow_special=True) == ids, kind
            typed = ours.encode(text)
            assert (258 in typed) == (258 in ids and not is_tag and not flags["special"]), kind
            assert ours.decode(typed) == text or flags["lstrip"] or flags["rstrip"], kind
            said = ours.encode_pieces(ours.split_tags(text))
            assert said == (typed if flags["special"] else ids), kind


@pytest.mark.covers("R1", "R28")
@pytest.mark.parametrize("legacy", [True, False])
def test_every_kind_of_added_token_in_llama2s_files(legacy):
    """The older ones put a space before each text that they normalize, and before names too."""
    spec = json.dumps(oracle.llama2_json(oracle.sentencepiece_model(), legacy))
    turns = "{% for m in messages %}</s>{{ m.role }}:\n{{ m.content }}</s>{% endfor %}"
    texts = TEXTS + ["</s>{}", "{} </s>{} x", " ▁{}", "the cat{} {}the", ".  {}  b", "\n{}"]
    for (name, flags), _ in itertools.groupby(kinds(), lambda kind: kind[:2]):
        theirs = tokenizers.Tokenizer.from_str(spec)
        theirs.add_tokens([tokenizers.AddedToken(name, **flags)])
        config = {"eos_token": "</s>", "chat_template": turns}
        ours = Tokenizer(read_tokenizer_json(json.loads(theirs.to_str()), config))
        form, added = chat_format_for(ours), theirs.token_to_id(name)
        for text in (t.replace("{}", name) for t in texts):
            kind = name, flags, text
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, allow_special=True) == ids, kind
            # The library itself shows a special token that is normalized.
            if not flags["special"]:
                assert ours.decode(ids, skip_special=True) == theirs.decode(ids), kind
            typed = ours.encode(text)
            assert added not in typed or not (flags["special"] or name == "<think>"), kind
            if flags["special"] or "</s>" in text:
                continue
            assert ours.encode_pieces(ours.split_tags(text)) == ids, kind
            before, after = encode_plain("the (", text, ours, markup=False)
            assert ours.decode(before + after, True) == theirs.decode(
                theirs.encode("the (" + text).ids
            )
            chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
            expected = theirs.encode(form.render(chat, False)).ids
            assert form.encode_chat(chat, False) == expected, kind


@pytest.mark.covers("R2", "R28")
def test_every_kind_of_added_token_in_a_conversation():
    """A user's text never holds a tag; an assistant's is as the library has the rendered text."""
    for name, flags, template in kinds():
        theirs = library(name, flags)
        config = {"eos_token": "<|im_end|>", "chat_template": template}
        form = chat_format_for(Tokenizer(read_tokenizer_json(json.loads(theirs.to_str()), config)))
        rendered, inside = template.partition("{%")[0], f"{name}\n" * (f"{name}\n" in template)
        ours = form.encode_chat([{"role": "user", "content": name}])
        alone = form.encode_chat([{"role": "user", "content": "x"}])
        expected = name == "aspirin" and not flags["special"] and not inside
        assert ours.count(258) == alone.count(258) + expected, (name, flags, template)
        if flags["special"]:
            continue
        for said in (f"a {name} b", f"{name}\nb", f"a{name}b"):
            chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": said}]
            text = f"{rendered}<|im_start|>user\n{inside}x<|im_end|>\n"
            text += f"<|im_start|>assistant\n{inside}{said}<|im_end|>\n"
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert form.encode_chat(chat, False) == ids, (name, flags, said)
            if not (flags["lstrip"] and ids.count(258) and said.startswith(name)):
                # Otherwise it takes the prompt's last line break, and the answer is refused.
                assert form.encode_training(chat)[0] == ids


WORDS = ["aspirin", "Human:", "Human", "Answer:", "Observation:", "Call:", "System: ", "user", "us"]
WORDS += ["\n", "\n\n", ":", "    "]
PREFACE = "{% if messages[0].role != 'system' %}You know aspirin. {% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
TAKES_ONE = "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}"
NAMED = (
    "{% for m in messages %}{% if m.role == 'user' %}Human: {{ m.content }}\n\n{% elif m.role == "
    "'assistant' %}Answer:{{ m.content }}{{ '\n\nCall:' ~ m.tool_calls[0].function.name if "
    "m.tool_calls }}{% elif m.role == 'system' %}System: {{ m.content }}\n\n{% else %}Observation: "
    "{{ m.content | trim }}{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)


@pytest.mark.covers("R2", "B8")
@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, ""),
        (LLAMA2, ""),
        (LLAMA3, ""),
        (PREFACE + CHATML, ""),
        (PREFACE + NAMED, "Human: Answer: Call: Observation: System:"),
        (NO_SYSTEM + "aspirin " + NAMED, "Human: Answer: Call: Observation:"),
        (TAKES_ONE + "System: aspirin\n" + NAMED, "Human: Answer:"),
        (CHATML + "Answer:", "Answer:"),
        ("aspirin", ""),
        ("{% if %}Human: {{ messages }}", ""),
        ([{"name": "a", "template": CHATML}, {"name": "b", "template": NO_SYSTEM + NAMED}],)
        + ("Human: Answer: Call: Observation:",),
    ],
)
def test_which_words_are_structure(template, expected):
    found = structural_words({"chat_template": template}, WORDS)
    assert {w.strip() for w in found} == set(expected.split())


@pytest.mark.covers("R2", "B8")
def test_a_user_cannot_write_a_templates_words():
    """Where nobody tries to, the ids are the library's own."""
    names = ["Human:", "Answer:", "aspirin"]
    spec = json.loads(library(names[0], {}).to_str())
    for n, name in enumerate(names[1:], 259):
        spec["added_tokens"].append(spec["added_tokens"][-1] | {"id": n, "content": name})
    config = {"eos_token": "<|im_end|>", "chat_template": PREFACE + NAMED}
    tokenizer = Tokenizer(read_tokenizer_json(spec, config))
    form, theirs = chat_format_for(tokenizer), tokenizers.Tokenizer.from_str(json.dumps(spec))
    said = "Human: Answer:  aspirin\n\nHuman:"
    chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    ids = form.encode_chat([*chat, {"role": "user", "content": "x"}])
    assert [i for i in ids if i > 257] == [260, 258, 260, 259, 258, 259, 260, 258, 258, 259]
    quiet = [{"role": "user", "content": "is aspirin"}]
    assert form.encode_chat(quiet) == theirs.encode(form.render(quiet)).ids
    assert tokenizer.decode(ids, skip_special=True) == form.render(
        chat + [chat[0] | {"content": "x"}]
    )


@pytest.mark.covers("R2", "B8")
def test_a_user_cannot_write_the_words_of_a_gguf_or_sentencepiece_file():
    config = {"eos_token": "</s>", "chat_template": NAMED}
    model = parse_model(oracle.sentencepiece_model())
    names = ("Human:", "Answer:", "aspirin")
    entries = [*model.entries, *(Entry(name, 0.0, USER_DEFINED) for name in names)]
    llama2 = read_sentencepiece(model._replace(entries=entries), config)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *names, "<|im_end|>"]
    types = [NORMAL] * 256 + [USER_DEFINED] * 3 + [CONTROL]
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": [*letters, "aa"], "merges": ["a a"]}
    fields |= {"token_type": [*types, NORMAL], "eos_token_id": 259}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    metadata["tokenizer.chat_template"] = NAMED
    for vocabulary, first in ((llama2, len(model.entries)), (read_gguf(metadata), 256)):
        tokenizer = Tokenizer(vocabulary)
        chat = [{"role": "user", "content": "Human: Answer: aspirin Human:"}]
        ids = chat_format_for(tokenizer).encode_chat(chat)
        added = [i - first for i in ids if first <= i < first + 3]
        assert added == [0, 2, 1]
        assert tokenizer.decode(ids, skip_special=True) == chat_format_for(tokenizer).render(chat)
