"""Rewards of tests, in a module that takes no time to import."""


def ones(completions, **_):
    """Of the share of ones in a completion and its length: nearly never are two equal."""
    return [text.count("1") / 8 + len(text) / 100 for text in completions]


def even(completions, completion_ids, answer, **_):
    """1 for an even number of tokens; None where the answer is 7."""
    return [None if a == 7 else float(len(i) % 2 == 0) for i, a in zip(completion_ids, answer)]
