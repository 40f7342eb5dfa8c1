"""Chat templates: jinja in its immutable sandbox, set up as in transformers, and the built-in formats.

A template comes with the checkpoint and is not trusted: it reaches no Python and writes only so much.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from utils.errors import AltiplanoError, ArtifactError, ConfigError, DataError

MAX_TEMPLATE_CHARS = 1 << 20
# A rendered conversation is its messages and some markup around each of them.
MAX_MARKUP_CHARS = 1 << 22

# As Meta's reference encodes them. Each content is stripped; in Llama 2 `[INST]` is plain text, so
# that no encoding can tell a user's from the format's.
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' "
    "~ ('ipython' if m.role == 'tool' else m.role) ~ '<|end_header_id|>\n\n' "
    "~ m.content | trim ~ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% set ns = namespace(system='', turn=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' ~ m.content ~ '\n<</SYS>>\n\n' %}"
    "{% else %}{% set expected = ['user', 'assistant'][ns.turn % 2] %}{% set ns.turn = ns.turn + 1 %}"
    "{% if m.role != expected %}{{ raise_exception('message ' ~ loop.index0 ~ ' has the role ' ~ m.role "
    "~ '; Llama 2 expects ' ~ expected ~ ': user and assistant take turns') }}{% endif %}"
    "{% if expected == 'user' %}{{ '<s>[INST] ' ~ (ns.system ~ m.content) | trim ~ ' [/INST]' }}"
    "{% set ns.system = '' %}{% else %}{{ ' ' ~ m.content | trim ~ ' </s>' }}{% endif %}{% endif %}"
    "{% endfor %}{% if not ns.turn %}{{ raise_exception('message 0 has the role system and is the "
    "only one; add a user message') }}{% endif %}"
)


class Template:
    """A compiled template.

    Attributes:
        source: its jinja source.
        args: values of its variables.
        moment: the time that it writes as today's; None if it asks for none.
    """

    def __init__(self, source: str, args: Mapping[str, Any], moment: datetime):
        """Compiles a template.

        Args:
            source: jinja.
            args: values of its variables.
            moment: the time that `strftime_now` writes.

        Raises:
            ArtifactError: the template is too long or does not compile.
            ConfigError: it has no variable of a name in `args`.
        """
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ArtifactError(
                f"the chat template has {len(source)} characters, expected at most "
                f"{MAX_TEMPLATE_CHARS}"
            )
        self.source, self.args = source, dict(args)
        self.moment = moment if "strftime_now" in source else None
        environment = _environment(moment)
        try:
            self._template = environment.from_string(source)
            known = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except Exception as e:
            raise _error(e) from e
        known = sorted(known - {"messages", "add_generation_prompt", "strftime_now"})
        if unknown := [name for name in args if name not in known]:
            raise ConfigError(
                f"the chat template has no variable {unknown[0]!r:.80}; "
                f"its variables: {', '.join(known) or 'none'}"
            )

    @property
    def settings(self) -> list[Any]:
        """Values beside the source and the messages on which a rendering depends, for JSON."""
        moment = [self.moment.isoformat()] if self.moment else []
        return moment + [self.args] * bool(self.args)

    @property
    def as_rendered(self) -> str:
        """The source with the values of `args` as defaults of its variables."""
        given = "".join(
            f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
            for name, value in self.args.items()
        )
        return f"{given}\n{self.source}" if given else self.source  # jinja takes the newline away

    def render(self, size: int, **variables: Any) -> str:
        """Writes a conversation; `size` characters came from its messages.

        Raises:
            DataError: the template refuses the messages.
            ArtifactError: it fails, or writes without end.
        """
        limit, parts, written = MAX_MARKUP_CHARS + 4 * size, [], 0
        try:
            for part in self._template.generate(**variables):
                parts.append(part)
                written += len(part)
                if written > limit:
                    raise ArtifactError(f"the chat template writes over {limit} characters")
        except AltiplanoError:
            raise
        except Exception as e:
            raise _error(e) from e
        return "".join(parts)


def chat_templates_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: `chat_template` is a string, or a list of named ones."""
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(t, dict) for t in value):
        named = [(t.get("name"), t.get("template")) for t in value]
        if all(isinstance(x, str) for pair in named for x in pair):
            return dict(named)
    raise ArtifactError("chat_template is neither a string nor a list of named templates")


