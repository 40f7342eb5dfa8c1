"""Conversations to token ids: by the checkpoint's own jinja template, or in Llama 2's or 3's format.

The text of a message never becomes a control token. The built-in formats write control tokens as
ids. A jinja template writes them by name; JinjaFormat tells the template's names from a message's.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from models.llama.tokenizer import Tokenizer, check_text
from models.llama.tokenizers.bpe import Piece
from utils.errors import AltiplanoError, ArtifactError, ConfigError, DataError

Message = Mapping[str, str]

ROLES = ("system", "user", "assistant", "tool", "ipython")
MAX_TEMPLATE_CHARS = 1 << 20
# A rendered conversation is its messages and some markup around each of them.
MAX_MARKUP_CHARS = 1 << 22


class ChatFormat(ABC):
    """A model's way to write conversations."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    @abstractmethod
    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
        """The conversation as plain text (str) and control tokens (int), from checked messages."""

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, with exactly one BOS where the model's prompts have one.

        Args:
            messages: objects with `role` (one of ROLES) and `content`; a system message comes
                first.
            add_generation_prompt: end with the start of an assistant's answer. The last message
                is then not the assistant's.

        Raises:
            DataError: a message is wrong (its index is named), or the format does not take it.
            ArtifactError: the template fails.
        """
        check_messages(messages, add_generation_prompt)
        ids = self.tokenizer.encode_pieces(self.pieces(messages, add_generation_prompt))
        bos_id = self.tokenizer.bos_id
        missing = self.tokenizer.adds_bos and ids[:1] != [bos_id]
        return [bos_id] * missing + ids

    def encode_training(
        self, messages: Sequence[Message], first: int = 0
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and a mask of the ids that the assistant has to produce.

        For answer i, the mask covers the tokens after `encode_chat(messages[:i])`, which asks for
        it, up to and including the stop token. So a model learns exactly the tokens that it will
        be asked for. A template that does not write the answer as this continuation is an error.

        Args:
            messages: as in encode_chat; the last one is usually the assistant's.
            first: mark no answer before `messages[first]`.

        Returns:
            (ids, mask): ids as encode_chat(messages, False), and whether each is marked.

        Raises:
            DataError: as encode_chat; or an answer cannot be told apart (its index is named).
        """
        ids = self.encode_chat(messages, False)
        mask = [False] * len(ids)
        for index in range(first, len(messages)):
            if messages[index]["role"] == "assistant":
                start, end = self._answer(messages, index, ids)
                mask[start:end] = [True] * (end - start)
        return ids, mask

    def _answer(self, messages: Sequence[Message], index: int, ids: list[int]) -> tuple[int, int]:
        """Start and end of the assistant's message `index` in `ids`, the tokens of all messages."""
        where = f"message {index}"
        if index == 0 or messages[index - 1]["role"] == "assistant":
            raise DataError(f"{where} is the assistant's, but nothing before it asks for an answer")
        prompt = self.encode_chat(messages[:index])
        is_last = index == len(messages) - 1
        answered = ids if is_last else self.encode_chat(messages[: index + 1], False)
        start = len(prompt)
        if answered[:start] != prompt:
            raise DataError(
                f"{where}: the chat template rewrites history, or joins the answer's first "
                "characters (white space?) with a token of the prompt: the answer does not "
                "continue the prompt that asks for it; strip it, or choose another chat format"
            )
        stops = (n for n in range(start, len(answered)) if answered[n] in self.tokenizer.stop_ids)
        end = next(stops, -1) + 1
        if not end:
            raise DataError(f"{where}: the chat template ends this answer with no stop token")
        if ids[:end] != answered[:end]:
            raise DataError(
                f"{where}: the chat template rewrites history: it writes this answer, or the text "
                "before it, differently once the conversation continues; train on the last answer "
                "alone"
            )
        return start, end

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, for people. Takes and raises the same as encode_chat."""
        check_messages(messages, add_generation_prompt)
        names = {i: name for name, i in self.tokenizer.special_tokens.items()}
        pieces = self.pieces(messages, add_generation_prompt)
        return "".join(p if isinstance(p, str) else names[p] for p in pieces)

    def _special(self, name: str) -> int:
        if name not in self.tokenizer.special_tokens:
            raise ArtifactError(
                f"the tokenizer has no {name!r}, which {type(self).__name__} needs; "
                "choose another chat format"
            )
        return self.tokenizer.special_tokens[name]


class Llama3Format(ChatFormat):
    """Llama 3's format, as Meta's reference encodes it. Each content is stripped."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        names = ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
        self._bos, self._start, self._end, self._eot = (self._special(f"<|{n}|>") for n in names)

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
        out: list[Piece] = [self._bos]
        for message in messages:
            out += self._header(message["role"])
            out[-1] += message["content"].strip()
            out.append(self._eot)
        return out + (self._header("assistant") if add_generation_prompt else [])

    def _header(self, role: str) -> list[Piece]:
        return [self._start, "ipython" if role == "tool" else role, self._end, "\n\n"]


