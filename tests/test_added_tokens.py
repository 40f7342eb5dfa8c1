"""Added tokens of every kind: text, a user's ids and an assistant's, against the tokenizers library."""

import itertools
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from models.llama.chat_format import chat_format_for
from models.llama.tokenizer import Tokenizer
from models.llama.tokenizers.bpe import read_tokenizer_json

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
            for template in (CHATML, f"You know {name}. " + CHATML):
                yield name, dict(zip(FLAGS, values)), template


@pytest.mark.covers("R1", "R2", "R28")
def test_every_kind_of_added_token():
    for name, flags, template in kinds():
        theirs = library(name, flags)
        config = {"eos_token": "<|im_end|>", "chat_template": template}
        ours = Tokenizer(read_tokenizer_json(json.loads(theirs.to_str()), config))
        is_tag = name == "<think>"
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


@pytest.mark.covers("R2", "R28")
def test_every_kind_of_added_token_in_a_conversation():
    """A user's text never holds a tag; an assistant's is as the library has the rendered text."""
    for name, flags, template in kinds():
        theirs = library(name, flags)
        config = {"eos_token": "<|im_end|>", "chat_template": template}
        form = chat_format_for(Tokenizer(read_tokenizer_json(json.loads(theirs.to_str()), config)))
        rendered = template.partition("{%")[0]
        ours = form.encode_chat([{"role": "user", "content": name}])
        alone = form.encode_chat([{"role": "user", "content": "x"}])
        expected = name == "aspirin" and not flags["special"]
        assert ours.count(258) == alone.count(258) + expected, (name, flags, template)
        if flags["special"]:
            continue
        for said in (f"a {name} b", f"{name}\nb", f"a{name}b"):
            chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": said}]
            text = f"{rendered}<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert form.encode_chat(chat, False) == ids, (name, flags, said)
            if not (flags["lstrip"] and ids.count(258) and said.startswith(name)):
                # Otherwise it takes the prompt's last line break, and the answer is refused.
                assert form.encode_training(chat)[0] == ids
