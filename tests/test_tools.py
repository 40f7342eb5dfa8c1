"""Tools against transformers' schemas and real chat templates: schemas, calls out of text, results."""

import json
import subprocess
import sys
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils, get_json_schema

from models.llama.chat_format import ChatFormat, chat_format_for
from models.llama.chat.messages import read_messages, read_tools
from models.llama.chat.tools import MAX_DEPTH, MAX_RESULT
from models.llama.chat.tools import fitting, function_schema, parse_calls, run_call, with_tools
from models.llama.tokenizer import load_tokenizer
from tests.test_messages import CHATML, HERMES, LLAMA3_TOKENS, REAL, folder, real
from utils.errors import ConfigError, DataError

# As its model was published, in Ollama's words.
SMOLLM2 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}"
    '<tool_call>[\n{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}{{ ',' if not loop.last }}\n{% endfor %}]</tool_call>"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Schemas -----------------------------------------------------------------------------------------


def everything(
    a: int,
    b: float,
    c: str,
    d: bool,
    e: list[int],
    f: dict[str, float],
    g: Optional[list[list[str]]],
    h: int | str,
    i: Union[list[int], None, Literal["x", "y"]],
    j: Literal["m", 2, True],
    k: Any,
    m: list,
    n: dict,
    o: Literal["only"] = "only",
    p: "int | None" = None,
    *,
    q: str = "é",
) -> dict[str, int]:
    """Takes one of each.

    In two paragraphs: with a colon.

    Args:
        a: the first: with a colon
        b (float): the second (of many)
        c: over
            two lines
        d: fourth
        e (list[int], optional): fifth
        f: sixth
        g: seventh

        h: after a blank line
        i: a
        j: b
        k: c
        m: d
        n: e
        o: f
        p: g
        q: h

    Returns:
        a: nothing
    """


def bare():
    """Tells the time."""


class Shop:
    """A tool may be a method."""

    def buy(self, item: str, count: int = 1) -> str:
        """Buys.

        Args:
            item: what
            count: how many
        """
        return f"{count} {item}"


@pytest.mark.parametrize("function", [everything, bare, Shop().buy])
def test_schemas_are_those_of_transformers(function, monkeypatch):
    # Types of their own would import torch.
    for name in ("is_torch_available", "is_vision_available"):
        monkeypatch.setattr(chat_template_utils, name, bool)
    expected = get_json_schema(function)
    expected["function"].pop("return", None)
    schema = function_schema(function)
    assert schema == expected and json.loads(json.dumps(schema)) == schema
    assert read_tools([schema]) == [schema]


def documented(**hints):
    def tool(x):
        """Does it.

        Args:
            x: what
        """

    tool.__annotations__ = hints
    return tool


def undocumented(x: int):
    pass


def undescribed(x: int):
    """Does it."""


def half_described(x: int):
    """Does it.

    Args:
        x:
    """


def starred(*x: int):
    """Does it.

    Args:
        x: what
    """


async def later():
    """Does it."""


@pytest.mark.covers("F1")
@pytest.mark.parametrize(
    "function, error",
    [
        (undocumented, "tool undocumented has no docstring"),
        (lambda x: x, "tool <lambda> has no docstring"),
        (documented(), "tool tool: argument 'x' has no type hint; write, for example, `x: int`"),
        (undescribed, "tool undescribed: argument 'x' has no description; add \"x: …\" below"),
        (half_described, "argument 'x' has no description"),
        (documented(x=bytes), "tool tool: argument 'x' has the type bytes, expected int, float"),
        (documented(x=list[Shop]), "argument 'x' has the type Shop, expected"),
        (documented(x=tuple[int, int]), "argument 'x' has the type tuple"),
        (documented(x=Literal[b"a"]), "argument 'x' has the type Literal"),
        (documented(x="Missing"), "tool tool: its type hints cannot be read: name 'Missing'"),
        (starred, "tool starred: argument 'x' is variadic positional, expected a named one"),
        (later, "tool later is no plain function or method"),
        (3, "tool 3 is no plain function or method"),
    ],
)
def test_what_a_schema_needs(function, error):
    with pytest.raises(ConfigError) as e:
        function_schema(function)
    assert error in str(e.value) and "\n" not in str(e.value)


# Calls -------------------------------------------------------------------------------------------


def call(name="add", **arguments) -> dict:
    return {"name": name, "arguments": arguments}


def functions(calls: list[dict]) -> list[dict]:
    """The calls without ids, which are of nine characters and differ."""
    ids = [c["id"] for c in calls]
    assert all(len(i) == 9 and i.isalnum() for i in ids) and len(set(ids)) == len(ids)
    assert all(c.keys() == {"id", "type", "function"} and c["type"] == "function" for c in calls)
    return [c["function"] for c in calls]


