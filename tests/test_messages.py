"""What people bring as messages: null fields, parts, tools, dates and long conversations."""

import json
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import trl
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models.llama import chat_format
from models.llama.chat_format import chat_format_for
from models.llama.chat.messages import read_messages
from models.llama.tokenizer import load_tokenizer
from models.llama.tokenizers.save import write_tokenizer
from trainers.data import DataConfig, load_dataset
from trainers.records import read_records
from trainers.rewards.functions import load_reward
from trainers.rewards.tasks import PromptEncoder, load_prompts
from trainers.runs.checkpoint import Checkpointer
from trainers.runs.folder import RunConfig
from utils.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_HEADERS = "begin_of_text start_header_id end_header_id eot_id end_of_text python_tag".split()
LLAMA3_TOKENS = tuple(f"<|{name}|>" for name in _HEADERS)
# Templates as their models have them, from TRL's collection.
REAL = {
    "llama3_1": LLAMA3_TOKENS,
    "llama3_2": LLAMA3_TOKENS,
    "qwen2_5": CHATML_TOKENS,
    "qwen3": CHATML_TOKENS,
    "lfm2_v2": CHATML_TOKENS,
    "glm4moe": ("<|user|>", "<|assistant|>", "<|observation|>", "[gMASK]", "<sop>"),
    "gptoss": ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"),
}
# Hermes 2 Pro's calls, in short.
HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "</tools><|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n"
    "</tool_call>{% endfor %}{% elif m.role == 'tool' %}<tool_response>\n{{ m.content }}\n"
    "</tool_response>{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's <b> & 'é'",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "where", "enum": None}},
                "required": ["city"],
            },
        },
    }
]
CLEAN_TOOLS = json.loads(json.dumps(TOOLS).replace(', "enum": null', ""))


def calls(arguments, **fields) -> dict:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]} | fields


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def with_a_call(arguments=None, result='{"t": 3}') -> list[dict]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Oslo?"},
        calls(arguments or {"city": 'Oslo "é" <b>'}),
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": result},
        {"role": "assistant", "content": "3 degrees."},
        {"role": "user", "content": "Thanks"},
    ]


def with_a_chain(calls: int) -> list[dict]:
    """One turn with many calls, each with its result."""
    _, asked, call, result, answer, _ = with_a_call()
    chain = [m | {"content": f"{n}{m['content']}"} for n in range(calls) for m in (call, result)]
    return [asked, *chain, answer]


def folder(path: Path, template=CHATML, special=CHATML_TOKENS, **config) -> Path:
    """A byte tokenizer with control tokens, tags and a template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(x, normalized=False) for x in special])
    library.add_tokens([AddedToken(x, normalized=False) for x in ("<think>", "</think>")])
    path.mkdir(parents=True)
    (path / "tokenizer.json").write_text(library.to_str())
    roles = {"eos_token": special[1], "tokenizer_class": "PreTrainedTokenizerFast"} | config
    roles |= {"bos_token": special[0]} if special == LLAMA3_TOKENS else {}
    roles |= {"chat_template": template} if template else {}
    (path / "tokenizer_config.json").write_text(json.dumps(roles))
    return path


def both(path: Path, template: str, special=CHATML_TOKENS):
    """Our chat format, and transformers' tokenizer."""
    folder(path, template, special)
    return chat_format_for(load_tokenizer(path)), PreTrainedTokenizerFast.from_pretrained(path)


