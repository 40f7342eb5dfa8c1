"""Test files for a second Python and its JAX: `python -m tests.without` prints them.

They need none of the dev packages, since torch may be a CUDA build of gigabytes there. Their tests run
what another Python or JAX may break: arrays, or processes that talk to one another. Files of text
behave the same everywhere, and so do those of ONCE.
"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = set(
    "torch transformers trl llama_models xllamacpp nbclient nbformat lm_eval verifiers".split()
)

BREAKABLE = {"jax", "multiprocessing"}
# Arrays stand for equations, pages and estimates there; others compute, train and compile them.
ONCE = "dpo_truth_table grpo_truth_table phases report".split()


def names(path: Path) -> set[str]:
    """The modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def packages(path: Path) -> set[str]:
    """What a file of the tests imports, itself or through other test files."""
    imported = names(path)
    ours = (ROOT / f"{name.replace('.', '/')}.py" for name in imported if name.startswith("tests."))
    top = {name.split(".")[0] for name in imported}
    return top.union(*(packages(file) for file in ours if file.exists()))


def runs_there(path: Path) -> bool:
    """Whether a file of tests is for the second Python."""
    found, name = packages(path), path.stem.removeprefix("test_")
    return not PACKAGES & found and bool(BREAKABLE & found) and name not in ONCE


if __name__ == "__main__":
    files = sorted((ROOT / "tests").glob("test_*.py"))
    print(*(path.relative_to(ROOT) for path in files if runs_there(path)))
