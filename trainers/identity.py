"""What makes two processes the same program on the same model: for them to compare at the start."""

import hashlib
import sys
from pathlib import Path

import jax
import jaxlib
import numpy as np

from utils.errors import ArtifactError
from utils.files import InputFile, list_folder

# Of a larger file so many blocks, evenly spread: another model differs everywhere.
_BLOCKS, _BLOCK_BYTES = 64, 1 << 20
_ROOT = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """Of the code that is loaded (a digest of its files), and of what it runs on."""
    loaded = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    ours = {
        name: path
        for name, path in loaded.items()
        if path is not None and (_ROOT / f"{name.replace('.', '/')}.py") == Path(path)
    }
    code = hashlib.sha256()
    for name in sorted(ours):
        code.update(f"{name} ".encode() + hashlib.sha256(Path(ours[name]).read_bytes()).digest())
    python = ".".join(map(str, sys.version_info[:2]))
    known = {"code": code.hexdigest()[:16], "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    return known | {"python": python}


def files_digest(path: Path) -> str:
    """Of a checkpoint's files: their names and sizes, and of each 64 MiB of its content at most.

    Raises ArtifactError if a file cannot be read.
    """
    digest = hashlib.sha256()
    names = list_folder(path) if path.is_dir() else [""]
    for name in names:
        if (path / name).is_dir():
            continue
        file = InputFile(path / name, ArtifactError)
        digest.update(f"{name} {file.size} ".encode())
        step = max(_BLOCK_BYTES, (file.size - _BLOCK_BYTES) // (_BLOCKS - 1))
        for offset in range(0, file.size, step):
            digest.update(file.read(offset, min(_BLOCK_BYTES, file.size - offset)))
    return digest.hexdigest()[:16]


def key_words(key: jax.Array) -> list[int]:
    """A random key as numbers."""
    return np.asarray(jax.random.key_data(key)).tolist()
