"""Conversations to token ids: by the checkpoint's own chat template, or in Llama 2's or 3's format.

No text of a message becomes a control token, but for the tags that an assistant wrote: ChatFormat
tells the template's names of control tokens from a message's.
"""

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from models.llama.chat.messages import REASONING, TOOL_ROLES, Message, Tools
from models.llama.chat.messages import map_strings, read_messages, read_tools, strings
from models.llama.chat.template import LLAMA2, LLAMA3, Template
from models.llama.tokenizer import Tokenizer
from models.llama.tokenizers.bpe import Piece
from utils.errors import AltiplanoError, ArtifactError, ConfigError, DataError
from utils.fields import DATA, Config, field
from utils.files import parse_json

# Conversations with more answers are encoded turn by turn.
_FEW_ANSWERS = 4


class ChatFormat:
    """A model's way to write conversations: a chat template with values of its variables.

    To tell the template's control tokens from a message's text, the template is rendered twice:
    with the messages, and with a copy of them in which a private stand-in replaces each visible
    character of any control token's name. Every control token in the copy's rendering is the
    template's own. The first rendering is taken if the messages hold no name of a control token
    and its control tokens are the same; else the second is, with the characters put back. So a
    message can neither write a control token nor help to build one. (The second alone would not
    do: a template that looks into messages, for `</think>` say, does not recognise stand-ins.)
    Tags in an assistant's message stay: they are tokens that it has written, or learns to write.

    Attributes:
        tokenizer: the model's.
        template: the compiled template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str,
        args: Mapping[str, Any] | None = None,
        moment: datetime | None = None,
    ):
        """Arguments and errors as in Template; the moment is now unless it is given."""
        self.tokenizer = tokenizer
        self.template = Template(source, args or {}, moment or datetime.now())
        self._names = names = {i: name for name, i in tokenizer.special_tokens.items()}
        roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        self._variables = {f"{role}_token": names.get(i, "") for role, i in roles.items()}
        self._variables |= {"tools": None, "documents": None} | self.template.args
        self._watched = {c for name in names.values() for c in name if not c.isspace()}
        # Some templates know a call by its content, which is null then; others would write "None".
        nulls = re.search(r"content\W{0,2}\s+is\s+(not\s+)?none", source, re.IGNORECASE)
        self._no_content = None if nulls else ""

    def at(self, moment: datetime) -> "ChatFormat":
        """The same format at another moment."""
        other = copy.copy(self)
        other.template = Template(self.template.source, self.template.args, moment)
        return other

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
    ) -> list[int]:
        """Token ids of a conversation, with exactly one BOS where the model's prompts have one.

        Args:
            messages: objects as `read_messages` takes them.
            add_generation_prompt: end with the start of an assistant's answer. The last message
                is then not the assistant's.
            tools: definitions of functions, as `read_tools` takes them.

        Raises:
            DataError: a message is wrong (its index is named), or the template does not take it or
                has no place for a part of it.
            ArtifactError: the template fails.
        """
        return self._ids(*self._checked(messages, add_generation_prompt, tools))

    def encode_training(
        self, messages: Sequence[Message], first: int = 0, tools: Tools | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and a mask of the ids that the assistant has to produce.

        For answer i, the mask covers the tokens after `encode_chat(messages[:i])`, which asks for
        it, up to and including the stop token. So a model learns exactly the tokens that it will
        be asked for. A template that does not write the answer as this continuation is an error.
        A greeting, before the first user's message, is context.

        Args:
            messages, tools: as in encode_chat; the last message is usually the assistant's.
            first: mark no answer before `messages[first]`.

        Returns:
            (ids, mask): ids as encode_chat(messages, False), and whether each is marked.

        Raises:
            DataError: as encode_chat; or an answer cannot be told apart (its index is named).
        """
        messages, _, tools = self._checked(messages, False, tools)
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        first = first or next(iter(users), 0)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        ids, spans = self._ids(messages, False, tools), None
        if len(answers) > _FEW_ANSWERS:
            spans = self._spans_by_turn(messages, users, answers, ids, tools)
        if spans is None:
            spans = [self._span(messages, index, ids, tools) for index in answers]
        mask = [False] * len(ids)
        for start, end in spans:
            mask[start:end] = [True] * (end - start)
        return ids, mask

    def _span(
        self, messages: Sequence[Message], index: int, ids: list[int], tools: Tools | None
    ) -> tuple[int, int]:
        """Start and end of the assistant's message `index` in `ids`, the tokens of all messages."""
        where = f"message {index}"
        if index == 0 or messages[index - 1]["role"] == "assistant":
            raise DataError(f"{where} is the assistant's, but nothing before it asks for an answer")
        prompt = self._ids(messages[:index], True, tools)
        is_last = index == len(messages) - 1
        answered = ids if is_last else self._ids(messages[: index + 1], False, tools)
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
                "alone (--mask last)"
            )
        return start, end

    def _spans_by_turn(
        self,
        messages: Sequence[Message],
        users: Sequence[int],
        answers: Sequence[int],
        ids: list[int],
        tools: Tools | None,
    ) -> list[tuple[int, int]] | None:
        """The spans of `answers` in time linear in the turns; None where only `_span` can tell.

        Each turn, a user's message with what follows, is encoded by itself. If the turns, without
        what the template writes before each (BOS, a system message), join to `ids`, then the
        tokens of each depend on it alone.
        """
        bounds = [0, *users[1:], len(messages)]
        joined, spans, skip, wanted = [], [], 0, set(answers)
        try:
            for n, start in enumerate(bounds[:-1]):
                turn, given = messages[start : bounds[n + 1]], None if n else tools
                alone = self._ids(turn, False, given)
                if n == 1:  # the first turn that has something before it
                    two = self._ids(messages[: bounds[2]], False, tools)
                    skip = len(joined) + len(alone) - len(two)
                shift = len(joined) - skip
                inside = sorted(wanted.intersection(range(start, bounds[n + 1])))
                found = self._spans_in_turn(turn, [i - start for i in inside], alone, given)
                spans += [(start + shift, end + shift) for start, end in found]
                joined += alone[max(skip, 0) :]
            same = joined == ids and all(
                spans[n] == self._span(messages, answers[n], ids, tools)
                for n in (len(answers) // 2, -1)
            )
        except (DataError, ArtifactError):
            return None
        return spans if same else None

    def _spans_in_turn(
        self, turn: Sequence[Message], answers: Sequence[int], ids: list[int], tools: Tools | None
    ) -> list[tuple[int, int]]:
        """The spans of a turn's answers, in time linear in its messages.

        There are several where the assistant calls functions. Each but the first is encoded behind
        the one before it alone; raises DataError if it has other tokens in `ids`, the turn's.
        """
        spans = [self._span(turn, index, ids, tools) for index in answers[:1]]
        for before, index in zip(answers, answers[1:]):
            part = [{"role": "user", "content": "x"}, *turn[before : index + 1]]
            alone, at = self._ids(part, False, None), spans[-1][1]
            (_, seen), (start, end) = (self._span(part, i, alone, None) for i in (1, len(part) - 1))
            if alone[seen:end] != ids[at : at + end - seen]:
                raise DataError(f"message {index} of the turn has other tokens by itself")
            spans.append((at + start - seen, at + end - seen))
        return spans

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
    ) -> str:
        """The conversation as text, for people. Takes and raises the same as encode_chat."""
        pieces = self._pieces(*self._checked(messages, add_generation_prompt, tools))
        return "".join(p if isinstance(p, str) else self._names[p] for p in pieces)

    def _ids(self, messages: Sequence[Message], prompt: bool, tools: Tools | None) -> list[int]:
        ids = self.tokenizer.encode_pieces(self._pieces(messages, prompt, tools))
        bos_id = self.tokenizer.bos_id
        missing = self.tokenizer.adds_bos and ids[:1] != [bos_id]
        return [bos_id] * missing + ids

    def _pieces(
        self, messages: Sequence[Message], prompt: bool, tools: Tools | None
    ) -> list[Piece]:
        """The conversation as plain text (str) and control tokens (int), from checked messages."""
        split, split_tags = self.tokenizer.split_special, self.tokenizer.split_tags
        stand_ins = self._stand_ins(list(strings([messages, tools])))
        names, typed = self._names, set()

        def hide(text: str, is_structure: bool, tags: bool = False) -> str:
            parts = split_tags(text) if tags else [text]
            if any(_control(split(part)) for part in parts if isinstance(part, str)):
                typed.add(text)
            elif is_structure:
                return text
            return "".join(
                names[p] if isinstance(p, int) else p.translate(stand_ins) for p in parts
            )

        hide_tagged = functools.partial(hide, tags=True)
        masked = [
            map_strings(m, hide_tagged if m["role"] == "assistant" else hide) for m in messages
        ]
        pieces = split(self._render(messages, prompt, tools))
        safe = split(self._render(masked, prompt, map_strings(tools, hide)))
        if not typed and _control(pieces) == _control(safe):
            return pieces
        back = {ord(stand_in): char for char, stand_in in stand_ins.items()}
        return [p.translate(back) if isinstance(p, str) else p for p in safe]

    def _stand_ins(self, texts: Sequence[str]) -> dict[int, str]:
        """For each character of a control token, a private-use character that no message has."""
        used = set().union(*texts)
        free = (chr(c) for c in range(0xF0000, 0x10FFFE) if chr(c) not in used)
        table = {ord(char): stand_in for char, stand_in in zip(sorted(self._watched), free)}
        if len(table) < len(self._watched):
            raise DataError("the messages use up all private-use characters; remove some")
        return table

    def _render(self, messages: Sequence[Message], prompt: bool, tools: Tools | None) -> str:
        size = sum(map(len, strings([messages, tools])))
        given = {"messages": [self._seen(m) for m in messages], "add_generation_prompt": prompt}
        given |= {"tools": tools} if tools else {}
        return self.template.render(size, **self._variables | given)

    def _seen(self, message: Message) -> dict[str, Any]:
        """A message as the template sees it; thoughts have all their names, as in transformers."""
        thoughts = next((message[key] for key in REASONING if key in message), None)
        if thoughts is not None:
            message = {"thinking": thoughts, **message, "reasoning_content": thoughts}
        if message.get("content") is None:
            message = {**message, "content": self._no_content}
        return message

    def _checked(
        self, messages: Any, prompt: bool, tools: Any
    ) -> tuple[list[Message], bool, Tools | None]:
        """The arguments of encode_chat, none of which the template drops in silence."""
        messages = read_messages(messages, prompt)
        tools = read_tools(tools) or read_tools(self.template.args.get("tools"))
        parts: list[tuple[str, Any]] = [("tools", (messages, None))] if tools else []
        if calls := [i for i, m in enumerate(messages) if "tool_calls" in m]:
            less = [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages]
            parts.append((f"message {calls[0]}: tool_calls", (less, tools)))
        if results := [i for i, m in enumerate(messages) if m["role"] in TOOL_ROLES]:
            more = list(messages)
            for i in results:
                more[i] = messages[i] | {"content": messages[i]["content"] + "0"}
            parts.append(
                (f"message {results[0]}: the role {messages[results[0]]['role']}", (more, tools))
            )
        whole = self._render(messages, prompt, tools) if parts else ""
        for what, (changed, given) in parts:
            try:
                same = self._render(changed, prompt, given) == whole
            except AltiplanoError:
                same = False
            if same:
                raise DataError(f"{what}: the chat template has no place for it")
        if not any(name in self.template.source for name in REASONING):
            for index, message in enumerate(messages):
                for key in message.keys() & set(REASONING):
                    raise DataError(
                        f"message {index}: {key}: the chat template has no place for it"
                    )
        return messages, prompt, tools


