"""Messages and tools as people bring them, checked and brought into one shape."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from models.llama.tokenizer import check_text
from utils.errors import DataError
from utils.files import parse_json

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant", "tool", "ipython")
TOOL_ROLES = ("tool", "ipython")
# Names for an assistant's thoughts, the most usual one first.
REASONING = ("reasoning_content", "thinking", "reasoning")

# What a message may have besides role and content.
_OPTIONAL = {"assistant": ("tool_calls", *REASONING)}
_OPTIONAL |= dict.fromkeys(TOOL_ROLES, ("name", "tool_call_id"))
# Values by which templates decide, unless they are in a call's arguments.
_DECIDING = ("role", "type", "name")


def read_messages(messages: Any, add_generation_prompt: bool = False) -> list[Message]:
    """Checks a conversation. Fields that are null are left out, parts of text are joined.

    Args:
        messages: objects with `role` (one of ROLES) and `content`, a text or a list of
            `{"type": "text", "text": …}`; a system message comes first. An assistant's may have
            `tool_calls`, a list of objects, and then no content; and `reasoning_content`.
        add_generation_prompt: whether the last message is to be answered.

    Raises:
        DataError: with the index of the message that is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"messages: expected a non-empty list, got {messages!r:.80}")
    out = [_read_message(message, f"message {i}") for i, message in enumerate(messages)]
    for index, message in enumerate(out[1:], 1):
        if message["role"] == "system":
            raise DataError(f"message {index}: a system message can only be message 0")
    if add_generation_prompt and out[-1]["role"] == "assistant":
        raise DataError(
            f"message {len(messages) - 1} is the assistant's and the last: there is nothing to "
            "answer; remove it, or pass add_generation_prompt=False"
        )
    return out


def _read_message(message: Any, where: str) -> Message:
    given = message if isinstance(message, Mapping) else {}
    found = {k: without_nulls(v) for k, v in given.items() if v is not None or k == "content"}
    role = found.get("role")
    if role == "assistant" and found.get("tool_calls") == []:
        del found["tool_calls"]
    called = "tool_calls" in found
    if "role" in given and role not in ROLES:
        raise DataError(f"{where}: role {given['role']!r:.80}, expected one of {ROLES}")
    optional = _OPTIONAL.get(role, ())
    known = {"role", "content", *optional}
    if role is None or not found.keys() <= known or not ("content" in found or called):
        got = sorted(map(str, found)) if isinstance(message, Mapping) else message
        more = f" (or {', '.join(optional)})" * bool(optional)
        raise DataError(f"{where}: expected the keys role and content{more}, got {got!r:.80}")
    if "content" in found:
        found["content"] = _joined(found["content"], where)
    for key, value in found.items():
        if key == "tool_calls":
            if not _are_objects(value):
                raise DataError(f"{where}: tool_calls is {value!r:.80}, expected a list of objects")
        elif not isinstance(value, str) and not (called and key == "content" and value is None):
            raise DataError(f"{where}: {key} is {value!r:.80}, expected a string")
    for text in strings(found):
        check_text(text, where)
    return found


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _joined(content: Any, where: str) -> Any:
    """A list of parts of text as one text; any other content as it is."""
    if not _are_objects(content):
        return content
    for n, part in enumerate(content):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: part {n} of its content has the type {part.get('type')!r:.80}; "
                'only text can be read: {"type": "text", "text": "…"}'
            )
    return "".join(part["text"] for part in content)


def read_tools(tools: Any) -> list[Mapping[str, Any]] | None:
    """Checks definitions of functions: a list of objects, or its JSON; None if there are none."""
    if isinstance(tools, str):
        tools = parse_json(f'{{"tools": {tools}}}'.encode(), "tools", DataError)["tools"]
    tools = without_nulls([] if tools is None else tools)
    if not _are_objects(tools):
        raise DataError(f"tools is {tools!r:.80}, expected a list of objects")
    for text in strings(tools):
        check_text(text, "tools")
    return tools or None


def read_prompt(row: Mapping[str, Any]) -> tuple[str | list[Message], Tools | None]:
    """(prompt, tools) of a row: {"prompt": a text or messages} or {"messages": …}, perhaps "tools".

    Raises DataError, without the row's place.
    """
    given = [row[key] for key in ("prompt", "messages") if row.get(key) is not None]
    if len(given) != 1 or not isinstance(given[0], (str, list)):
        got = ", ".join(f"{k}={row.get(k)!r:.80}" for k in ("prompt", "messages"))
        raise DataError(f'expected {{"prompt": "…"}} or {{"messages": […]}}, got {got}')
    tools = read_tools(row.get("tools"))
    if isinstance(given[0], str) and row.get("messages") is None:
        check_text(given[0], "prompt")
        return given[0], tools
    return read_messages(given[0], add_generation_prompt=True), tools


def without_nulls(value: Any) -> Any:
    """A value of JSON without the fields that are null: Arrow gives all objects the same fields."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, (list, tuple)) else value


def strings(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for item in value:
            yield from strings(item)
            if isinstance(value, Mapping):
                yield from strings(value[item])


def map_strings(value: Any, change: Callable[[str, bool], str], key: str = "") -> Any:
    """A value of JSON with each text changed: `change(text, whether templates decide by it)`.

    Templates look fields up by name, and decide by roles, types and names of functions; not so in
    the arguments of a call.
    """
    if isinstance(value, str):
        return change(value, key in _DECIDING and _is_name(value))
    if isinstance(value, list):
        return [map_strings(item, change, key) for item in value]
    if not isinstance(value, Mapping):
        return value
    data = key == "arguments"
    return {
        change(k, not data and _is_name(k)): map_strings(v, change, key if data else k)
        for k, v in value.items()
    }


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.-]*", text, re.ASCII) is not None
