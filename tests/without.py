"""Test files that need none of the dev packages: `python -m tests.without` prints them.

They run where those packages are not installed, on a second Python for which torch is a CUDA build of
gigabytes, say.
"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = set(
    "torch transformers trl llama_models xllamacpp nbclient nbformat lm_eval verifiers".split()
)


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
def needs_packages(path: Path) -> bool:
    """Whether a file of the tests imports one of PACKAGES, itself or through other test files."""
    imported = names(path)
    ours = (ROOT / f"{name.replace('.', '/')}.py" for name in imported if name.startswith("tests."))
    top = {name.split(".")[0] for name in imported}
    return bool(PACKAGES & top) or any(needs_packages(file) for file in ours if file.exists())


if __name__ == "__main__":
    files = sorted((ROOT / "tests").glob("test_*.py"))
    print(*(path.relative_to(ROOT) for path in files if not needs_packages(path)))
