"""Tools: Python functions as templates describe them, their calls in an assistant's text, results.

This module imports nothing heavy: tools run in processes of their own.
"""

import hashlib
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol, Union

from utils.errors import AltiplanoError, ConfigError, listed, reason
from utils.files import STRICT_JSON

Message = Mapping[str, Any]

# Characters of a result, at most; a model's context is not much longer.
MAX_RESULT = 10_000
# Levels of a call's arguments, at most: whatever handles them later may recurse.
MAX_DEPTH = 50

# Schemas -----------------------------------------------------------------------------------------

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_TYPES |= {list: "array", dict: "object"}
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Examples?|Notes?):", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w+)[ \t]*(?:\([^()\n]*\))?:", re.MULTILINE)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, from its type hints and its docstring in Google's style.

    Args:
        function: a function or a bound method. Each argument has a type hint of int, float, str,
            bool, list, dict, None, Any, Literal and unions of them, and a line below "Args:".

    Returns:
        {"type": "function", "function": {"name", "description", "parameters"}}, as transformers'
        `get_json_schema` gives it, without the type of the result.

    Raises:
        ConfigError: something is missing; the function and the argument are named.
    """
    name = getattr(function, "__name__", f"{function!r:.80}")
    if not inspect.isroutine(function) or inspect.iscoroutinefunction(function):
        raise ConfigError(f"tool {name} is no plain function or method; write one that calls it")
    text, *sections = _SECTION.split(inspect.getdoc(function) or "")
    if not text.strip():
        raise ConfigError(f"tool {name} has no docstring; add one, which tells the model its use")
    told = dict(zip(sections[::2], sections[1::2])).get("Args", "")
    _, *told = _ARGUMENT.split(textwrap.dedent(told))
    told = {key: " ".join(words.split()) for key, words in zip(told[::2], told[1::2])}
    try:
        hints = typing.get_type_hints(function)
    except Exception as e:
        raise ConfigError(f"tool {name}: its type hints cannot be read: {reason(e)}") from e
    properties, required = {}, []
    for key, parameter in inspect.signature(function).parameters.items():
        where = f"tool {name}: argument {key!r}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"{where} is {parameter.kind.description}, expected a named one")
        if key not in hints:
            raise ConfigError(f"{where} has no type hint; write, for example, `{key}: int`")
        if not told.get(key):
            raise ConfigError(f'{where} has no description; add "{key}: …" below "Args:"')
        properties[key] = _type_schema(hints[key], where) | {"description": told[key]}
        required += [key] * (parameter.default is parameter.empty)
    parameters = {"type": "object", "properties": properties}
    parameters |= {"required": required} if required else {}
    described = {"name": name, "description": text.strip(), "parameters": parameters}
    return {"type": "function", "function": described}


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin is Literal and all(type(value) in _TYPES for value in args):
        return _one_of([_TYPES[type(value)] for value in args]) | {"enum": list(args)}
    if origin in (Union, types.UnionType):
        given = [_type_schema(arg, where) for arg in args if arg is not type(None)]
        plain = all(schema.keys() == {"type"} for schema in given)
        found = _one_of(sorted(s["type"] for s in given)) if plain else {"anyOf": given}
        found = given[0] if len(given) == 1 else found
        return found | ({"nullable": True} if type(None) in args else {})
    found = {"type": _TYPES.get(origin or hint)}
    if found["type"] is None:
        raise ConfigError(
            f"{where} has the type {getattr(hint, '__name__', hint)!s:.80}, expected int, float, "
            "str, bool, list, dict, Literal or a union of them: what JSON has"
        )
    inner = {list: "items", dict: "additionalProperties"}.get(origin)
    return found | ({inner: _type_schema(args[-1], where)} if inner else {})


def _one_of(kinds: list[str]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(kinds))
    return {"type": kinds if len(kinds) > 1 else kinds[0]}


# Calls -------------------------------------------------------------------------------------------

_CLOSE = "</tool_call>"
_TAGS = re.compile(r"<think>|</think>|<tool_call>|<\|python_tag\|>")
_BARE = re.compile(
    r'\s*(?=\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"]*)"\s*,\s*'
    r'"(?:parameters|arguments)"\s*:\s*(\{?))'
)
_SPACE = re.compile(r"\s*")
_FORMS = {
    "": '{"name": "func_name1", "parameters": {"argument1": "value1"}}',
    _CLOSE: '<tool_call>{"name": "func_name1", "arguments": {"argument1": "value1"}}</tool_call>',
}


def parse_calls(
    text: str, names: Collection[str] = ()
) -> tuple[str, list[dict[str, Any]], str | None]:
    """The calls in an assistant's turn, in the formats of Llama 3.1, Qwen, Hermes and SmolLM2.

    `<|python_tag|>{"name": …, "parameters": {…}}` or the object alone, several joined by ";"; or
    `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, several blocks, or a list in one. The
    JSON is strict, but arguments may be a string that holds theirs. Thoughts call nothing; put
    `<think>` before a turn whose prompt ended with it.

    Args:
        text: the turn as the tokenizer decodes it, its control tokens by name, without the stop.
        names: of the tools. Without tags, an object that begins as a call does is one if it has
            one of these names, or arguments that are an object; other JSON is an answer.

    Returns:
        (content, calls, error). Without calls the content is the text; else it is the text around
        them, and each is {"id", "type": "function", "function": {"name", "arguments": an object}},
        with an id of nine characters that depends on the text alone. If any call is wrong there
        are none, and the error tells the model in one line what is wrong.
    """
    spans: list[tuple[int, int]] = []
    found: list[dict[str, Any]] = []
    error, start, at = None, 0, 0  # start: where thoughts end, and a call needs no tag
    while True:
        match = _BARE.match(text, at) if at == start else None
        if not match or not (match[1] in names or match[2]):
            match = _TAGS.search(text, at)
        if not match:
            break
        at = match.end()
        if match[0] == "<think>":
            end = text.find("</think>", at)
            at = start = len(text) if end < 0 else end + len("</think>")
            continue
        if match[0] == "</think>":  # of thoughts that the prompt began
            spans, found, error, start = [], [], None, at
            continue
        close = _CLOSE if match[0] == "<tool_call>" else ""
        try:
            calls, at = _read_calls(text, at, close)
            found += calls
            spans.append((match.start(), at))
        except (ValueError, RecursionError) as e:
            problem = f"Error: no tool was called: {reason(e)}; expected {_FORMS[close]}"
            error = error or problem
        if not close:
            break
    if error or not spans:
        return text, [], error
    content, at = "", 0
    for begin, end in [*spans, (len(text), len(text))]:
        content, at = content + text[at:begin], end
    ids = [hashlib.sha256(f"{n} {text}".encode()).hexdigest()[:9] for n in range(len(found))]
    calls = [{"id": i, "type": "function", "function": f} for i, f in zip(ids, found)]
    return content.strip(), calls, None


def _read_calls(text: str, at: int, close: str) -> tuple[list[dict[str, Any]], int]:
    """(calls, where they end) from a place to `close`, or to the text's end; raises ValueError."""
    values: list[Any] = []
    while not values or text[at : at + 1] == ";":
        value, at = STRICT_JSON.raw_decode(text, _SPACE.match(text, at + bool(values)).end())
        values.append(value)
        at = _SPACE.match(text, at).end()
    if not text.startswith(close, at) or not close and at < len(text):
        raise ValueError(f"expected {close or 'nothing'} after the JSON, got {text[at:]!r:.40}")
    values = values[0] if isinstance(values[0], list) else values
    return [_read_call(value) for value in values], at + len(close)


def _read_call(value: Any) -> dict[str, Any]:
    call = value if isinstance(value, dict) else {}
    name, both = call.get("name"), call.keys() >= {"arguments", "parameters"}
    arguments = None if both else call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        arguments = STRICT_JSON.decode(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError(f"got {json.dumps(value)!s:.80}")
    if _is_deep(arguments):
        raise ValueError("it is nested too deeply")
    # Neither infinity, which 1e999 is, nor a lone surrogate.
    read = {"name": name, "arguments": arguments}
    json.dumps(read, ensure_ascii=False, allow_nan=False).encode()
    return read


def _is_deep(value: Any, left: int = MAX_DEPTH) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return not left or any(_is_deep(item, left - 1) for item in items)


# Results -----------------------------------------------------------------------------------------


def run_call(call: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> Message:
    """Calls a function, in this process; whatever goes wrong is told as the result.

    Args:
        call: as `parse_calls` gives it.
        functions: by name.

    Returns:
        {"role": "tool", "name", "tool_call_id", "content"}: a text as the function gave it, any
        other result as JSON, or "Error: …" in one line; at most MAX_RESULT characters and a note.
    """
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    try:
        if name not in functions:
            raise NameError(f"there is no tool {name!r:.80}; tools: {listed(list(functions))}")
        inspect.signature(functions[name]).bind(**arguments)
        result = functions[name](**arguments)
        content = result
        if not isinstance(result, str):
            content = json.dumps(result, ensure_ascii=False, default=str)
    except (Exception, SystemExit, KeyboardInterrupt) as e:
        content = f"Error: {type(e).__name__}: {reason(e)}"
    if len(content) > MAX_RESULT:
        content = f"{content[:MAX_RESULT]}… (cut, {len(content):,} characters in all)"
    content = content.encode(errors="replace").decode()  # lone surrogates are no text
    return {"role": "tool", "name": name, "tool_call_id": call["id"], "content": content}


# Templates without a place for tools -------------------------------------------------------------


class Format(Protocol):
    """A chat format, as far as it tells whether its template takes tools."""

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Any
    ) -> list[int]:
        """Token ids of a conversation; an AltiplanoError if the template has no place for it."""


def fitting(
    form: Format, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[Message], list[Mapping[str, Any]] | None]:
    """(messages, tools) for a template: as they are, or without tools; see `with_tools`."""
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {}}}
    probe = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "tool_call_id": call["id"], "content": "b"},
    ]
    try:
        form.encode_chat(probe, True, tools)
    except AltiplanoError:
        return with_tools(messages, tools), None
    return list(messages), list(tools) or None


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """A conversation with tools, their calls and results in words that any template takes.

    The words are short for those with which SmolLM2 was published: definitions in the system's
    message, calls in `<tool_call>`, results from the user in `<tool_response>`.

    Args:
        messages: as `read_messages` gives them.
        tools: their schemas; none: the conversation stays as it is.
    """
    if not tools:
        return list(messages)
    prompt = (
        "You can call functions:\n"
        f"<tools>{json.dumps(list(tools), ensure_ascii=False)}</tools>\n"
        "To call some, answer in this format and with no other text:\n"
        '<tool_call>[{"name": "func_name1", "arguments": {"argument1": "value1"}}]</tool_call>'
    )
    system, *rest = messages if messages[0]["role"] == "system" else ({"content": ""}, *messages)
    out: list[Message] = [{"role": "system", "content": f"{system['content']}\n\n{prompt}".strip()}]
    told = False  # whether the last message is a tool's
    for message in rest:
        content, calls = message.get("content") or "", message.get("tool_calls")
        if message["role"] in ("tool", "ipython"):
            content = f"<tool_response>\n{content}\n</tool_response>"
            content = f"{out.pop()['content']}\n{content}" if told else content
            out.append({"role": "user", "content": content})
        elif calls:
            called = json.dumps([call["function"] for call in calls], ensure_ascii=False)
            content = f"{content}\n<tool_call>{called}</tool_call>".strip()
            out.append({"role": "assistant", "content": content})
        else:
            out.append(message)
        told = message["role"] in ("tool", "ipython")
    return out
