"""Opens a model for a command line: weights, tokenizer and mesh."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from models.llama.hub import DEFAULT_MODEL, resolve
from models.llama.load import load_checkpoint, load_config
from models.llama.model import LLaMa, Params
from models.llama.tokenizer import Tokenizer, check_against_model, load_tokenizer
from utils import cli
from utils.errors import ConfigError
from utils.fields import Config, field, one_of
from utils.sharding import default_mesh, make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags(Config):
    """A checkpoint, and how devices hold it."""

    ckpt_dir: str = field(
        DEFAULT_MODEL,
        "a checkpoint folder, a .gguf file, a Hugging Face id, or the default model's name",
    )
    tokenizer_path: str | None = field(
        None, "a tokenizer file or folder; default: the checkpoint's own"
    )
    dtype: str = field(
        "auto",
        "dtype of activations; auto: float32 on a CPU, bfloat16 elsewhere",
        one_of("auto", "float32", "bfloat16"),
    )
    mesh: str | None = field(
        None,
        'how devices share the model, as "data=2,fsdp=4"; default: over all devices, as it fits',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingModelFlags(ModelFlags):
    """The same for programs that only generate, with how strictly the weights are read."""

    dtype: str = field(
        "auto",
        "dtype of the weights; auto: float32 on a CPU, bfloat16 elsewhere",
        one_of("auto", "float32", "bfloat16", "float16"),
    )
    allow_extra: bool = field(
        False, "ignore tensors of the checkpoint that the model does not have"
    )
    check_finite: bool = field(False, "refuse weights with NaN or infinity, instead of a warning")
    tie: bool | None = field(
        None,
        "use the embedding as output head, whatever the file says; --notie: the file's own head",
    )


class Model(NamedTuple):
    """What a command line works with; `params` has the layout for decoding."""

    llama: LLaMa
    params: Params
    tokenizer: Tokenizer

    @property
    def vocab_limit(self) -> int:
        """Ids from here on are rows of the embedding without a token."""
        return min(self.tokenizer.vocab_size, self.llama.config.vocab_size)


def _auto(dtype: str) -> str:
    """What `--dtype auto` stands for; another dtype as it is."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def compute_dtype(dtype: str) -> Any:
    """The dtype of a `--dtype` flag: float32, bfloat16, or auto: float32 on a CPU, else bfloat16."""
    dtype = _auto(dtype)
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype!r:.40}, expected float32, bfloat16 or auto")
    return jax.numpy.dtype(dtype)


def load_model(
    ckpt_dir: str = DEFAULT_MODEL,
    tokenizer_path: str | None = None,
    dtype: str = "auto",
    mesh: str | None = None,
    **options: Any,
) -> Model:
    """Loads weights and tokenizer, with a progress bar on stderr.

    Args:
        ckpt_dir: see `load_checkpoint`.
        tokenizer_path: a tokenizer file or folder; default: the checkpoint's own.
        dtype: float32, bfloat16, float16, or auto: float32 on a CPU, bfloat16 elsewhere.
        mesh: see `use_mesh`.
        options: allow_extra, check_finite and tie of `load_checkpoint`.
    """
    dtype = _auto(dtype)
    with cli.progress() as report:
        path = resolve(ckpt_dir, report)
        tokenizer = load_tokenizer(tokenizer_path or path)
        use_mesh(mesh, path)
        config, params = load_checkpoint(
            path, dtype=dtype, decoding=True, progress=report, **options
        )
    check_against_model(tokenizer, config.vocab_size)
    return Model(LLaMa(config), params, tokenizer)


def use_mesh(spec: str | None, path: Path) -> None:
    """Shares the model at a path by all devices from here on, see `utils.sharding.make_mesh`."""
    if jax.device_count() == 1 and spec is None:
        return
    if spec is None:
        spec = default_mesh(load_config(path), jax.device_count())
    mesh = make_mesh(spec)
    cli.say(f"mesh: {', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}", "")
    jax.set_mesh(mesh)
