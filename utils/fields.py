"""Fields of config dataclasses: type, default, help, range, flag and resume rule stand once, on the field.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class DataConfig(Config):
        seq_len: int = field(512, "longest row, in tokens", integer(2), resume=CONFIG)

Command lines, `--help` and the table of what may differ on a resume are built from these fields.
"""

import dataclasses
import functools
import inspect
import itertools
import json
import math
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

from utils.errors import AltiplanoError, ConfigError, is_int, is_number

# Whether a setting may differ from the checkpoint's when a run resumes: always, with one of the
# two flags, or never. A new field is refused until somebody decides.
ALWAYS, CONFIG, DATA, NEVER = "always", "allow_config_change", "allow_data_change", "never"


class Range(NamedTuple):
    """The values that a field may have.

    Attributes:
        expected: in words, as in "expected an integer of at least 1".
        fits: whether a value is one of them.
    """

    expected: str
    fits: Callable[[Any], bool]


class Setting(NamedTuple):
    """Settings of a field beyond its type and default.

    Attributes:
        help: one line for `--help`.
        allowed: its range; None: whatever its type says.
        flag: its name on the command line; "" keeps it off the command line.
        resume: one of ALWAYS, CONFIG, DATA, NEVER.
        parse: makes the value from the flag's text, or raises ConfigError; None: the value is the text,
            number or switch itself.
    """

    help: str = ""
    allowed: Range | None = None
    flag: str | None = ""
    resume: str = NEVER
    parse: Callable[[str], Any] | None = None


