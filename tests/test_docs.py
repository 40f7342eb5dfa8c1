"""Paths, names and commands in README.md, CLAUDE.md and docs/ exist, and README's Python runs."""

import ast
import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from models.llama.presets import PRESETS
from tests import compiling
from utils.console import cli

ROOT = Path(__file__).parents[1]
GUIDES = ("README.md", "CLAUDE.md")
DOCS = (
    *GUIDES,
    *(
        f"docs/{name}.md"
        for name in "distillation dpo environments evaluate grpo scale speed training".split()
    ),
)


def code_blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


@pytest.mark.parametrize("name", DOCS)
def test_every_path_that_is_named_exists(name):
    text = (ROOT / name).read_text()
    quoted = [
        path
        for path in re.findall(r"`([\w./-]+)`", text)
        if re.search(r"\.(py|md|toml)$", path) or path.startswith((".ci/", "tests/"))
    ]
    linked = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    assert len(quoted + linked) > (2 if name in GUIDES else 0)
    # CLAUDE.md's table of rooms names a room's modules without the room.
    rooms = [ROOT / room for room in re.findall(r"^\| `([\w/]+/)` \|", text, re.MULTILINE)]
    missing = [p for p in quoted if not any((room / p).exists() for room in [ROOT, *rooms])]
    missing += [path for path in linked if not (ROOT / name).parent.joinpath(path).exists()]
    assert not missing


@pytest.mark.parametrize("name", DOCS)
def test_every_section_that_is_linked_exists(name):
    text = (ROOT / name).read_text()
    for path, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", text):
        target = (ROOT / name).parent / path if path else ROOT / name
        titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert anchor in slugs, f"{path}#{anchor}"


@pytest.mark.parametrize("name", GUIDES)
def test_every_name_of_the_code_that_is_named_exists(name):
    defined = set()
    for path in ROOT.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
    text = (ROOT / name).read_text()
    named = re.findall(r"`(?:\w+\.)*(\w+)\(?\)?`", text)
    functions = [n for n in named if re.fullmatch(r"[A-Z]\w+[a-z]\w*|[a-z]+_[a-z_]+", n)]
    known = {
        "dynamic_update_slice",
        "set_mesh",
        "huggingface_hub",
        "prompt_tokens",
        "finish_reason",
    }
    known |= {"exact_match", "strict_number", "think_format"}  # rewards, by name
    assert not set(functions) - defined - known


@pytest.mark.parametrize("name", DOCS)
def test_every_command_exists_with_its_flags(name):
    lines = "".join(code_blocks(name, "sh")).replace("\\\n", "").splitlines()
    commands = [part.split("#")[0] for line in lines for part in line.split("&&")]
    for command in filter(None, map(str.strip, commands)):
        words = shlex.split(command.split(">")[0])
        words = words[words[0] == "JAX_PLATFORMS=cpu" :]
        if words[0] in ("python", "bash", "pytest"):
            files = [w for w in words[1:] if w.endswith(".py") or w == ".ci/run"]
            assert all((ROOT / f).is_file() for f in files), command
            if files and words[0] == "python" and "/" not in files[0]:
                module, arguments = importlib.import_module(files[0].removesuffix(".py")), words[2:]
                main = getattr(module, "main", None)
                if main is None:
                    main, arguments = module.COMMANDS[words[2]], words[3:]
                cli.parse_flags(main, arguments)  # raises for a flag that the command lacks
        elif words[0] == "pip":
            assert words[:3] == ["pip", "install", "-e"]
        else:
            assert words[0] in ("black", "."), command


@pytest.mark.parametrize(
    "name",
    [
        "models.llama.generation.generate",
        "sampling.TopP",
        "utils.cross_entropy.cross_entropy",
        "utils.kvcache.KVCache",
    ],
)
def test_the_examples_in_docstrings_run(name):
    module, _, of = name.rpartition(".")
    module = importlib.import_module(module)
    found = doctest.DocTestFinder(recurse=False).find(getattr(module, of), of, module, vars(module))
    report = []
    for example in found:
        doctest.DocTestRunner().run(example, out=report.append)
    assert any(example.examples for example in found) and not report, "".join(report)


@pytest.mark.slow
def test_the_python_in_the_readme_runs(tmp_path):
    code = "\n".join(code_blocks("README.md", "python"))
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code],
        cwd=tmp_path,
        env=os.environ | compiling.environment(optimized=True),
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert "stop" in out.stdout or "length" in out.stdout
    assert (tmp_path / "exported" / "config.json").exists()
    assert (tmp_path / "trained" / "tokenizer.json").exists()


def test_the_table_of_models_has_their_sizes():
    rows = re.findall(
        r"^\| ([\w.-]+) \| ([\d.]+) B \| ([\d,]+) \|", (ROOT / "docs/scale.md").read_text(), re.M
    )
    assert len(rows) == 8
    for name, billions, context in rows:
        config = PRESETS[name]
        assert (f"{config.n_params / 1e9:.2f}", f"{config.max_seq_len:,}") == (billions, context)
