"""Fields of config dataclasses: type, default, help, range, flag and resume rule stand once, on the field.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class DataConfig(Config):
        seq_len: int = field(512, "longest row, in tokens", integer(2), resume=CONFIG)

Command lines, `--help` and the table of what may differ on a resume are built from these fields.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

from utils.errors import AltiplanoError, ConfigError, is_int, is_number

# Whether a setting may differ from the checkpoint's when a run resumes: always, with one of the
# two flags, or never. A new field is refused until somebody decides.
ALWAYS, CONFIG, DATA, NEVER = "always", "allow_config_change", "allow_data_change", "never"


class Range(NamedTuple):
    """The values that a field may have.

    Attributes:
        expected: in words, as in "expected an integer from 1".
        fits: whether a value is one of them.
    """

    expected: str
    fits: Callable[[Any], bool]


class Setting(NamedTuple):
    """What a field says of itself beyond its type and default.

    Attributes:
        help: one line for `--help`.
        allowed: its range; None: whatever its type says.
        flag: its name on the command line; "" keeps it off the command line.
        resume: one of ALWAYS, CONFIG, DATA, NEVER.
    """

    help: str = ""
    allowed: Range | None = None
    flag: str = ""
    resume: str = NEVER


def field(
    default: Any = dataclasses.MISSING,
    help: str = "",
    allowed: Range | None = None,
    *,
    flag: str | None = None,
    resume: str = NEVER,
) -> Any:
    """A dataclass field with its `Setting`; flag=None names the flag like the field."""
    return dataclasses.field(
        default=default, metadata={"setting": Setting(help, allowed, flag, resume)}
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
    words = "an integer" + _bounds(least, most)
    return Range(words, lambda x: is_int(x) and _inside(x, least, most))


def number(
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Range:
    """A finite number; `least` and `most` are included, `above` and `below` are not."""
    words = "a number" + _bounds(least, most)
    words += "" if above is None else f" above {above:g}"
    words += (
        ""
        if below is None
        else f"{' and' if above is not None or least is not None else ''} below {below:g}"
    )

    def fits(x: Any) -> bool:
        return (
            is_number(x)
            and math.isfinite(x)
            and _inside(x, least, most)
            and (above is None or x > above)
            and (below is None or x < below)
        )

    return Range(words, fits)


def _bounds(least: float | None, most: float | None) -> str:
    if least is None:
        return "" if most is None else f" up to {most:g}"
    return f" from {least:g}" + ("" if most is None else f" to {most:g}")


def _inside(x: float, least: float | None, most: float | None) -> bool:
    return (least is None or x >= least) and (most is None or x <= most)


_OF_TYPE = {
    bool: Range("true or false", lambda x: isinstance(x, bool)),
    int: integer(),
    float: number(),
    str: Range("a text", lambda x: isinstance(x, str)),
}


def takes_none(of: dataclasses.Field) -> bool:
    """Whether a field's type admits None."""
    return type(None) in typing.get_args(of.type)


def allowed(of: dataclasses.Field) -> Range | None:
    """A field's range: the one that it states, else the one of its type; None: anything."""
    stated = setting(of).allowed
    if stated is not None:
        return stated
    kinds = [kind for kind in typing.get_args(of.type) or (of.type,) if kind is not type(None)]
    return _OF_TYPE.get(kinds[0]) if len(kinds) == 1 else None


class Config:
    """Base of config dataclasses: checks every field when it is made, and lists all problems at once.

    A subclass with rules between fields extends `problems`.
    """

    error: ClassVar[type[AltiplanoError]] = ConfigError

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise self.error(f"{type(self).__name__}: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """All that is wrong with the values, one text per problem."""
        return list(field_problems(self))


def field_problems(config: Any) -> Iterator[str]:
    """The fields of a dataclass whose values are out of range, one text each."""
    for f in dataclasses.fields(config):
        value, known = getattr(config, f.name), allowed(f)
        if known is None or (value is None and takes_none(f)) or known.fits(value):
            continue
        empty = ", or None" if takes_none(f) else ""
        yield f"{f.name}={value!r:.60}, expected {known.expected}{empty}"