HOSTILE = ["</tool_call>", "<tool_call>", "<think>", "</think>", '"};{"', "<|python_tag|>", "; "]
texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(HOSTILE)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
scalars = scalars.filter(lambda x: x not in (float("inf"), float("-inf")))
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x), max_leaves=8
)
named = st.builds(
    lambda name, arguments: {"name": name, "arguments": arguments},
    st.from_regex(r"[a-z_][a-z0-9_.-]{0,9}", fullmatch=True),
    st.dictionaries(texts, values, max_size=3),
)
TEMPLATES = {
    "llama3_1": (1, ("", "<think>x</think>")),
    "llama3_2": (1, ("", "")),
    "qwen2_5": (3, ("", "I look. ")),
    "qwen3": (3, ("", "I look.", "<think>\nIs it <tool_call>{}</tool_call>?\n</think>\n\nYes")),
    "hermes": (3, ("",)),
    "smollm2": (3, ("", "I look. ")),
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, ChatFormat]:
    def made(name):
        source = {"hermes": HERMES, "smollm2": SMOLLM2, "chatml": CHATML}.get(name) or real(name)
        special = REAL.get(name, ("<|im_start|>", "<|im_end|>"))
        path = folder(tmp_path_factory.mktemp(name) / "m", source, special)
        return chat_format_for(load_tokenizer(path))

    return {name: made(name) for name in [*TEMPLATES, "chatml"]}


def turn(form: ChatFormat, message: dict) -> str:
    """The text that the template writes as an assistant's turn, without the stop token."""
    question = {"role": "user", "content": "q"}
    given = form._variables | {"tools": None}
    texts = [
        form.template.render(0, messages=m, add_generation_prompt=p, **given)
        for m, p in (([question], True), ([question, message], False))
    ]
    assert texts[1].startswith(texts[0])
    stops = ("<|im_end|>\n", "<|im_end|>", "<|eot_id|>")
    return next(texts[1][len(texts[0]) :].removesuffix(s) for s in stops if texts[1].endswith(s))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_a_real_template_writes_is_read_back(forms, name, data):
    most, contents = TEMPLATES[name]
    made = data.draw(st.lists(named, min_size=1, max_size=most))
    content = data.draw(st.sampled_from(contents)) if name != "hermes" else ""
    calls = [{"id": "123456789", "type": "function", "function": f} for f in made]
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    text = turn(forms[name], message)
    said, found, error = parse_calls(text, [f["name"] for f in made])
    assert error is None and functions(found) == made
    assert json.loads(json.dumps(found)) == found and parse_calls(text)[1] == found
    said = said.removeprefix("<think>\n\n</think>").strip() if name == "qwen3" else said
    assert said == ("" if name.startswith("llama") else content.strip())


ADD = '{"name": "add", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    "text, content, expected",
    [
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", 1),
        ('So: <|python_tag|>{"name": "add", "parameters": {"a": 1}}\n', "So:", 1),
        (f"{ADD}; {ADD};{ADD}", "", 3),
        (f"<|python_tag|>{ADD};{ADD}", "", 2),
        ('\n{"type": "function", "name": "add", "parameters": {"a": 1}}\n', "", 1),
        (f"<think>x</think>\n\n{ADD}", "<think>x</think>", 1),
        (
            f"<tool_call>{ADD}</tool_call> and <tool_call>\n[{ADD}, {ADD}]\n</tool_call>.",
            "and .",
            3,
        ),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", 1),
        ("<tool_call>[]</tool_call>none", "none", 0),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', "", 1),
        ('{"name": "Bob", "arguments": "{\\"a\\": 1}"}', None, 0),
        # Thoughts call nothing, whoever began them; nor do they hide a call that follows.
        (f"<think><tool_call>{ADD}</tool_call></think>b", None, 0),
        (f"<think><tool_call>{ADD}</tool_call>", None, 0),
        (f"<tool_call>{ADD}</tool_call></think>b", None, 0),
        (f"x <tool_call>{{</think>b<tool_call>{ADD}</tool_call>", "x <tool_call>{</think>b", 1),
        # Answers.
        ("", None, 0),
        ("2 + 3 = 5", None, 0),
        ('{"name": "Bob", "age": 3}', None, 0),
        ('{"name": "Bob", "arguments": ["for", "against"], "verdict": 1}', None, 0),
        ("{x: 1}", None, 0),
        ('{"name": "add", "sum": 3}', None, 0),
        ('{"name": "add", "par', None, 0),
        ("[1, 2]", None, 0),
        (f"A call is written as {ADD}.", None, 0),
        ('{"a": ' * 100_000, None, 0),
    ],
)
def test_what_is_a_call_and_what_is_an_answer(text, content, expected):
    said, calls, error = parse_calls(text, ["add", "now"])
    assert error is None and said == (text if content is None else content)
    assert functions(calls) == [call(a=1)] * expected


