"""What all tests share: fixtures, and that the fast ones do not wait for XLA's optimisations."""

import os
from pathlib import Path

import pytest

from models.llama.hub import DEFAULT_MODEL, resolve
from tests import compiling


def pytest_configure(config: pytest.Config) -> None:
    """Fast tests run programs that XLA has not optimised; slow ones those that users run."""
    os.environ |= compiling.environment(optimized=config.option.markexpr != "not slow")


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's GGUF file, fetched once into the user's cache as any user gets it."""
    return resolve(DEFAULT_MODEL)
