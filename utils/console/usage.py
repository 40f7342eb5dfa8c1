"""A program's commands and version, read from files: an answer without the seconds that JAX's import takes."""

import ast
import difflib
import importlib.metadata
import sys
import tomllib
from pathlib import Path

from utils.errors import ConfigError


def version() -> str:
    """The project's version."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.exists():  # installed without its sources' folder
        return importlib.metadata.version("altiplano")
    return tomllib.loads(project.read_text())["project"]["version"]


def require_command() -> str:
    """The command that the first argument names; else lists the program's commands, and ends it."""
    program, name = sys.argv[0], "".join(sys.argv[1:2])
    known = _commands(Path(program))
    if name in known:
        return name
    if name == "--version":
        print(f"altiplano {version()}")
        sys.exit()
    asked = name in ("-h", "--help")
    out = sys.stdout if asked else sys.stderr
    print(f"usage: python {program} {{{','.join(known)}}} …; each has --help", file=out)
    for command, summary in known.items():
        print(f"  {command:<8} {summary}", file=out)
    if name and not asked:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        expected = f"expected a command: {', '.join(known)}"
        print(f"error: {program} {name!r:.40}: {expected}{hint}", file=sys.stderr)
    sys.exit(0 if asked else ConfigError.exit_code)


def _commands(program: Path) -> dict[str, str]:
    """The names in a program's COMMANDS, with the first sentence of each one's function."""
    tree = ast.parse(program.read_text())
    summaries = {
        node.name: (ast.get_docstring(node) or "").partition("\n")[0]
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS"
    )
    pairs = zip(table.keys, table.values)
    return {key.value: summaries[value.id] for key, value in pairs}
