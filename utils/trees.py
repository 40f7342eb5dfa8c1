"""Nested dicts."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """The leaves of a nested dict by path, in order: {"a": {"b": 1}} gives {"a/b": 1}.

    Without recursion, since JSON may be nested deeper than Python's stack. Empty dicts are left out.
    """
    out, todo = {}, [*reversed(tree.items())]
    while todo:
        path, value = todo.pop()
        if isinstance(value, Mapping):
            todo += [(f"{path}{sep}{key}", child) for key, child in reversed(value.items())]
        else:
            out[path] = value
    return out
