"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from models.llama.hub import DEFAULT_MODEL, resolve


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's GGUF file, fetched once into the user's cache as any user gets it."""
    return resolve(DEFAULT_MODEL)
