"""The one typed family of errors. Each is a ValueError or OSError too, and knows its exit code.

A message says what, got, expected and the next step, on one line; a CLI prints it and exits with
`exit_code` (`--debug` keeps the traceback).
"""

from typing import Any


class AltiplanoError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code = 1


class ConfigError(AltiplanoError, ValueError):
    """A flag, a config file or a combination of them is wrong."""

    exit_code = 2


class SamplingError(AltiplanoError, ValueError):
    """A prompt, a length or a sampler's number is wrong, or the logits are not finite."""

    exit_code = 2


class ArtifactError(AltiplanoError, ValueError):
    """A model file (weights, tokenizer, chat template) is missing, broken or unsupported."""

    exit_code = 3


class DataError(AltiplanoError, ValueError):
    """A prompt file, a conversation or a dataset is wrong."""

    exit_code = 4


class TrainError(AltiplanoError, ValueError):
    """Training diverged."""

    exit_code = 5


class CheckpointError(AltiplanoError, OSError):
    """A training checkpoint cannot be written or read back."""

    exit_code = 6


def is_int(x: Any) -> bool:
    """An int that is no bool."""
    return isinstance(x, int) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """An int or a float that is no bool."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def raise_all(what: str, problems: list[str]) -> None:
    """Raises one ConfigError that names every problem, if there is any."""
    if problems:
        raise ConfigError(f"{what}: " + "; ".join(problems))


# Whatever a terminal or a page would obey instead of showing, except tab and newline.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


def printable(text: str) -> str:
    """The text with control characters replaced by U+FFFD."""
    return text.translate(_CONTROLS)


def listed(names: list[str], most: int = 10) -> str:
    """The first names of a list, quoted, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name!r:.200}" for name in names[:most]) + more


def plural(n: int, noun: str) -> str:
    """A number with its noun: "1 row", "1,200 rows"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def reason(e: BaseException) -> str:
    """One line of why something failed, without the type's name where the system has words."""
    text = str(e) or type(e).__name__
    if isinstance(e, OSError) and e.strerror:
        text = f"{e.strerror.lower()}: {e.filename}" if e.filename else e.strerror.lower()
    return " ".join(text.split())[:500]
