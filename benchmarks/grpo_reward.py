"""The reward of benchmarks/grpo.py; a module of its own, as the process that scores imports it."""


def distinct_ids(completion_ids: list[list[int]], **_) -> list[float]:
    """How many different tokens a completion has, modulo 7: cheap, and different in a group."""
    return [float(len(set(ids)) % 7) for ids in completion_ids]
