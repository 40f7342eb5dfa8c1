r"""Rewards: how a function becomes one, and ready-made ones, importable in a few milliseconds.

Each is called as `RewardPool` calls any reward: by keyword, with `prompts`, `completions` (text),
`completion_ids` and the prompts' columns, a list each; it returns one number per row, or None where
it does not apply. Those with parameters are frozen dataclasses: `polite = FormatMatch(r".*please.*")`
in a module of yours is `--reward my_module:polite`.
"""

import dataclasses
import functools
import importlib
import json
import math
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from utils.errors import ConfigError, is_int, is_number, raise_all

# The layout of R1-style training: thoughts, then the answer, each tag once, and nothing around them.
_INSIDE = r"(?:(?!</?(?:think|answer)>).)*"
_REST = rf"{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>\s*"
THINK_FORMAT = rf"\s*<think>{_REST}"

# A sign counts only where no letter, digit or bracket is right before it: "10-3" ends in 3.
# ASCII digits. Blanks between thousands may be no-break or thin ones.
_BLANK = "[ \u00a0\u2009\u202f]"
_MIXED = rf"(?P<whole>[0-9]{{1,9}}){_BLANK}(?P<top>[0-9]{{1,9}})/(?P<bottom>0*[1-9][0-9]{{0,8}})(?![0-9])"
_GROUPS = (
    r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])",
    rf"(?<![0-9]{_BLANK})[1-9][0-9]{{0,2}}(?:{_BLANK}[0-9]{{3}})+(?![0-9/]|{_BLANK}[0-9])",
)
_POINTS = r"(?P<points>(?<![0-9.])[0-9]{1,3}(?:\.[0-9]{3}){2,})(?!\.?[0-9])"
_PLAIN = rf"(?:(?:{'|'.join(_GROUPS)}|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
_EXPONENT = r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-+−])?\$?(?:{_MIXED}|{_POINTS}"
    rf"|(?P<size>[0-9]+/0*[1-9][0-9]*|{_PLAIN}{_EXPONENT}))"
)
# LaTeX: units, thousands, and fractions of integers; "3\frac{1}{2}" is mixed.
_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?[0-9]\}?)?")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!])(?=[0-9]{3})")
_FRACTION = re.compile(
    r"(?P<mixed>(?<=[0-9]))?\s*\\[dt]?frac\s*(?:\{\s*(-?[0-9,]+)\s*\}|([0-9]))\s*"
    r"(?:\{\s*([0-9,]+)\s*\}|([0-9]))"
)
# Python refuses to convert longer ones, and nobody asks for them.
_MAX_DIGITS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward function with its weight.

    Attributes:
        name: its name in logs.
        function: called by keyword with `prompts` and `completions` (lists of text), `completion_ids`
            (lists of token ids) and one list per column of the data; it may take the ones that it
            does not need as `**_`. Returns one number per completion, None or NaN for one that it
            cannot score. It sees the whole batch at once, a prompt's completions together; after a
            failure, one prompt's completions at a time.
        weight: factor in the total; 0: the score is only logged.

    Raises:
        ConfigError: lists everything that is wrong.
    """

    name: str
    function: Callable[..., Sequence[float | None]]
    weight: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.name, str) or not self.name:
            problems.append(f"name is {self.name!r}, expected a text")
        if not callable(self.function):
            problems.append(f"{self.function!r} is {type(self.function).__name__}, not callable")
        if not is_number(self.weight) or not math.isfinite(self.weight):
            problems.append(f"weight is {self.weight!r}, expected a finite number")
        raise_all(f"reward {self.name!r}", problems)


def answer_text(completion: str) -> str:
    """The answer of a completion: the inside of its last <answer>…</answer>, or all of it, stripped."""
    before, closed, _ = completion.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return (inside if closed and opened else completion).strip()


def extract_number(text: str, strict: bool) -> Fraction | None:
    r"""The number in a completion's answer.

    Args:
        text: the completion.
        strict: `answer_text` must be the number and nothing else; otherwise the last number in it
            counts, or in its last \boxed{…}.

    Numbers are "1,234.50", "1 234" (thousands; a list of three-digit numbers reads like one),
    "1.000.000" (two groups at least: "1.000" is 1), "-3", "$5", ".5", "1e3", "3/4", "3 1/2" (a mixed
    number: the fraction is below 1), "\frac{3}{4}" and "3\frac{1}{2}" of integers. A full stop after
    one is not part of it. Not numbers, so that only their last part counts: decimal commas
    ("2,5"), fractions of anything but integers ("1.5/2", "\frac{\pi}{2}"), powers and roots ("10^3",
    "\sqrt{2}"), "1'000", "1_000", and words ("seven"). Units and "%" are ignored: "50%" is 50.

    Returns:
        Its exact value; None if there is none, or it has more than 1000 digits.
    """
    found = _find_number(text, strict)
    if found is None or len(found) > _MAX_DIGITS:
        return None
    return Fraction(found)


def _find_number(text: str, strict: bool) -> str | None:
    """The number of `extract_number` in Python's spelling."""
    text = answer_text(text)
    if strict:
        match = _NUMBER.fullmatch(_without_latex(text))
    else:
        match = None
        for match in _NUMBER.finditer(_without_latex(_boxed(text))):
            pass
    if not match:
        return None
    sign = "-" if match["sign"] in ("-", "−") else ""
    if match["whole"]:
        whole, top, bottom = (int(match[name]) for name in ("whole", "top", "bottom"))
        if top >= bottom:  # two numbers
            return None if strict else f"{top}/{bottom}"
        return f"{sign}{whole * bottom + top}/{bottom}"
    if match["points"]:
        return sign + match["points"].replace(".", "")
    return sign + re.sub(rf",|{_BLANK}", "", match["size"])