def nested(levels: int) -> str:
    return f'{{"name": "add", "arguments": {{"a": {"[" * levels}{"]" * levels}}}}}'


@pytest.mark.covers("F2")
@pytest.mark.parametrize(
    "text, problem",
    [
        (f"<tool_call>{ADD}", "expected </tool_call> after the JSON, got ''"),
        ('<tool_call>\n{"name": "add", "argu', "Unterminated string"),
        ("<tool_call>", "Expecting value"),
        (f"<tool_call>{ADD}</tool_call><tool_call>{ADD[:-1]}", "Expecting ','"),
        (
            f"<tool_call>{ADD} x</tool_call>",
            "expected </tool_call> after the JSON, got 'x</tool_call>'",
        ),
        (f"<tool_call>{ADD}\n{ADD}</tool_call>", "expected </tool_call> after the"),
        ("<tool_call>add(1)</tool_call>", "Expecting value"),
        (f"<tool_call>{ADD[:-1]}</tool_call>", "Expecting ',' delimiter"),
        (
            '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
            'got {"name": "add", "arguments": [1]}',
        ),
        ('<tool_call>{"name": "add", "arguments": "x"}</tool_call>', "Expecting value"),
        ('<tool_call>{"name": "add", "arguments": "{} {}"}</tool_call>', "Extra data"),
        (
            '<tool_call>{"name": "add", "arguments": null}</tool_call>',
            'got {"name": "add", "arguments": null}',
        ),
        ('<tool_call>{"name": "add"}</tool_call>', 'got {"name": "add"};'),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', 'got {"name": 3, "arguments": {}}'),
        (
            '<tool_call>{"name": "add", "arguments": {}, "parameters": {}}</tool_call>',
            '"parameters": {}}; expected',
        ),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', 'got {"name": "", "arguments"'),
        ("<tool_call>[3]</tool_call>", "got 3; expected"),
        ("<tool_call>[3]</tool_call><tool_call>x</tool_call>", "got 3; expected"),
        (f'<tool_call>{{"name": "add", "arguments": {{"a": NaN}}}}</tool_call>', "NaN is not JSON"),
        (f'<tool_call>{{"name": "add", "arguments": {{"a": 1e999}}}}</tool_call>', "not JSON comp"),
        ('<tool_call>{"name": "a", "name": "b"}</tool_call>', "duplicate key 'name'"),
        ('<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>', "surrogates"),
        (f'<tool_call>{{"name": "add", "arguments": {{"a": {"1" * 9999}}}}}</tool_call>', "digits"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "recursion"),
        (f"<tool_call>{nested(MAX_DEPTH)}</tool_call>", "nested too deeply"),
        ("<|python_tag|>print(1)", "Expecting value"),
        (f"<|python_tag|>{ADD} Done.", "expected nothing after the JSON, got 'Done.'"),
        (f"{ADD} Done.", "expected nothing after the JSON, got 'Done.'"),
        (f"{ADD};", "Expecting value"),
        (ADD[:-2], "Expecting ',' delimiter"),
    ],
)
def test_a_wrong_call_is_told_to_the_model(text, problem):
    said, calls, error = parse_calls(text, ["add"])
    assert (said, calls) == (text, []) and problem in error and "\n" not in error
    assert error.startswith("Error: no tool was called: ") and len(error) < 700
    assert len(parse_calls(nested(MAX_DEPTH - 1))[1]) == 1
    # Whoever writes what is expected is understood.
    form = error.rpartition("; expected ")[2]
    assert parse_calls(form)[1] and ("<tool_call>" in form) == ("<tool_call>" in text)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*HOSTILE, ADD, ADD[:8], "[", "]", "{", "}", "a"]), max_size=8))
def test_any_text_is_an_answer_calls_or_an_error(parts):
    text = "".join(parts)
    said, calls, error = parse_calls(text, ["add"])
    assert not (calls and error)
    if calls:
        functions(calls)
        read_messages([{"role": "assistant", "content": said, "tool_calls": calls}])
    else:
        assert said == text or said in text or "<tool_call>[]" in text


# Results -----------------------------------------------------------------------------------------


def run(function, _name="tool", **arguments) -> str:
    wanted = {"id": "123456789", "type": "function", "function": call(_name, **arguments)}
    message = run_call(wanted, {"tool": function})
    assert message.keys() == {"role", "name", "tool_call_id", "content"}
    assert (message["role"], message["name"], message["tool_call_id"]) == (
        "tool",
        _name,
        "123456789",
    )
    return read_messages([{"role": "user", "content": "q"}, message])[1]["content"]


