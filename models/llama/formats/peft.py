"""LoRA adapters in PEFT's format: adapter_config.json beside adapter_model.safetensors. No JAX here.

What each setting means: `LoraConfig`, `check_target_module_exists` and `get_pattern_key` of peft 0.21.
Settings that change the model in another way than by adding b·a to matrices of its layers are refused.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.llama.formats.hf import write_json, write_tensors
from models.llama.formats.safetensors import SafetensorsFile
from models.llama.layout import MATRICES, Leaf, Sizes, TensorSource, leaves, to_neighbour_pairs
from utils.errors import ArtifactError, is_int, listed
from utils.fields import Range, field, field_problems, integer, number, one_of
from utils.files import flatten, list_folder, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Settings that say nothing of what an adapter computes: where it comes from, or how it is trained.
_IGNORED = set(
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_version lora_dropout "
    "megatron_config megatron_core runtime_config loftq_config eva_config qalora_group_size "
    "ensure_weight_tying".split()
)
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def _lists(kind: type, what: str) -> Range:
    """One value of a type, or a list of them."""
    return Range(what, lambda x: all(type(v) is kind for v in (x if isinstance(x, list) else [x])))


def _or_none(of: Range) -> Range:
    return Range(f"{of.expected}, or null", lambda x: not x and x != 0 or of.fits(x))


def _by_module(of: Range) -> Range:
    words = f"an object with {of.expected} per name of modules"
    return Range(words, lambda x: isinstance(x, dict) and all(map(of.fits, x.values())))


_RANK, _ALPHA = integer(1, 1 << 16), number(above=0, below=1e6)
_NAMES = _lists(str, "a regular expression or a list of names")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """The settings that decide what an adapter computes, with PEFT's defaults."""

    peft_type: Any = field(None, "", one_of("LORA"))
    r: Any = field(8, "", _RANK)
    lora_alpha: Any = field(8, "", _ALPHA)
    use_rslora: bool = field(False)
    target_modules: Any = field(None, "", _NAMES)
    exclude_modules: Any = field(None, "", _or_none(_NAMES))
    layers_to_transform: Any = field(None, "", _or_none(_lists(int, "numbers of layers")))
    layers_pattern: Any = field(
        None, "", _or_none(Range("layers", ("layers", ["layers"]).__contains__))
    )
    rank_pattern: Any = field(None, "", _or_none(_by_module(_RANK)))
    alpha_pattern: Any = field(None, "", _or_none(_by_module(_ALPHA)))
    # Others start from a changed base model, which the adapter does not hold.
    init_lora_weights: Any = field(
        True, "", Range("true, false, gaussian, eva or orthogonal", _INITS.__contains__)
    )
    bias: Any = field("none", "", one_of("none"))


class Adapter(NamedTuple):
    """An opened adapter for a model: its settings and headers are read and checked.

    Attributes:
        path: its folder.
        source: its tensors.
        rank: the largest of any matrix; others are filled up with zeros, which stay zeros in training:
            each half's gradient is a product with the other.
        scale: factor of b·a.
        ratios: the factor of each module over `scale`, by the module's name; adapted ones only.
        leaves: the adapted matrices of the model.
    """

    path: Path
    source: SafetensorsFile
    rank: int
    scale: float
    ratios: Mapping[str, float]
    leaves: list[Leaf]

    @property
    def files(self) -> list[Path]:
        """Its files, which decide what it computes."""
        return [self.path / CONFIG, self.path / WEIGHTS]

    @property
    def lora(self) -> dict[str, Any]:
        """The fields of its `LoRAConfig` (models/llama/lora.py)."""
        targets = tuple(leaf.path.rpartition("/")[2] for leaf in self.leaves)
        return {"rank": self.rank, "alpha": self.scale * self.rank, "targets": targets}

    def tree(self) -> dict[str, Any]:
        """Reads the tree of models/llama/lora.py, in float32. Raises ArtifactError for NaN in it."""
        layers: dict[str, dict[str, np.ndarray]] = {}
        for leaf in self.leaves:
            (out_dim, in_dim), depth = leaf.shape, len(leaf.names)
            a = np.zeros((depth, self.rank, in_dim), np.float32)
            b = np.zeros((depth, out_dim, self.rank), np.float32)
            for i, module in enumerate(map(_module, leaf.names)):
                if module in self.ratios:
                    names = _tensors(module)
                    rank, _ = self.source.shapes[names[0]]
                    a[i, :rank], b[i, :, :rank] = map(self._read, names)
                    b[i] *= self.ratios[module]
            _, part, name = leaf.path.split("/")
            layers.setdefault(part, {}).update({f"{name}_a": a, f"{name}_b": b})
        return {"layers": layers}

    def _read(self, name: str) -> np.ndarray:
        x = self.source.read(name).astype(np.float32)
        if not np.isfinite(x).all():
            raise ArtifactError(f"{self.source.description}: NaN or infinity in {name!r}")
        return x

    def added_to(self, source: TensorSource, parts: list[Leaf]) -> "AdaptedTensors":
        """The model's tensors, `parts` in whatever format, with b·a added to them."""
        arrays, updates = flatten(self.tree()), {}
        for leaf in parts:
            if f"{leaf.path}_a" in arrays:
                b = arrays[f"{leaf.path}_b"] * np.float32(self.scale)
                for i, name in enumerate(leaf.names):
                    rows = to_neighbour_pairs(b[i], leaf.heads) if leaf.heads else b[i]
                    updates[name] = arrays[f"{leaf.path}_a"][i], rows.reshape(b[i].shape)
        return AdaptedTensors(source, updates)