def _boxed(text: str) -> str:
    r"""The inside of the last \boxed{…}, in which braces may be nested; the text if there is none."""
    start, depth = text.rfind("\\boxed{"), 0
    for end in range(start + 6, len(text)) if start >= 0 else ():
        depth += (text[end] == "{") - (text[end] == "}")
        if not depth:
            return text[start + 7 : end]
    return text


def _without_latex(text: str) -> str:
    """The text with LaTeX's numbers as plain ones."""
    if "\\" not in text and "{,}" not in text:
        return text

    def plain(match: re.Match) -> str:
        top, bottom = (match[2] or match[3]).replace(",", ""), (match[4] or match[5]).replace(
            ",", ""
        )
        return f"{' ' * (match['mixed'] is not None)}{top}/{bottom}"

    return _FRACTION.sub(plain, _THOUSANDS.sub("", _UNIT.sub("", text))).replace("\\$", "$")


def exact_match(completions: list[str], answer: list, **_) -> list[float | None]:
    """Returns 1 where the stripped completion is the answer, else 0; None where the row has no answer."""
    return [
        None if right is None else float(text.strip() == str(right).strip())
        for text, right in zip(completions, answer)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberMatch:
    """Gives 1 where the completion's number is exactly the answer's ("0.50" is "1/2"), else 0.

    It gives None where the row's answer has no number. The answer's last number counts, so GSM8K's answers
    can be used as they are.

    Attributes:
        strict: see `extract_number`.
    """

    strict: bool

    def __call__(self, completions: list[str], answer: list, **_) -> list[float | None]:
        """See the class."""
        wanted = [extract_number(str(right), strict=False) for right in answer]
        return [
            None if right is None else float(extract_number(text, self.strict) == right)
            for text, right in zip(completions, wanted)
        ]


@dataclasses.dataclass(frozen=True)
class FormatMatch:
    r"""Gives 1 where the whole completion matches a regular expression, else 0.

    `.` matches newlines too: completions have several lines.

    Attributes:
        pattern: for example r"<think>.*</think>\s*<answer>.*</answer>".

    Raises:
        ConfigError: the pattern is not a regular expression.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern, re.DOTALL)
        except (re.error, TypeError) as error:
            raise ConfigError(f"FormatMatch: {self.pattern!r} is not a pattern: {error}") from error

    def __call__(self, completions: list[str], **_) -> list[float]:
        """See the class."""
        pattern = re.compile(self.pattern, re.DOTALL)
        return [float(pattern.fullmatch(text) is not None) for text in completions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkFormat:
    """Gives 1 for <think>…</think> <answer>…</answer>, each tag once and nothing around, else 0.

    Attributes:
        opened: whether the chat template writes the first <think> itself, at the end of the prompt;
            `load_prompts` finds out. A prompt whose own text ends in it is seen.
    """

    opened: bool = False

    def __call__(
        self, completions: list[str], prompts: Sequence[str] | None = None, **_
    ) -> list[float]:
        """See the class."""
        opened = [
            self.opened or text.rstrip().endswith("<think>")
            for text in prompts or [""] * len(completions)
        ]
        patterns = [_REST if known else THINK_FORMAT for known in opened]
        return [
            float(re.fullmatch(pattern, text, re.DOTALL) is not None)
            for pattern, text in zip(patterns, completions)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftOverlong:
    """A penalty on length: 0 up to max_len - cache tokens, falling to -1 at max_len, -1 beyond.

    Source: DAPO (2503.14476), equation 13.

    Attributes:
        max_len: tokens, with the stop token.
        cache: tokens over which the penalty grows; 0: it is -1 beyond max_len and 0 before.

    Raises:
        ConfigError: max_len < 1, or cache not in [0, max_len].
    """

    max_len: int
    cache: int

    def __post_init__(self) -> None:
        problems = []
        if not is_int(self.max_len) or self.max_len < 1:
            problems.append(f"max_len is {self.max_len!r}, expected a positive integer")
        elif not is_int(self.cache) or not 0 <= self.cache <= self.max_len:
            problems.append(f"cache is {self.cache!r}, expected an integer in [0, {self.max_len}]")
        raise_all("SoftOverlong", problems)

    def __call__(self, completion_ids: list[list[int]], **_) -> list[float]:
        """See the class."""
        free = self.max_len - self.cache
        over = [min(max(len(ids) - free, 0), self.cache + 1) for ids in completion_ids]
        return [-1.0 if n > self.cache else -n / max(self.cache, 1) for n in over]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """Scores by a task of reasoning-gym; needs the column `entry`.

    Attributes:
        task: the dataset's name, for example "chain_sum".
        args: the dataset's configuration.
        strict: the task judges `answer_text` as it is. Otherwise, where the right answer is a
            number, the last number in it is judged, by its value.
        partial: keep scores between 0 and 1; otherwise they become 0, and the mean is an accuracy.
            (Tasks give some credit for a text that has the answer somewhere in it.)
    """

    task: str
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    strict: bool
    partial: bool = False

    def __call__(self, completions: list[str], entry: list[dict], **_) -> list[float]:
        """See the class. Raises ConfigError if reasoning-gym is missing or refuses task or args."""
        dataset = _dataset(self.task, json.dumps(self.args))
        scores = [
            float(dataset.score_answer(self._answer(text, item), item))
            for text, item in zip(completions, entry)
        ]
        return scores if self.partial else [float(score >= 1) for score in scores]

    def _answer(self, completion: str, entry: dict[str, Any]) -> str:
        """The text for the task to judge."""
        right = extract_number(str(entry["answer"]), strict=True)
        if self.strict or right is None:
            return answer_text(completion)
        if extract_number(completion, strict=False) == right:
            return str(entry["answer"])  # tasks compare text, and 4.0 is 4
        return _find_number(completion, strict=False) or ""


def import_reasoning_gym() -> Any:
    """The package, which is optional and slow to import. Raises ConfigError if it is missing."""
    try:
        # A dependency's source has a SyntaxWarning, shown where nobody compiled it before.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
    except ImportError as error:
        text = "reasoning_gym tasks need a package: pip install 'altiplano[rl]'"
        raise ConfigError(text) from error
    return reasoning_gym


@functools.cache
def _dataset(task: str, args: str) -> Any:
    """The task's dataset with a single item, since only its scoring is used."""
    gym = import_reasoning_gym()
    try:
        return gym.create_dataset(task, **{"size": 1, "seed": 0} | json.loads(args))
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"reasoning_gym:{task} with {args}: {error}") from error


