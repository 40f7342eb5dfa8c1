"""What all tests share: fixtures, and that the fast ones do not wait for XLA's optimisations."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.llama.hub import DEFAULT_MODEL, resolve
from tests import compiling

# Files of tests by their seconds, fast or slow ones, the longest first.
LONGEST = """
mesh train_default tpu_compile wrong_forms numerics distributed examples grpo_cli benchmarks
default_model generate chat train_cli on_policy resume gguf load cli tasks evaluate_task model
""".split()
# Files whose slow tests are about what a run does, whatever its tiny programs are compiled to.
PLAIN = """
on_policy resume branches adapters dpo_trainer distill_trainer distill_learns evaluate_task chat int8
lm_eval train_invariance gguf relatives
""".split()


def pytest_configure(config: pytest.Config) -> None:
    """Fast tests run programs that XLA has not optimised; slow ones those that users run."""
    os.environ |= compiling.environment(optimized=_optimized(config))


def _optimized(config: pytest.Config) -> bool:
    return config.option.markexpr != "not slow"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that no process is left alone with one at the end."""
    rank = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """All is imported now."""
    compiling.collect_seldom()


@pytest.fixture(scope="module", autouse=True)
def compiled_in_haste(request: pytest.FixtureRequest) -> Iterator[None]:
    """XLA optimises nothing in a file of PLAIN: its slow tests compile in a third of the time."""
    import jax  # here: it reads the environment that pytest_configure makes

    optimized = _optimized(request.config)
    hasty = optimized and request.path.stem.removeprefix("test_") in PLAIN
    jax.config.update("jax_disable_most_optimizations", hasty or not optimized)
    with compiling.without_emitters() if hasty else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's GGUF file, fetched once into the user's cache as any user gets it."""
    return resolve(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A starter of programs for all tests of this process: it takes seconds to import JAX."""
    from tests.programs import Programs  # here, as above

    with contextlib.closing(Programs(tmp_path_factory.mktemp("programs"))) as started:
        yield started