class _BuiltIn(ChatFormat):
    """A format whose template we bring."""

    source: str
    needs: Sequence[str]  # control tokens

    def __init__(self, tokenizer: Tokenizer, **options: Any):
        for name in self.needs:
            if name not in tokenizer.special_tokens:
                raise ArtifactError(
                    f"the tokenizer has no {name!r}, which {type(self).__name__} needs; "
                    "choose another chat format"
                )
        super().__init__(tokenizer, self.source, **options)


class Llama3Format(_BuiltIn):
    """Llama 3's format, as Meta's reference encodes it. Each content is stripped."""

    source = LLAMA3
    needs = [f"<|{n}|>" for n in ("begin_of_text", "start_header_id", "end_header_id", "eot_id")]


class Llama2Format(_BuiltIn):
    """Llama 2's format, as Meta's reference encodes it."""

    source, needs = LLAMA2, ("<s>", "</s>")


def chat_format_for(
    tokenizer: Tokenizer,
    name: str | None = None,
    args: str | Mapping[str, Any] | None = None,
    moment: datetime | None = None,
) -> ChatFormat:
    """The chat format of a model.

    Args:
        tokenizer: the model's tokenizer.
        name: `llama2`, `llama3`, or the name of one of the checkpoint's own templates; None for
            its default one. A format is never guessed.
        args: values of the template's variables, or their JSON object.
        moment: the time that the template writes as today's; None: now.

    Raises:
        ArtifactError: the checkpoint has no such template, or it does not compile.
        ConfigError: an unknown name; or the template has no variable of a name in `args`.
    """
    args = parse_json(args.encode(), "--template_args") if isinstance(args, str) else args
    options = {"args": args, "moment": moment}
    built_in = {"llama2": Llama2Format, "llama3": Llama3Format}
    if name in built_in:
        return built_in[name](tokenizer, **options)
    templates = tokenizer.chat_templates
    if (name or "default") in templates:
        return ChatFormat(tokenizer, templates[name or "default"], **options)
    known = ", ".join(sorted([*built_in, *templates]))
    if name is not None:
        raise ConfigError(f"unknown chat format {name!r:.80}, expected one of: {known}")
    raise ArtifactError(f"the checkpoint has no default chat template; name a format: {known}")


def _object(text: str) -> str:
    """A JSON object in one spelling: it is part of a run's settings. Raises ConfigError."""
    return json.dumps(parse_json(text.encode(), "a JSON object"), sort_keys=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateFlags(Config):
    """Which chat template writes conversations, and with what."""

    chat_format: str | None = field(
        None, "llama2, llama3 or the name of one of the checkpoint's templates", resume=DATA
    )
    template_args: str | None = field(
        None,
        "JSON object with variables of the chat template, for example "
        '\'{"date_string": "26 Jul 2024"}\'',
        resume=DATA,
        parse=_object,
    )


def _control(pieces: Sequence[Piece]) -> list[int]:
    return [p for p in pieces if isinstance(p, int)]