READY_MADE = {
    "exact_match": exact_match,
    "number": NumberMatch(strict=False),
    "strict_number": NumberMatch(strict=True),
    "think_format": ThinkFormat(),
}


def load_reward(spec: str) -> Reward:
    """The reward that a flag names.

    Args:
        spec: a name in READY_MADE or "module:function", with "=0.5" for a weight other than 1.

    Raises:
        ConfigError: no such name, module or function, or importing the module fails.
    """
    name, equals, weight = str(spec).partition("=")
    try:
        weight = float(weight) if equals else 1.0
    except ValueError as error:
        text = f"reward {spec!r}: the weight is {weight!r}, expected a number"
        raise ConfigError(f"{text}, for example {name}=0.5") from error
    if name in READY_MADE:
        return Reward(name=name, function=READY_MADE[name], weight=weight)
    function = import_attribute(
        name, f"reward {name!r}", f"module:function, or one of {', '.join(READY_MADE)}"
    )
    return Reward(name=name.replace(":", "."), function=function, weight=weight)


def import_attribute(name: str, what: str, expected: str) -> Any:
    """The object that "module:attribute" names. Raises ConfigError, whose text begins with `what`."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{what}: expected {expected}")
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError):
            text += "; is its folder on PYTHONPATH?"
        raise ConfigError(f"{what}: importing {module} fails: {text}") from error
    try:
        return operator.attrgetter(attribute)(loaded)
    except AttributeError as error:
        raise ConfigError(f"{what}: {module} has no {attribute}") from error
