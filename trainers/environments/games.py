"""Ready-made environments: sums with a calculator, and a number to guess."""

import ast
import math
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainers.environments import Answer, Environment, Example, Message
from trainers.rewards.functions import extract_number
from utils.errors import DataError, is_int, raise_all
from utils.fields import Range, integer

# Signs that models write for Python's.
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**"})
_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_MAX_LENGTH = 200  # of an expression, in characters
_MAX_DIGITS = 100  # of a result


def check_args(name: str, **args: tuple[Any, Range]) -> None:
    """Checks an environment's arguments, each a value and what it may be. Raises ConfigError."""
    wrong = {key: (x, allowed) for key, (x, allowed) in args.items() if not allowed.fits(x)}
    raise_all(name, [f"{k} is {x!r:.80}, expected {r.expected}" for k, (x, r) in wrong.items()])


def text_of(example: Example, key: str) -> str:
    """A text of an example. Raises DataError if it is missing or no text."""
    if not isinstance(example.get(key), str):
        raise DataError(f"{key} is {example.get(key)!r:.80}, expected a text")
    return example[key]


def deal(rows: Sequence[Example], size: int, seed: int) -> list[Example]:
    """`size` rows in an order of chance; each comes once before one comes again.

    Raises DataError if there is none.
    """
    if not rows:
        raise DataError("there are no examples, expected at least one")
    chance, out = random.Random(seed), []
    while len(out) < size:
        out += chance.sample(rows, min(len(rows), size - len(out)))
    return out


def calculate(expression: str) -> str:
    """Evaluates an arithmetic expression.

    Args:
        expression: numbers with + - * / // % ** and parentheses, for example "(12 + 30) * 7".

    Returns:
        The value.
    """
    text = expression.translate(_SIGNS)
    if len(text) > _MAX_LENGTH or not re.fullmatch(r"[0-9.eE+\-*/%()\s]+", text, re.ASCII):
        raise ValueError(
            f"expected up to {_MAX_LENGTH} characters of numbers, + - * / // % ** and parentheses"
        )
    try:
        value = _value(ast.parse(" ".join(text.split()), mode="eval").body)
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from error
    return str(value) if isinstance(value, int) else f"{value:.15g}"


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant):
        value = node.value
    elif isinstance(node, ast.UnaryOp):
        value = _OPERATORS[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) * math.log10(abs(left) + 1) > _MAX_DIGITS:
            raise ValueError(f"{left} ** {right} has too many digits")
        value = _OPERATORS[type(node.op)](left, right)
    else:
        raise TypeError(type(node).__name__)
    if isinstance(value, complex) or not abs(value) < 10**_MAX_DIGITS:
        raise ValueError(f"the result is not a real number of at most {_MAX_DIGITS} digits")
    return value


class Calculator(Environment):
    """Sums, and a tool that does them. The reward is 1 if the reply's last number is the answer."""

    tools = (calculate,)

    def __init__(self, digits: int = 3, terms: int = 3, operations: str = "+-*"):
        """Takes the size of the sums.

        Args:
            digits: of each number, at most.
            terms: numbers in a sum.
            operations: signs between them, of "+-*"; each is chosen at random.

        Raises:
            ConfigError: lists everything that is wrong.
        """
        signs = Range("some of +-*", lambda x: isinstance(x, str) and re.fullmatch(r"[-+*]+", x))
        check_args(
            "calculator",
            digits=(digits, integer(1, 9)),
            terms=(terms, integer(2, 9)),
            operations=(operations, signs),
        )
        self._top, self._terms, self._operations = 10**digits - 1, terms, operations

    def examples(self, size: int, seed: int) -> Sequence[Example]:
        chance, out = random.Random(seed), []
        for _ in range(size):
            parts = [str(chance.randint(1, self._top))]
            for _ in range(self._terms - 1):
                parts += chance.choice(self._operations), str(chance.randint(1, self._top))
            total = " ".join(parts)
            out.append({"question": f"What is {total}?", "answer": calculate(total)})
        return out

    def reset(self, example: Example) -> Sequence[Message]:
        self._answer = extract_number(text_of(example, "answer"), strict=False)
        if self._answer is None:
            raise DataError(f"answer is {example['answer']!r:.80}, expected a number in a text")
        return [{"role": "user", "content": text_of(example, "question")}]

    def step(self, message: Message) -> Answer:
        right = extract_number(message["content"], strict=False) == self._answer
        return [], float(right), True


class Guess(Environment):
    """A number to guess. The answers are "higher" and "lower"; the reward is 1 if it is found."""

    def __init__(self, high: int = 8, turns: int = 4):
        """Takes the largest number, and how many guesses there are.

        Raises:
            ConfigError: lists everything that is wrong.
        """
        check_args("guess", high=(high, integer(2, 10**9)), turns=(turns, integer(1, 1000)))
        self._high, self._turns = high, turns

    def examples(self, size: int, seed: int) -> Sequence[Example]:
        chance = random.Random(seed)
        return [{"secret": chance.randint(1, self._high)} for _ in range(size)]

    def reset(self, example: Example) -> Sequence[Message]:
        self._secret, self._left = example.get("secret"), self._turns
        if not is_int(self._secret) or not 1 <= self._secret <= self._high:
            raise DataError(f"secret is {self._secret!r:.40}, expected 1 to {self._high}")
        return [{"role": "user", "content": f"guess 1 to {self._high}"}]

    def step(self, message: Message) -> Answer:
        guess = extract_number(message["content"], strict=False)
        self._left -= 1
        if guess == self._secret or not self._left:
            return [], float(guess == self._secret), True
        text = "say a number"
        if guess is not None:
            text = "higher" if guess < self._secret else "lower"
        return [{"role": "user", "content": text}], None, False