class AdaptedTensors:
    """A TensorSource over one, with b·a added in float32 to some of its matrices."""

    def __init__(self, source: TensorSource, updates: Mapping[str, tuple[np.ndarray, np.ndarray]]):
        """`updates`: (a [rank, in], b [out, rank]) by tensor name."""
        self._source, self._updates = source, updates
        self.description, self.shapes, self.files = source.description, source.shapes, source.files
        self.dtypes = source.dtypes | dict.fromkeys(updates, np.dtype(np.float32))

    def read(self, name: str) -> np.ndarray:
        """The tensor in a new array."""
        return self._add(name, self._source.read(name))

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[part]`."""
        if hasattr(self._source, "read_part"):
            return self._add(name, self._source.read_part(name, part), *part)
        return self.read(name)[part]

    def _add(self, name: str, x: np.ndarray, rows=slice(None), columns=slice(None)) -> np.ndarray:
        if name not in self._updates:
            return x
        a, b = self._updates[name]
        return x.astype(np.float32) + b[rows] @ a[:, columns]


def open_adapter(path: str | Path, config: Sizes) -> Adapter:
    """Opens the adapter in a folder, for a model.

    Raises:
        ArtifactError: it is none, its settings are not supported, or its tensors do not fit them or
            the model; all that is wrong of one kind is listed.
    """
    path = Path(path)
    names = list_folder(path)
    if absent := [name for name in (CONFIG, WEIGHTS) if name not in names]:
        hint = "; load it with peft and save it again" * ("adapter_model.bin" in names)
        hint = hint or f"; did you mean {path / 'adapter'}?" * (path / "adapter").is_dir()
        raise ArtifactError(f"{path} holds no adapter: it lacks {listed(absent)}{hint}")
    settings, source = _read_settings(path / CONFIG), SafetensorsFile(path / WEIGHTS)
    default = _scale(settings, settings.lora_alpha, settings.r)
    ranks, ratios, adapted = {}, {}, []
    for leaf in leaves(config, "hf"):
        modules = [m for m in map(_module, leaf.names) if leaf.path.rpartition("/")[2] in MATRICES]
        for module in filter(lambda module: _is_target(settings, module), modules):
            ranks[module] = _pattern(settings.rank_pattern, module, settings.r)
            alpha = _pattern(settings.alpha_pattern, module, settings.lora_alpha)
            ratios[module] = _scale(settings, alpha, ranks[module]) / default
        adapted += [leaf] * any(module in ranks for module in modules)
    if not ranks:
        raise ArtifactError(
            f"{path / CONFIG}: target_modules={settings.target_modules!r:.80} names no matrix of a "
            "layer of this model"
        )
    _check_tensors(source, settings, ranks, adapted)
    return Adapter(path, source, max(ranks.values()), default, ratios, adapted)


def write_adapter(
    folder: Path, config: Sizes, tree: Mapping[str, Any], rank: int, alpha: float, base: str
) -> None:
    """Writes an adapter's two files.

    Args:
        folder: theirs.
        config: the model's.
        tree: as models/llama/lora.py has it.
        rank, alpha: of all matrices.
        base: the model's name, for base_model_name_or_path.
    """
    arrays, tensors, targets = flatten(tree), {}, []
    for leaf in leaves(config, "hf"):
        if f"{leaf.path}_a" in arrays:
            modules = [_module(name) for name in leaf.names]
            targets.append(modules[0].rpartition(".")[2])
            halves = (np.asarray(arrays[f"{leaf.path}_{half}"]) for half in "ab")
            for module, *pair in zip(modules, *halves):
                tensors |= zip(_tensors(module), pair)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / CONFIG, settings)
    write_tensors(folder / WEIGHTS, tensors)


def _module(name: str) -> str:
    """The module of a model's tensor."""
    return name.removesuffix(".weight")


def _tensors(module: str) -> tuple[str, str]:
    """The names of a module's a and b."""
    return tuple(f"base_model.model.{module}.lora_{half}.weight" for half in "AB")


def _read_settings(path: Path) -> _Settings:
    given = read_json(path, error=ArtifactError)
    known = {f.name for f in dataclasses.fields(_Settings)}
    settings = _Settings(**{name: value for name, value in given.items() if name in known})
    problems = field_problems(settings) + [
        f"{name}={value!r:.60} is not supported"
        for name, value in given.items()
        if value and name not in known | _IGNORED
    ]
    if not problems:
        given = settings.target_modules, settings.exclude_modules
        patterns = [names for names in given if isinstance(names, str)]
        patterns += [*(settings.rank_pattern or ()), *(settings.alpha_pattern or ())]
        problems = [text for pattern in patterns for text in _bad_regex(pattern)]
    if problems:
        raise ArtifactError(f"{path}: {'; '.join(problems)}")
    return settings


def _bad_regex(pattern: str) -> list[str]:
    """Problems of a regular expression; one that may take for ever on a module's name is refused."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        return [f"{pattern!r:.80} is not a regular expression ({e})"]
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 6:
        return [
            f"{pattern!r:.80} repeats groups, or more than six times: name the modules in a list"
        ]
    return []


def _is_target(settings: _Settings, module: str) -> bool:
    if settings.exclude_modules and _names(settings.exclude_modules, module):
        return False
    targets, layers = settings.target_modules, settings.layers_to_transform
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return True
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return _names(targets, module)
    numbers = [layers] if is_int(layers) else layers
    return _names(targets, module) and int(module.split(".")[2]) in numbers


def _names(names: str | list[str], module: str) -> bool:
    """Whether a regular expression, or a list of names or of their last parts, has a module."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _pattern(values: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that matches a module's name or the end of it."""
    found = (key for key in values or () if re.match(rf"(.*\.)?({key})$", module))
    key = next(found, None)
    return default if key is None else values[key]


def _scale(settings: _Settings, alpha: float, rank: int) -> float:
    return alpha / (rank**0.5 if settings.use_rslora else rank)


def _check_tensors(
    source: SafetensorsFile, settings: _Settings, ranks: Mapping[str, int], adapted: list[Leaf]
) -> None:
    """Compares the file with its settings and the model, and reports all at once."""
    expected = {}
    for leaf in adapted:
        for module in filter(ranks.__contains__, map(_module, leaf.names)):
            a, b = _tensors(module)
            out_dim, in_dim = leaf.shape
            expected |= {a: (ranks[module], in_dim), b: (out_dim, ranks[module])}
    missing = [name for name in expected if name not in source.shapes]
    extra = [name for name in source.shapes if name not in expected]
    wrong = [
        f"{name!r} is {list(source.shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if source.shapes.get(name, shape) != shape
    ]
    problems = [f"{len(missing)} missing: {listed(missing, 4)}"] if missing else []
    problems += [f"{len(extra)} unexpected: {listed(extra, 4)}"] if extra else []
    problems += [f"{len(wrong)} misshapen: {', '.join(wrong[:4])}"] if wrong else []
    if problems:
        raise ArtifactError(
            f"{source.description} does not fit {CONFIG} (r={settings.r}) and the model: "
            + "; ".join(problems)
        )