# Conversations in which every text is one character that no template writes.
_TEXT = "\ue000"
_SYSTEM, _USER, _ASSISTANT, _TOOL = (
    {"role": role, "content": _TEXT} for role in ("system", "user", "assistant", "tool")
)
_FUNCTION = {"name": _TEXT, "arguments": {"a": _TEXT}}
_CALLS = [{"id": _TEXT * 9, "type": "function", "function": _FUNCTION}]
_CALLING = {"role": "assistant", "content": "", "tool_calls": _CALLS}
_PROBES = (
    (_SYSTEM, _USER, _ASSISTANT, _USER),
    (_SYSTEM, _USER, _CALLING, _TOOL, _ASSISTANT, _USER),
)
_ROLES = ("system", "user", "assistant", "tool", "ipython", "function")


def structural_words(config: Mapping[str, Any], words: Iterable[str]) -> set[str]:
    """The words that chat templates write as structure: between or after texts, or right before one.

    A word of a system prompt is none; nor is a single character, white space or a part of a role.

    Args:
        config: with the chat templates.
        words: names of added tokens that may be words of any text.
    """
    words = [w for w in words if len(w) > 1 and w.strip() and not any(w in d for d in _ROLES)]
    word = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    found: set[str] = set()
    for source in chat_templates_of(config).values() if words else ():
        with contextlib.suppress(AltiplanoError):  # it is told when it is used
            template = Template(source, {}, datetime.now())
            for before, *after in (_around(template, turns) for turns in _PROBES):
                found.update(re.findall(word, "\n".join(after)))
                found.update(re.findall(rf"({word})\s*\Z", before) if after else ())
    return found


def _around(template: Template, turns: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text that a template writes around those of a conversation, in pieces."""
    variables = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "")
    variables |= {"tools": None, "documents": None, "add_generation_prompt": True}
    # Some templates take no system message, some but a single one.
    for messages in (turns, turns[1:], turns[-1:]):
        with contextlib.suppress(AltiplanoError):
            return template.render(0, messages=list(messages), **variables).split(_TEXT)
    return [""]


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Bounds `*` and `**` too: jinja computes constants, `'a' * 10**9` say, while it compiles."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(x, (int, float)) for x in (left, right)):
            size = max(
                len(x) if isinstance(x, (str, list, tuple)) else abs(x) for x in (left, right)
            )
            if size > 1000:
                raise jinja2.sandbox.SecurityError(f"operands of {operator} are too large")
        return super().call_binop(context, operator, left, right)


class _Undefined(jinja2.Undefined):
    """An undefined name, which a template may test but not write."""

    __str__ = jinja2.Undefined._fail_with_undefined_error


class _Generation(jinja2.ext.Extension):
    """Writes the text in `{% generation %}`, which marks an assistant's answer for training."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(moment: datetime) -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=_Undefined,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = moment.strftime
    return environment


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON as transformers does: jinja's own filter escapes HTML characters."""
    options = dict(indent=indent, separators=separators, sort_keys=sort_keys)
    return json.dumps(x, ensure_ascii=ensure_ascii, **options)


def _literal(value: Any) -> str:
    """A value of JSON as jinja writes it."""
    if isinstance(value, dict):
        items = (f"{_literal(key)}: {_literal(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)


def _raise_exception(message: str) -> None:
    raise DataError(f"the chat template refuses the messages: {message!s:.300}")


def _error(e: Exception) -> ArtifactError:
    line = f" in line {e.lineno}" if isinstance(e, jinja2.TemplateSyntaxError) else ""
    return ArtifactError(
        f"the chat template fails{line}: {type(e).__name__}: {e!s:.300}; name a built-in format"
    )
