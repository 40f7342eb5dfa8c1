"""Every row of faults.md that is due has a test, and every test that names a row names a real one."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent


def parse_ranges(text: str) -> set[str]:
    """The ids that "A1-A3, B7" stands for, or "none"."""
    ids = set()
    for part in [] if text == "none" else text.split(","):
        first, _, last = part.strip().partition("-")
        numbers = range(int(first[1:]), int((last or first)[1:]) + 1)
        ids |= {f"{first[0]}{n}" for n in numbers}
    return ids


def matrix() -> tuple[set[str], set[str], set[str]]:
    """(ids of all rows, those due, those due later)."""
    text = (TESTS / "faults.md").read_text()
    rows = re.findall(r"^\|([A-Z]\d+)\|", text, re.MULTILINE)
    assert len(rows) == len(set(rows))
    due, later = (parse_ranges(re.search(rf"^{k}: (.*)$", text, re.M)[1]) for k in ("Due", "Later"))
    return set(rows), due, later


def covered() -> dict[str, list[str]]:
    """The tests by the id that they carry, from their source: nothing is imported or run."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.covers":
                for argument in node.args:
                    assert isinstance(argument, ast.Constant), f"{path.name}:{node.lineno}"
                    found.setdefault(argument.value, []).append(f"{path.name}:{node.lineno}")
    return found


def test_every_row_is_due_now_or_later():
    rows, due, later = matrix()
    assert len(rows) == 37 + 18 + 20 + 31 + 8 + 47 + 14 + 7 + 6 + 5 + 3 + 8
    assert due | later == rows and not due & later


def test_every_row_that_is_due_has_a_test():
    missing = matrix()[1] - covered().keys()
    assert not missing, f"no test covers {', '.join(sorted(missing))}"


def test_every_mark_names_a_row():
    unknown = {name: where for name, where in covered().items() if name not in matrix()[0]}
    assert not unknown, f"faults.md has no such row: {unknown}"
