"""Rewards of tests, in a module that takes no time to import."""


def ones(completions, **_):
    """Of the share of ones in a completion and its length: nearly never are two equal."""
    return [text.count("1") / 8 + len(text) / 100 for text in completions]


def even(completions, completion_ids, answer, **_):
    """1 for an even number of tokens; None where the answer is 7."""
    return [None if a == 7 else float(len(i) % 2 == 0) for i, a in zip(completion_ids, answer)]


def same(completions, **_):
    """Equal rewards, with residues of rounding."""
    return [0.35 + (0.1 + 0.2 - 0.3)] * len(completions)


def sometimes(completions, answer, **_):
    """Differ only where the answer is 3 or 8."""
    return [float(len(c)) if a in (3, 8) else 1.0 for c, a in zip(completions, answer)]


def wrong_type(completions, **_):
    """No numbers."""
    return ["good"] * len(completions)


def failing(completions, **_):
    """Raises."""
    raise RuntimeError("no score today")