def field(
    default: Any = dataclasses.MISSING,
    help: str = "",
    allowed: Range | None = None,
    *,
    flag: str | None = None,
    resume: str = NEVER,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field with its `Setting`; flag=None names the flag like the field."""
    return dataclasses.field(
        default=default, metadata={"setting": Setting(help, allowed, flag, resume, parse)}
    )


def again(base: type, name: str, default: Any, **changes: Any) -> Any:
    """A field of a base class with another default, and with `changes` of its Setting."""
    (found,) = (f for f in dataclasses.fields(base) if f.name == name)
    return dataclasses.field(
        default=default, metadata={"setting": found.metadata["setting"]._replace(**changes)}
    )


def setting(of: dataclasses.Field) -> Setting:
    """The Setting of a dataclass's field, with its flag's name filled in."""
    found = of.metadata.get("setting", Setting())
    return found._replace(flag=of.name) if found.flag is None else found


def one_of(*names: str) -> Range:
    """One of several names."""
    return Range(f"one of {', '.join(names)}", lambda x: isinstance(x, str) and x in names)


def integer(least: int | None = None, most: int | None = None) -> Range:
    """An integer within bounds that are included."""

    def fits(x: Any) -> bool:
        return is_int(x) and (least is None or x >= least) and (most is None or x <= most)

    return Range("an integer" + _bounds(least, most), fits)


def number(
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Range:
    """A finite number; `least` and `most` are included, `above` and `below` are not."""
    words = _bounds(least, most)
    for word, limit in (("above", above), ("below", below)):
        words += "" if limit is None else " and" * bool(words) + f" {word} {limit}"

    def fits(x: Any) -> bool:
        if not is_number(x) or not -math.inf < x < math.inf:  # isfinite refuses long integers
            return False
        inside = (least is None or x >= least) and (most is None or x <= most)
        return inside and (above is None or x > above) and (below is None or x < below)

    return Range("a number" + words, fits)


def _bounds(least: float | None, most: float | None) -> str:
    if least is None:
        return "" if most is None else f" of at most {most}"
    return f" of at least {least}" if most is None else f" from {least} to {most}"


_OF_TYPE = {
    bool: Range("true or false", lambda x: isinstance(x, bool)),
    int: integer(),
    float: number(),
    str: Range("a text", lambda x: isinstance(x, str)),
}


def kinds(of: dataclasses.Field) -> set[type]:
    """The types that a field's values may have, NoneType among them."""
    return set(typing.get_args(of.type) if isinstance(of.type, types.UnionType) else (of.type,))


def takes_none(of: dataclasses.Field) -> bool:
    """Whether a field's type admits None."""
    return type(None) in kinds(of)


def allowed(of: dataclasses.Field) -> Range | None:
    """A field's range: the one that it states, else the one of its type; None: anything."""
    stated, types = setting(of).allowed, kinds(of) - {type(None)}
    return stated or (_OF_TYPE.get(*types) if len(types) == 1 else None)


class Config:
    """Base of config dataclasses: checks every field when it is made, and lists all problems at once.

    A subclass with rules between fields extends `problems`.
    """

    error: ClassVar[type[AltiplanoError]] = ConfigError

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise self.error(f"{type(self).__name__}: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """Lists everything wrong with the values, one text per problem."""
        return field_problems(self)


def field_problems(config: Any) -> list[str]:
    """The fields of any dataclass that are out of range, one text each."""
    return [
        f"{f.name}={value!r:.60}, expected {expected}"
        for f in dataclasses.fields(config)
        if (expected := misfit(f, value := getattr(config, f.name)))
    ]


def misfit(of: dataclasses.Field, value: Any) -> str:
    """The range that a value of a field is outside of, in words; "" if it fits."""
    known = allowed(of)
    if known is None or (value is None and takes_none(of)) or known.fits(value):
        return ""
    return known.expected + ", or None" * takes_none(of)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryCommand(Config):
    """Flags that all commands have."""

    debug: bool = field(False, "show the traceback of an error")
    version: bool = field(False, "print the version and exit")
    config: str | None = field(
        None, "a JSON file of flags, or a run's run.json; flags of the command line win"
    )


_INDENT = " " * 28  # of the help texts of `--help`


class Flag(NamedTuple):
    """A flag of a command: its field, the parameter that takes the field's config, and its default."""

    name: str
    field: dataclasses.Field
    group: str
    default: Any  # dataclasses.MISSING: the flag is required

    def value(self, given: Any) -> Any:
        """The field's value, from what fire made of the words. Raises ConfigError."""
        parse = setting(self.field).parse
        try:
            value = parse(given) if parse and isinstance(given, str) else given
        except ConfigError as e:
            raise ConfigError(f"--{self.name}: {e}") from e
        if expected := misfit(self.field, value).removesuffix(", or None"):
            off = f"; --no{self.name} turns it off" * self.is_switch
            raise ConfigError(f"--{self.name} must be {expected}, got {given!r:.60}{off}")
        return value

    @property
    def is_switch(self) -> bool:
        """Whether it is turned on and off, and has no value."""
        return bool in kinds(self.field)

    @property
    def is_text(self) -> bool:
        """Whether its value is the text that was typed, whatever it looks like."""
        return str in kinds(self.field) or setting(self.field).parse is not None

    def help(self, width: int) -> str:
        """Lines for `--help`: the flag with its default (--[no]flag if it is not off), and its help."""
        said, known = setting(self.field).help, allowed(self.field)
        if known is not None and known.expected.startswith("one of "):
            said += f" ({known.expected})"
        left = f"  --{'[no]' * (self.default is not False)}{self.name}"
        if not self.is_switch:
            unset = self.default in (None, "", (), dataclasses.MISSING)
            left = f"  --{self.name} {self.placeholder if unset else self.default}"
        indents = dict(initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False)
        text = textwrap.fill(said, width, **indents)
        return f"{left}\n{text}" if len(left) > len(_INDENT) - 2 else left + text[len(left) :]

    @property
    def placeholder(self) -> str:
        """A word for its value."""
        return "TEXT" if self.is_text else "N"


def as_flags(*configs: Config) -> dict[str, Any]:
    """The flags that make the configs again, except those that are None."""
    return {
        setting(f).flag: value
        for config in configs
        for f in dataclasses.fields(config)
        if setting(f).flag and (value := getattr(config, f.name)) is not None
    }


def flags_of(command: Callable[..., Any]) -> list[Flag]:
    """The flags of a command, by parameter and then by field; those of every command come last."""
    every = inspect.Parameter(
        "every_command", inspect.Parameter.KEYWORD_ONLY, annotation=EveryCommand
    )
    return [
        Flag(
            setting(f).flag,
            f,
            group.name,
            f.default if group.default is group.empty else getattr(group.default, f.name),
        )
        for group in [*inspect.signature(command).parameters.values(), every]
        for f in dataclasses.fields(group.annotation)
        if setting(f).flag
    ]


def build(command: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The configs that a command takes, from its flags. Raises one ConfigError with all problems."""
    built, problems = {}, []
    for name, parameter in inspect.signature(command).parameters.items():
        values, wrong = {}, []
        flags = [flag for flag in flags_of(command) if flag.group == name]
        for flag in flags:
            try:
                if flag.name in given:
                    values[flag.field.name] = flag.value(given[flag.name])
                elif flag.default is dataclasses.MISSING:
                    wrong.append(f"--{flag.name} is required")
            except ConfigError as e:
                wrong.append(str(e))
        try:
            if not wrong:
                own, of = parameter.default, parameter.annotation
                own = of if own is parameter.empty else functools.partial(dataclasses.replace, own)
                built[name] = own(**values)
        except AltiplanoError as e:  # a rule between fields
            text = str(e).removeprefix(f"{of.__name__}: ")
            for flag in flags:
                text = re.sub(rf"(?<!-)\b{flag.field.name}=", f"--{flag.name}=", text)
            wrong.append(text)
        problems += wrong
    if problems:
        raise ConfigError("; ".join(dict.fromkeys(problems)))
    return built


def paragraphs(command: Callable[..., Any]) -> list[str]:
    """The paragraphs of a command's docstring; the first is a sentence."""
    return [" ".join(part.split()) for part in inspect.getdoc(command).split("\n\n")]


def help_page(command: Callable[..., Any], program: str) -> str:
    """The `--help` of a command: usage, its docstring, and the flags under their groups' names."""
    width = min(shutil.get_terminal_size().columns, 110)
    first: dict[str, Flag] = {}
    for flag in flags_of(command):
        first.setdefault(flag.name, flag)
    flags = first.values()
    required = [f"--{f.name} {f.placeholder}" for f in flags if f.default is dataclasses.MISSING]
    head = " ".join(["usage: python", program, *required, "[flags]"])
    lines = [textwrap.fill(text, width) for text in (head, *paragraphs(command))]
    for group, members in itertools.groupby(flags, lambda flag: flag.group):
        lines += [f"\n{group.replace('_', ' ')}:", *(flag.help(width) for flag in members)]
    return "\n".join(lines) + "\n"


def texts(text: str) -> tuple[str, ...]:
    """The `parse` of a flag that is a text, or a JSON list of texts."""
    if not text.startswith("["):
        return (text,)
    try:
        return tuple(json.loads(text))
    except ValueError as e:
        raise ConfigError(
            f"{text!r:.80} is not a JSON list of texts ({e}); a text that starts with [ is written as "
            f"{json.dumps([text])!r:.80}"
        ) from e


def gathered(words: Sequence[str], flags: Iterable[Flag]) -> list[str]:
    """A command line where a flag of several texts that is repeated stands once, with their JSON list."""
    for flag in flags:
        if setting(flag.field).parse is not texts:
            continue
        found, others, left = [], [], iter(words)
        for word in left:
            head, equals, value = word.partition("=")
            if head.replace("_", "-") == f"--{flag.name}".replace("_", "-"):
                found.append(value if equals else next(left, ""))
            else:
                others.append(word)
        if len(found) > 1:
            words = [*others, f"--{flag.name}={json.dumps(found)}"]
    return list(words)


def integers(text: str) -> tuple[int, ...]:
    """The `parse` of a flag that is several integers with commas between; sorted, each once."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as e:
        raise ConfigError(f"{text!r:.40}, expected integers with commas between, as 1,8") from e