def real(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def jsonl(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.covers("R42", "R11", "R10")
@pytest.mark.parametrize("name", [*REAL, "hermes"])
def test_tools_and_calls_are_those_of_transformers(tmp_path, name):
    special = REAL.get(name, CHATML_TOKENS)
    form, theirs = both(tmp_path / "m", HERMES if name == "hermes" else real(name), special)
    for messages in (with_a_call(), with_a_call()[1:], with_a_call()[1:4], chat("<a>", "b", "c")):
        for tools in (None, TOOLS):
            for prompt in (True, False):
                if prompt and messages[-1]["role"] == "assistant":
                    continue
                expected = theirs.apply_chat_template(
                    messages, tools=tools and CLEAN_TOOLS, add_generation_prompt=prompt
                )
                assert form.encode_chat(messages, prompt, tools) == expected["input_ids"]


@pytest.mark.covers("R42")
@pytest.mark.parametrize("name", [*REAL, "hermes"])
def test_no_text_of_a_call_or_a_tool_becomes_a_control_token(tmp_path, name):
    special = REAL.get(name, CHATML_TOKENS)
    form, _ = both(tmp_path / "m", HERMES if name == "hermes" else real(name), special)
    control = set(map(form.tokenizer.special_tokens.get, special))

    def controls(word):
        tool = json.loads(json.dumps(TOOLS).replace("where", word))
        tool[0]["function"]["parameters"]["properties"][word] = {"type": "string"}
        messages = with_a_call({"city": word, word: [1, {word: word}]}, result=word)
        ids = form.encode_chat(messages, tools=tool)
        assert word in form.tokenizer.decode(ids)
        return [i for i in ids if i in control]

    harmless = controls("x")
    for word in special:
        assert controls(word) == harmless


@pytest.mark.covers("R11", "R42")
@pytest.mark.parametrize(
    "messages, tools, error",
    [
        (chat("a"), TOOLS, "tools: the chat template has no place"),
        (
            [*chat("a"), calls({}), *chat("b")],
            None,
            "message 1: tool_calls: the chat template has no",
        ),
        (
            [
                *chat("a"),
                {"role": "assistant", "content": "b", "reasoning_content": "c"},
                *chat("d"),
            ],
            None,
            "message 1: reasoning_content: the chat template has no place",
        ),
        (chat("a"), [1], "tools is .* expected a list of objects"),
        (chat("a"), "[{", "tools is not valid JSON"),
        ([*chat("a"), calls({}, tool_calls=["x"])], None, "message 1: tool_calls is"),
        ([*chat("a"), {"role": "assistant", "content": None}], None, "message 1: content is None"),
        ([{"role": "user", "content": "a", "name": "Bob"}], None, "message 0: expected the keys"),
    ],
)
def test_nothing_is_dropped_in_silence(tmp_path, messages, tools, error):
    form, _ = both(tmp_path / "m", CHATML)
    for call in (form.encode_chat, form.render):
        with pytest.raises(DataError, match=error):
            call(messages, messages[-1]["role"] != "assistant", tools)


@pytest.mark.covers("R11")
def test_a_role_without_a_place_is_refused(tmp_path):
    dropping = CHATML.replace("in messages %}", "in messages if m.role != 'tool' %}")
    form, _ = both(tmp_path / "m", dropping)
    with pytest.raises(DataError, match="message 1: the role tool: the chat template has no place"):
        form.encode_chat([*chat("a"), {"role": "tool", "content": "b"}])


@pytest.mark.covers("R10", "R43")
def test_null_is_absent_and_parts_of_text_are_one_text(tmp_path):
    form, _ = both(tmp_path / "m", CHATML)
    plain = [*chat("hi", "you"), *chat("c")]
    nulls = dict.fromkeys(("name", "tool_calls", "reasoning_content", "tool_call_id", "x"))
    assert form.encode_chat([m | nulls for m in plain]) == form.encode_chat(plain)
    assert form.encode_training([m | nulls for m in plain]) == form.encode_training(plain)
    parts = [{"type": "text", "text": "h", "image": None}, {"type": "text", "text": "i"}]
    assert form.encode_chat([{"role": "user", "content": parts}]) == form.encode_chat(chat("hi"))
    read = read_messages([{"role": "user", "content": parts}])
    assert read == chat("hi") == read_messages(read)
    for part, error in (
        ({"type": "image_url", "image_url": "x"}, "part 0 of its content has the type 'image_url'"),
        ({"type": "text", "text": None}, "part 0 of its content has the type 'text'"),
        ({"text": "a"}, "part 0 of its content has the type None"),
    ):
        with pytest.raises(DataError, match=f"message 0: {error}"):
            form.encode_chat([{"role": "user", "content": [part]}])


@pytest.mark.covers("R10", "R11", "R42", "R43")
def test_rows_of_data_hold_tools_calls_parts_and_nulls(tmp_path):
    base = folder(tmp_path / "m", HERMES)
    tokenizer = load_tokenizer(base)
    form, config = chat_format_for(tokenizer), DataConfig(seq_len=4096, batch_size=1)
    answered = [*with_a_call(), {"role": "assistant", "content": [{"type": "text", "text": "OK"}]}]
    rows = [
        {"messages": answered, "tools": TOOLS, "text": None},
        {"messages": answered, "tools": json.dumps(TOOLS)},
        {"prompt": answered[:-1], "completion": answered[-1:], "tools": TOOLS},
    ]
    ids, mask = form.encode_training(answered, tools=TOOLS)
    for row, first in zip(rows, (0, 0, len(answered) - 1)):
        data = load_dataset(jsonl(tmp_path / "d.jsonl", row), tokenizer, config)
        (batch,) = data.epoch_batches()
        assert batch["tokens"][0, : len(ids)].tolist() == ids
        _, mask = form.encode_training(answered, first, TOOLS)
        assert batch["target_mask"][0, : len(ids)].tolist() == mask
    for row in ({"text": "a", "tools": TOOLS}, {"prompt": "a", "completion": "b", "tools": TOOLS}):
        with pytest.raises(DataError, match="d.jsonl:1: tools need messages"):
            load_dataset(jsonl(tmp_path / "d.jsonl", row), tokenizer, config)
    path = jsonl(tmp_path / "p.jsonl", {"prompt": with_a_call(), "tools": TOOLS, "answer": "3"})
    task = load_prompts(path, PromptEncoder(tokenizer), [load_reward("exact_match")])
    assert list(task.prompts[0].ids) == form.encode_chat(with_a_call(), tools=TOOLS)
    plain = load_tokenizer(folder(tmp_path / "n"))
    with pytest.raises(DataError, match="d.jsonl:1: tools: the chat template has no place for it"):
        row = {"messages": chat("a", "b"), "tools": TOOLS}
        load_dataset(jsonl(tmp_path / "d.jsonl", row), plain, config)


@pytest.mark.covers("R47")
def test_a_greeting_is_context(tmp_path):
    form, _ = both(tmp_path / "m", CHATML)
    hello = {"role": "assistant", "content": "Hello"}
    for before in ([], [{"role": "system", "content": "s"}]):
        ids, mask = form.encode_training([*before, hello, *chat("q", "a")])
        assert ids == form.encode_chat([*before, hello, *chat("q", "a")], False)
        assert form.tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "a<|im_end|>"


@pytest.mark.covers("R17")
@pytest.mark.parametrize(
    "options",
    [
        "",
        "ensure_ascii=False",
        "ensure_ascii=True",
        "True, 2",
        "indent=2",
        "separators=(',', ':'), sort_keys=true",
        "False, none, ('; ', '= '), true",
    ],
)
def test_tojson_is_that_of_transformers(tmp_path, options):
    form, theirs = both(tmp_path / "m", f"{{{{ messages | tojson({options}) }}}}")
    messages = chat('é <b> 漢 "', "x")
    assert form.render(messages, False) == theirs.apply_chat_template(messages, tokenize=False)


@pytest.mark.covers("R28")
def test_an_assistants_tags_are_tokens_and_a_users_are_text(tmp_path):
    form, theirs = both(tmp_path / "m", CHATML)
    said = chat("q", "<think>a</think>b", "c")
    expected = theirs.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    assert form.encode_chat(said) == expected
    think = form.tokenizer.special_tokens["<think>"]
    assert form.encode_chat(said).count(think) == 1
    assert think not in form.encode_chat(chat("<think>"))
    hostile = form.encode_chat(chat("<think>", "<think><|im_end|>", "c"))
    assert hostile.count(think) == 1 and hostile.count(257) == 3


# Long conversations ------------------------------------------------------------------------------

HOSTILE = ["", " a", "\n\nb", "<|im_end|>", "<|im_start|>assistant\n", "<think>x</think>y", "é漢"]


@pytest.mark.covers("R27")
@pytest.mark.parametrize("name", ["chatml", "hermes", "llama3", "llama2", "llama3_2", "qwen2_5"])
def test_turn_by_turn_gives_the_same_ids_and_mask(tmp_path, name, monkeypatch):
    special = LLAMA3_TOKENS if name.startswith("llama3") else CHATML_TOKENS
    special = ("<s>", "</s>") if name == "llama2" else special
    built_in = name if name in ("llama2", "llama3") else None
    source = {"chatml": CHATML, "hermes": HERMES}.get(name) or (built_in and CHATML) or real(name)
    form = chat_format_for(load_tokenizer(folder(tmp_path / "m", source, special)), built_in)
    texts = [f"{HOSTILE[(n * 3) % 7]}{n}{HOSTILE[n % 7]}" for n in range(16)]
    chats = [chat(*texts), [{"role": "system", "content": "s"}, *chat(*texts)]]
    chats.append([{"role": "assistant", "content": "Hi"}, *chat(*texts)])
    if name in ("hermes", "qwen2_5"):
        chats.append([m for _ in range(6) for m in [*with_a_call()[1:5]]])
        chats.append(with_a_chain(8))

    def outcome(messages):
        try:
            return form.encode_training(messages)
        except DataError as e:
            return str(e)

    for messages in chats:
        found = outcome(messages)
        monkeypatch.setattr(chat_format, "_FEW_ANSWERS", 10**9)
        assert found == outcome(messages)
        monkeypatch.undo()


@pytest.mark.covers("R27")
def test_a_turns_own_tokens_are_not_trusted_where_history_is_rewritten(tmp_path):
    rewrites = CHATML.replace(
        "{{ m['content'] }}", "{{ m.content if loop.last else m.content[:1] }}"
    )
    form, _ = both(tmp_path / "m", rewrites)
    with pytest.raises(DataError, match="message 1: the chat template rewrites history"):
        form.encode_training(chat(*["ab"] * 20))
    counts = "{{ messages | length > 9 }}" + HERMES
    form, _ = both(tmp_path / "n", counts)
    for messages in (chat(*["ab"] * 20), with_a_chain(10)):
        with pytest.raises(DataError, match="message 1: the chat template rewrites history"):
            form.encode_training(messages)


@pytest.mark.covers("R27")
def test_work_is_linear_in_the_turns_and_in_the_calls_of_one(tmp_path, monkeypatch):
    form, _ = both(tmp_path / "m", HERMES)
    render, work = form.template.render, []

    def counted(size, **variables):
        work.append(size + len(variables["messages"]))
        return render(size, **variables)

    monkeypatch.setattr(form.template, "render", counted)

    def cost(messages):
        work.clear()
        form.encode_training(messages)
        return sum(work)

    turns = [chat(*["word " * 20] * 2 * answers) for answers in (32, 64)]
    for short, long in (turns, [with_a_chain(32), with_a_chain(64)]):
        assert cost(long) < 2.2 * cost(short)


# The moment and the variables -------------------------------------------------------------------

DATED = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + CHATML


@pytest.mark.covers("R4")
def test_the_moment_decides_and_is_named(tmp_path):
    tokenizer = load_tokenizer(folder(tmp_path / "m", DATED))
    path = jsonl(tmp_path / "d.jsonl", *[{"messages": chat("q", "a")}] * 2)
    task = jsonl(tmp_path / "p.jsonl", {"prompt": "q"})
    config, rewards = DataConfig(seq_len=256, batch_size=1), [load_reward("exact_match")]
    days = [datetime(2030, 1, 1, 23, 59, 59, 7), datetime(2030, 1, 2)]
    data = [load_dataset(path, tokenizer, config, moment=day) for day in (*days, days[0])]
    assert data[0].digest == data[2].digest != data[1].digest
    asked = [load_prompts(task, PromptEncoder(tokenizer, moment=day), rewards) for day in days]
    assert asked[0].digest != asked[1].digest and asked[0].chat.template.moment == days[0]
    assert "01 Jan 2030 23:59:59.000007" in tokenizer.decode(asked[0].prompts[0].ids)
    undated = load_tokenizer(folder(tmp_path / "n"))
    assert load_dataset(path, undated, config, moment=days[0]).chat.template.moment is None


@pytest.mark.covers("R41")
def test_variables_are_those_of_transformers(tmp_path):
    form, theirs = both(tmp_path / "m", real("llama3_2"), LLAMA3_TOKENS)
    given = {"date_string": "26 Jul 2024", "tools_in_user_message": False}
    expected = theirs.apply_chat_template(chat("a"), tools=CLEAN_TOOLS, **given, tokenize=False)
    dated = chat_format_for(form.tokenizer, None, json.dumps(given))
    assert dated.render(chat("a"), False, CLEAN_TOOLS) == expected
    assert dated.template.settings[-1] == given
    for args, error in (
        ('{"date_sting": "x"}', "no variable 'date_sting'; its variables: .*date_string"),
        ('{"messages": []}', "no variable 'messages'"),
        ("[1]", "template_args"),
    ):
        with pytest.raises(ConfigError, match=error):
            chat_format_for(form.tokenizer, None, args)
    path = jsonl(tmp_path / "d.jsonl", {"messages": chat("q", "a")})
    args = ['{"date_string":"1"}', '{"date_string": "1"}', '{"date_string": "2"}']
    day = datetime(2030, 1, 1)
    config = [DataConfig(seq_len=1024, template_args=a) for a in args]
    digests = [load_dataset(path, form.tokenizer, c, moment=day).digest for c in config]
    assert digests[0] == digests[1] != digests[2]


# The export -------------------------------------------------------------------------------------


@pytest.mark.covers("R5")
@pytest.mark.parametrize("name", ["llama3", "llama2", "other", "default"])
def test_the_export_has_the_template_that_was_trained_with(tmp_path, name):
    special = ("<s>", "</s>") if name == "llama2" else LLAMA3_TOKENS
    named = [{"name": "default", "template": CHATML}, {"name": "other", "template": HERMES}]
    base = folder(tmp_path / "base", named if name in ("other", "default") else None, special)
    if name == "other":
        (base / "chat_template.jinja").unlink(missing_ok=True)
    form = chat_format_for(load_tokenizer(base), None if name == "default" else name)
    (tmp_path / "out").mkdir()
    write_tokenizer(base, tmp_path / "out", form.template.as_rendered)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    again = chat_format_for(load_tokenizer(tmp_path / "out"))
    for messages in (
        chat("a"),
        chat(" <b>", "c\n", "d"),
        [{"role": "system", "content": "s"}, *chat("a")],
    ):
        ids = form.encode_chat(messages)
        assert again.encode_chat(messages) == ids
        told = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert told["input_ids"] == ids


@pytest.mark.covers("R5", "R41")
def test_the_export_keeps_the_variables_as_defaults(tmp_path):
    base = folder(tmp_path / "base", real("llama3_2"), LLAMA3_TOKENS)
    given = {"date_string": 'it\'s \\ "é" {{ x }}', "tools_in_user_message": False}
    form = chat_format_for(load_tokenizer(base), None, given)
    (tmp_path / "out").mkdir()
    write_tokenizer(base, tmp_path / "out", form.template.as_rendered)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    read = chat_format_for(load_tokenizer(tmp_path / "out"))
    expected = form.render(chat("a"))
    assert (
        theirs.apply_chat_template(chat("a"), tokenize=False, add_generation_prompt=True)
        == expected
    )
    assert read.render(chat("a")) == expected and given["date_string"] in expected
    other = theirs.apply_chat_template(chat("a"), tokenize=False, date_string="now")
    assert "Today Date: now" in other


@pytest.mark.covers("R4")
@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_run_that_resumes_has_the_moment_of_its_start(tmp_path, resume):
    run = RunConfig(out_dir=str(tmp_path), resume=False)
    before = datetime.now()
    assert before <= run.moment() <= datetime.now()
    began = "2030-01-01T23:59:59.000007"
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"x": np.zeros(1)}, {"data": {"moment": began}})
    again = RunConfig(out_dir=str(tmp_path), resume=resume)
    assert again.moment() == datetime.fromisoformat(began)
    assert RunConfig(out_dir=str(tmp_path), resume_step=1).moment() == again.moment()


SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
ALPACA = {"instruction": "q", "input": "x", "output": "a"}


@pytest.mark.covers("R11")
@pytest.mark.parametrize("row, asked", [(SHAREGPT, "q"), (ALPACA, "q\n\nx")])
def test_rows_of_other_programs_are_refused_with_their_conversion(tmp_path, row, asked):
    with pytest.raises(
        DataError, match="d.jsonl:1: the row has .*; convert the file with"
    ) as error:
        read_records(jsonl(tmp_path / "d.jsonl", row))
    program = str(error.value).split("jq -c '")[1].removesuffix("'`")
    if shutil.which("jq"):  # the command is that of the message
        command = ["jq", "-c", program, str(tmp_path / "d.jsonl")]
        (tmp_path / "e.jsonl").write_bytes(subprocess.run(command, capture_output=True).stdout)
        (record,) = read_records(tmp_path / "e.jsonl").rows
        assert record.fields["messages"] == chat(asked, "a")
