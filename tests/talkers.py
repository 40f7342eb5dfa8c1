"""Environments for tests; they import nothing heavy, since each server imports them anew."""

import random
import time

from trainers.environments import Environment

WORDS = ("higher", "lower", "say a number", "1", "2", "7")


class Chatter(Environment):
    """Says things at random, in one or two messages; `slow`: seconds that it takes at most."""

    def __init__(self, turns: int = 3, slow: float = 0.0, seed: int = 0, low: int = 1):
        self.turns, self.slow, self.seed, self.low = turns, slow, seed, low

    def examples(self, size, seed):
        return [{"number": seed * size + i} for i in range(size)]

    def reset(self, example):
        self.left, self.draw = self.turns, random.Random(example["number"] + self.seed)
        asked = random.Random(example["number"])
        return [{"role": "user", "content": "".join(asked.choices(WORDS, k=asked.randint(1, 3)))}]

    def step(self, message):
        time.sleep(random.SystemRandom().random() * self.slow)
        self.left -= 1
        more = range(self.draw.randint(self.low, 2))
        said = [
            {
                "role": "user",
                "content": "".join(self.draw.choices(WORDS, k=self.draw.randint(1, 9))),
            }
            for _ in more
        ]
        return said, self.draw.choice((None, 0.5, 1)), not self.left


class Once(Environment):
    """A single turn, whose reward is the share of the digits 1 and 2."""

    def examples(self, size, seed):
        return [{"number": i} for i in range(size)]

    def reset(self, example):
        return [{"role": "user", "content": WORDS[example["number"] % len(WORDS)]}]

    def step(self, message):
        return [], share(message["content"]), True


def share(text):
    """The reward of Once."""
    return sum(c in "12" for c in text) / 8


def shares(completions, **_):
    """The same as a reward function."""
    return [share(text) for text in completions]


class Endless(Chatter):
    """Never done."""

    def step(self, message):
        said, _, _ = super().step(message)
        return said, None, False


class Silent(Chatter):
    """Done at once, without a reward."""

    def step(self, message):
        return [], None, True


class Raises(Chatter):
    """Fails in half of its steps."""

    def step(self, message):
        if self.draw.random() < 0.5:
            raise KeyError("board")
        return super().step(message)


class Shuffles(Chatter):
    """Its first messages depend on more than the example."""

    def reset(self, example):
        first, *_ = super().reset(example)
        return [first | {"content": first["content"] + random.choice("1234567")}]