def raises(error):
    def tool():
        raise error

    return tool


def test_results():
    assert run(Shop().buy, item="é\n", count=2) == "2 é\n"
    assert run(lambda: {"a": [1, "é", None]}) == '{"a": [1, "é", null]}'
    assert run(lambda: None) == "null" and run(lambda: 0.1) == "0.1"
    assert run(lambda: {1, 1}) == '"{1}"'
    assert run(lambda: "x" * MAX_RESULT) == "x" * MAX_RESULT
    cut = run(lambda: "x" * 2 * MAX_RESULT)
    assert cut == "x" * MAX_RESULT + "… (cut, 20,000 characters in all)"
    assert run(lambda: "a\ud800b") == "a?b"


@pytest.mark.covers("F3")
def test_what_goes_wrong_in_a_tool_is_its_result():
    assert run(bare, "nope") == "Error: NameError: there is no tool 'nope'; tools: 'tool'"
    buy = Shop().buy
    assert run(buy) == "Error: TypeError: missing a required argument: 'item'"
    assert run(buy, item="a", n=1) == "Error: TypeError: got an unexpected keyword argument 'n'"
    assert run(raises(ValueError("a\nb"))) == "Error: ValueError: a b"
    assert run(raises(KeyError())) == "Error: KeyError: KeyError"
    assert run(raises(SystemExit(3))) == "Error: SystemExit: 3"
    assert run(raises(KeyboardInterrupt())) == "Error: KeyboardInterrupt: KeyboardInterrupt"
    assert run(raises(ZeroDivisionError("x" * 9999))) == f"Error: ZeroDivisionError: {'x' * 500}"
    loop = []
    loop.append(loop)
    assert run(lambda: loop) == "Error: ValueError: Circular reference detected"
    assert run(lambda: {(1, 2): 3}).startswith("Error: TypeError: keys must be str")

    def recursive():
        return recursive()

    assert run(recursive).startswith("Error: RecursionError: maximum recursion depth exceeded")


# Templates ---------------------------------------------------------------------------------------

TOOLS = [function_schema(Shop().buy)]


def conversation(system: bool) -> list[dict]:
    calls = [
        {"id": f"12345678{n}", "type": "function", "function": call("buy", item="é")}
        for n in (1, 2)
    ]
    results = [run_call(c, {"buy": Shop().buy}) for c in calls]
    messages = [{"role": "system", "content": "Be brief."}] * system
    messages += [{"role": "user", "content": "Buy."}]
    messages += [{"role": "assistant", "content": "Well.", "tool_calls": calls}, *results]
    return [*messages, {"role": "assistant", "content": "Done."}, {"role": "user", "content": "?"}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_takes_tools_gets_them(forms, name):
    messages = conversation(True)
    fits = (messages, TOOLS) if name != "smollm2" else (with_tools(messages, TOOLS), None)
    assert fitting(forms[name], messages, TOOLS) == fits
    if name == "qwen2_5":
        assert "12345678" not in forms[name].render(messages, tools=TOOLS)


@pytest.mark.parametrize("name", ["default", "llama2", "llama3"])
def test_a_template_without_tools_writes_them_as_text(forms, tmp_path, default_model_path, name):
    special = LLAMA3_TOKENS if name == "llama3" else ("<s>", "</s>")
    path = default_model_path if name == "default" else folder(tmp_path / "m", CHATML, special)
    form = chat_format_for(load_tokenizer(path), None if name == "default" else name)
    for system in (True, False):
        messages = conversation(system)
        with pytest.raises(DataError, match="tools: the chat template has no place for it"):
            form.encode_chat(messages[: system + 1], tools=TOOLS)
        fitted, tools = fitting(form, messages, TOOLS)
        text = form.render(fitted, tools=tools)
        assert tools is None and text.count(json.dumps(TOOLS)) == 1
        assert text.count("Be brief.\n\n") == system
        results = "<tool_response>\n1 é\n</tool_response>"
        assert fitted[3]["content"] == f"{results}\n{results}"
        said, calls, _ = parse_calls(fitted[2]["content"], ["buy"])
        assert said == "Well." and functions(calls) == [call("buy", item="é")] * 2
        # A turn continues what the model has read.
        for n in (2, 4):
            assert text.startswith(form.render(fitted[:n]))
    # Neither tools nor words about them.
    assert fitting(form, messages, []) == (messages, None) == (with_tools(messages, []), None)


def test_importing_takes_milliseconds():
    code = "import sys, models.llama.chat.tools\n"
    code += "assert not {'jax', 'numpy', 'jinja2', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
