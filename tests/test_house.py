"""The house rules that a machine can check; CLAUDE.md says what the rooms are for."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANKS = {"utils": 0, "sampling": 1, "models": 2, "generate": 3, "trainers": 4}
RANKS |= dict.fromkeys(("train", "chat", "evaluate", "plan"), 5)
LIBRARIES = ("utils", "models", "trainers", "sampling.py")
ROOMS = ("models", "trainers", "utils")
COMMANDS = {"generate.py", "chat.py", "train.py", "evaluate.py", "plan.py", "sampling.py"}

# What goes from ids to text to SFT to GRPO, in reading order (CLAUDE.md has a line for each).
CORE = """
sampling
models.llama.config utils.ops utils.attention utils.kvcache models.llama.model
models.llama.decoding models.llama.generation
utils.cross_entropy utils.sharding models.llama.lora
trainers.trainer trainers.optimizer trainers.sft_trainer trainers.grpo_trainer
trainers.rollout trainers.on_policy trainers.loop
""".split()
CORE_LINES = 5005
# Modules that the core may import beside itself; a reader needs only their names.
LEAVES = """
utils.errors utils.fields utils.kernels utils.detours utils.int8 utils.memory models.llama.layout
""".split()


def sources(*names):
    for name in names or [rank for rank in RANKS]:
        path = ROOT / name
        yield from (
            sorted(path.rglob("*.py"))
            if path.is_dir()
            else path.parent.glob(name if name.endswith(".py") else f"{name}.py")
        )


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "no relative imports"
            yield node, node.module


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way_and_modules_stay_small(path):
    text = path.read_text()
    tree = ast.parse(text)
    rank = RANKS[path.relative_to(ROOT).parts[0].removesuffix(".py")]
    for node, name in imports(tree):
        assert RANKS.get(name.split(".")[0], 0) <= rank, f"{path}:{node.lineno} imports {name}"
        flax_linen = name.startswith("flax.linen")
        assert not flax_linen or path.name == "model.py", f"{path}: flax.linen is for model.py"
    assert len(text.splitlines()) <= 400
    for node in ast.walk(tree):
        assert not isinstance(node, ast.ExceptHandler) or node.type, f"{path}: bare except"
        assert not (
            isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)
        ), f"{path}:{node.lineno}: a lambda bound to a name; def says it"
        if isinstance(node, ast.FunctionDef):
            first = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - first[0].lineno + 1 if first else 0
            assert lines <= 60, f"{path}: {node.name} has {lines} lines"
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            given = [a.arg for a in given if a.arg not in ("self", "cls")]
            assert len(given) <= 8, f"{path}: {node.name} takes {len(given)} parameters"


def test_the_root_and_the_rooms():
    assert {path.name for path in ROOT.glob("*.py")} == COMMANDS
    for room in ROOMS:
        for folder in [ROOT / room, *(p for p in (ROOT / room).rglob("*") if p.is_dir())]:
            modules = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
            assert len(modules) <= 14, f"{folder}: {sorted(modules)}"


def module_path(name):
    return ROOT / (name.replace(".", "/") + ".py")


def test_the_core_is_small_and_imports_no_edge():
    ours = {str(path.relative_to(ROOT))[:-3].replace("/", ".") for path in sources()}
    assert set(CORE) <= ours and len(CORE) <= 20
    for name in CORE:
        for node, imported in imports(ast.parse(module_path(name).read_text())):
            parts = [f"{imported}.{alias.name}" for alias in node.names]
            for part in {imported, *parts} & ours:
                assert part in CORE or part in LEAVES, f"{name} imports {part}"
    lines = sum(len(module_path(name).read_text().splitlines()) for name in CORE)
    assert lines <= CORE_LINES


def test_claude_md_names_the_core_in_reading_order():
    text = (ROOT / "CLAUDE.md").read_text()
    places = [text.find(f"`{name.replace('.', '/')}.py`") for name in CORE]
    assert min(places) > 0 and places == sorted(places)


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"


@pytest.mark.parametrize("path", list(sources(*LIBRARIES)), ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_neither_print_nor_exit_nor_read_argv(path):
    # What command lines share speaks and ends processes.
    console = path.parent == ROOT / "utils" / "console"
    ends = console or path.relative_to(ROOT).as_posix() == "utils/distributed.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and not ends:
            called = ast.unparse(node.func)
            assert called not in ("print", "exit", "sys.exit", "os._exit", "input"), f"{path}"
        if isinstance(node, ast.Attribute) and not console:
            # hub.py hands its environment on to pip.
            banned = ("sys.argv", "os.environ") if path.name != "hub.py" else ("sys.argv",)
            assert ast.unparse(node) not in banned, f"{path}:{node.lineno}"


def test_importing_has_no_side_effect_and_parsers_need_no_jax():
    light = "config formats.gguf formats.hf formats.meta hub tokenizer chat_format".split()
    code = "import sys\n" + "".join(f"import models.llama.{name}\n" for name in light)
    code += "assert 'jax' not in sys.modules and 'torch' not in sys.modules\n"
    code += "import generate, chat, evaluate, jax\n"
    code += "assert not {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)\n"
    code += "assert jax.config.jax_compilation_cache_dir is None and not jax.config.jax_enable_x64"
    env = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")