class Llama2Format(ChatFormat):
    """Llama 2's format, as Meta's reference encodes it.

    `[INST]` and `<<SYS>>` are plain text in Llama 2, so no encoding can tell a user's from the
    format's.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        self._bos, self._eos = self._special("<s>"), self._special("</s>")

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
        system = ""
        out: list[Piece] = []
        turns = list(enumerate(messages))
        if messages[0]["role"] == "system":
            system = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n"
            del turns[0]
        for turn, (index, message) in enumerate(turns):
            expected = ("user", "assistant")[turn % 2]
            if message["role"] != expected:
                raise DataError(
                    f"message {index} has the role {message['role']!r}; Llama 2's format "
                    f"expects {expected!r}: user and assistant take turns"
                )
            if expected == "user":
                out += [self._bos, f"[INST] {(system + message['content']).strip()} [/INST]"]
                system = ""
            else:
                out[-1] += f" {message['content'].strip()} "
                out.append(self._eos)
        if not out:
            raise DataError("message 0 has the role 'system' and is the only one; add a user's")
        return out


class JinjaFormat(ChatFormat):
    """The checkpoint's own chat template, in jinja's immutable sandbox, set up as in transformers.

    To tell the template's control tokens from a message's text, the template is rendered twice:
    with the messages, and with a copy of them in which a private stand-in replaces each visible
    character of any control token's name. Every control token in the copy's rendering is the
    template's own. The first rendering is taken if the messages hold no name of a control token
    and its control tokens are the same; else the second is, with the characters put back. So a
    message can neither write a control token nor help to build one. (The second alone would not
    do: a template that looks into messages, for `</think>` say, does not recognise stand-ins.)
    """

    def __init__(self, tokenizer: Tokenizer, source: str):
        """Raises ArtifactError if the template is too long or does not compile."""
        super().__init__(tokenizer)
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ArtifactError(
                f"the chat template has {len(source)} characters, expected at most "
                f"{MAX_TEMPLATE_CHARS}"
            )
        try:
            self._template = _environment().from_string(source)
        except Exception as e:
            raise _template_error(e) from e
        names = {i: name for name, i in tokenizer.special_tokens.items()}
        roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        self._names = {f"{role}_token": names.get(i, "") for role, i in roles.items()}
        self._watched = {c for name in names.values() for c in name if not c.isspace()}

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
        stand_ins = self._stand_ins(messages)
        masked = [dict(m) | {"content": m["content"].translate(stand_ins)} for m in messages]
        pieces = self.tokenizer.split_special(self._render(messages, add_generation_prompt))
        safe = self.tokenizer.split_special(self._render(masked, add_generation_prompt))
        typed = any(_control(self.tokenizer.split_special(m["content"])) for m in messages)
        if not typed and _control(pieces) == _control(safe):
            return pieces
        back = {ord(stand_in): char for char, stand_in in stand_ins.items()}
        return [p.translate(back) if isinstance(p, str) else p for p in safe]

    def _stand_ins(self, messages: Sequence[Message]) -> dict[int, str]:
        """For each character of a control token, a private-use character that no message has."""
        used = set().union(*(m["content"] for m in messages))
        free = (chr(c) for c in range(0xF0000, 0x10FFFE) if chr(c) not in used)
        table = {ord(char): stand_in for char, stand_in in zip(sorted(self._watched), free)}
        if len(table) < len(self._watched):
            raise DataError("the messages use up all private-use characters; remove some")
        return table

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        limit = MAX_MARKUP_CHARS + 4 * sum(len(m["content"]) for m in messages)
        variables = self._names | {
            "messages": [dict(m) for m in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        parts, size = [], 0
        try:
            for part in self._template.generate(**variables):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise ArtifactError(f"the chat template writes over {limit} characters")
        except AltiplanoError:
            raise
        except Exception as e:
            raise _template_error(e) from e
        return "".join(parts)


def chat_format_for(tokenizer: Tokenizer, name: str | None = None) -> ChatFormat:
    """The chat format of a model.

    Args:
        tokenizer: the model's tokenizer.
        name: `llama2`, `llama3`, or the name of one of the checkpoint's own templates; None for
            its default one. A format is never guessed.

    Raises:
        ArtifactError: the checkpoint has no such template, or it does not compile.
        ConfigError: an unknown name.
    """
    built_in = {"llama2": Llama2Format, "llama3": Llama3Format}
    if name in built_in:
        return built_in[name](tokenizer)
    templates = tokenizer.chat_templates
    if (name or "default") in templates:
        return JinjaFormat(tokenizer, templates[name or "default"])
    known = ", ".join(sorted([*built_in, *templates]))
    if name is not None:
        raise ConfigError(f"unknown chat format {name!r:.80}, expected one of: {known}")
    raise ArtifactError(f"the checkpoint has no default chat template; name a format: {known}")


def check_messages(messages: Any, add_generation_prompt: bool) -> None:
    """Raises DataError, with the index, for messages that ChatFormat.encode_chat does not take."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"messages: expected a non-empty list, got {messages!r:.80}")
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            got = sorted(map(str, message)) if isinstance(message, Mapping) else message
            raise DataError(f"{where}: expected the keys role and content, got {got!r:.80}")
        if message["role"] not in ROLES:
            raise DataError(f"{where}: role {message['role']!r:.80}, expected one of {ROLES}")
        if not isinstance(message["content"], str):
            raise DataError(f"{where}: content is {message['content']!r:.80}, expected a string")
        check_text(message["content"], where)
        if message["role"] == "system" and index > 0:
            raise DataError(f"{where}: a system message can only be message 0")
    if add_generation_prompt and messages[-1]["role"] == "assistant":
        raise DataError(
            f"message {len(messages) - 1} is the assistant's and the last: there is nothing to "
            "answer; remove it, or pass add_generation_prompt=False"
        )


# The jinja environment --------------------------------------------------------------------------


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


def _control(pieces: Sequence[Piece]) -> list[int]:
    return [p for p in pieces if isinstance(p, int)]


def _environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=_Undefined,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise DataError(f"the chat template refuses the messages: {message!s:.300}")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _template_error(e: Exception) -> ArtifactError:
    line = f" in line {e.lineno}" if isinstance(e, jinja2.TemplateSyntaxError) else ""
    return ArtifactError(
        f"the chat template fails{line}: {type(e).__name__}: {e!s:.300}; name a built-in format"
    )
