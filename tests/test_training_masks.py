"""Which tokens of a conversation an assistant has to produce: against transformers, and by hand."""

import pytest

from models.llama.chat_format import chat_format_for
from models.llama.tokenizer import load_tokenizer
from tests.oracles import tokenizer_files as oracle
from tests.test_chat_format import CASES, CHATS, cases, chat, make  # noqa: F401 (a fixture)
from utils.errors import DataError

# As templates are written for training: an answer and its stop token are between the marks.
GENERATION = {
    "smollm": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}"
        "{% endgeneration %}{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}
ANSWERED = [c + [{"role": "assistant", "content": "Yes, 3."}] for c in CHATS] + CHATS


def marked(form, messages, first=0):
    """The texts of the runs of marked tokens."""
    ids, mask = form.encode_training(messages, first)
    assert ids == form.encode_chat(messages, False) and len(mask) == len(ids)
    runs, at = [], None
    for n, wanted in enumerate([*mask, False]):
        if wanted and at is None:
            at = n
        elif not wanted and at is not None:
            runs.append(form.tokenizer.decode(ids[at:n]))
            at = None
    return runs


@pytest.mark.parametrize("kind", GENERATION)
def test_masks_equal_those_of_templates_that_mark_answers(make, kind):  # noqa: F811
    form = chat_format_for(make(kind, GENERATION[kind]))
    theirs = make(kind, GENERATION[kind], twin=True)
    same = 0
    for messages in ANSWERED:
        expected = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        try:
            ids, mask = form.encode_training(messages)
        except DataError as e:  # "\n\n" is one token: half of it is the prompt's
            assert "rewrites history, or joins" in str(e) and kind == "smollm"
            assert any(m["content"][:1].isspace() for m in messages if m["role"] == "assistant")
            continue
        assert ids == expected["input_ids"]
        assert [int(m) for m in mask] == expected["assistant_masks"]
        same += 1
    assert same > 40


@pytest.mark.parametrize("kind, name", [("llama3", "llama3"), ("llama2", "llama2")])
def test_built_in_formats_mark_answers_and_the_stop_token(make, kind, name):  # noqa: F811
    form = chat_format_for(make(kind, None), name)
    stop = {"llama3": "<|eot_id|>", "llama2": " </s>"}[name]
    for messages in ANSWERED:
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        if kind == "llama2" and any(not a or "▁" in a for a in answers):
            continue  # sentencepiece does not give these back
        assert marked(form, messages) == [a + stop for a in answers]


def test_the_ids_by_hand(tmp_path, default_model_path):
    form = chat_format_for(load_tokenizer(oracle.LLAMA3_MODEL), "llama3")
    ids, mask = form.encode_training(chat("Hi", "Hello", "Bye", "See you"))
    start, end, eot, lines = 128006, 128007, 128009, 271
    user, assistant = [start, 882, end, lines], [start, 78191, end, lines]
    encode = form.tokenizer.encode
    turns = [
        ([128000, *user, *encode("Hi"), eot, *assistant], False),
        ([*encode("Hello"), eot], True),
        ([*user, *encode("Bye"), eot, *assistant], False),
        ([*encode("See you"), eot], True),
    ]
    assert ids == [i for part, _ in turns for i in part]
    assert mask == [wanted for part, wanted in turns for _ in part]
    (tmp_path / "tokenizer.model").write_bytes(oracle.sentencepiece_model())
    form = chat_format_for(load_tokenizer(tmp_path), "llama2")
    prompt = form.tokenizer.encode("[INST] the cat [/INST]", bos=True)
    ids, mask = form.encode_training(chat("the cat", "sat"))
    assert ids[: len(prompt)] == prompt and mask == [False] * len(prompt) + [True] * (
        len(ids) - len(prompt)
    )
    form = chat_format_for(load_tokenizer(default_model_path))
    assert marked(form, chat("Hi", "Hello", "Bye", "See you", "?")) == [
        "Hello<|im_end|>",
        "See you<|im_end|>",
    ]
    assert marked(form, chat("Hi", "Hello", "Bye", "See you"), first=2) == ["See you<|im_end|>"]
    assert marked(form, chat("Hi")) == []


@pytest.mark.parametrize("case", CASES)
def test_a_typed_stop_token_ends_no_answer(make, case):  # noqa: F811
    kind, template = cases(make)[case]
    if case == "think":
        template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    form = chat_format_for(make(kind, template))
    for name in sorted(form.tokenizer.special_tokens)[:3] + ["<|im_end|>", "<|eot_id|>", "</s>"]:
        (answer,) = marked(form, chat("Hi", f"a{name}b"))
        assert answer.startswith(f"a{name}b") and len(answer) > len(f"a{name}b")


REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "template, messages, error",
    [
        (REWRITES, chat("a", "<think>b</think>c", "d", "e"), "message 1: .* once the conversation"),
        (None, chat("a", "b", "", "\n\nc"), "message 3: .*white space"),
        (None, chat("a", "b")[1:], "message 0 is the assistant's, but nothing before it"),
        (None, chat("a", "b") + chat("a", "c")[1:], "message 2 is the assistant's, but nothing"),
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            chat("a", "b"),
            "message 1: .*no stop token",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            chat("a", "b"),
            "message 1: the chat template rewrites history",
        ),
        (
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}A:{% endif %}",
            chat("a", "b"),
            "message 1: the chat template rewrites history",
        ),
    ],
)
def test_what_cannot_be_told_apart_is_refused(make, template, messages, error):  # noqa: F811
    form = chat_format_for(make("smollm", template or make.smollm_template))
    with pytest.raises(DataError, match=error):
        form.encode_training(messages)


def test_the_last_answer_alone_works_where_history_is_rewritten(make):  # noqa: F811
    form = chat_format_for(make("smollm", REWRITES))
    messages = chat("a", "<think>b</think>c", "d", "<think>e</think>f")
    assert marked(form, messages, first=3) == ["<think>e</think>f<|im_end|>"]
