"""From one device to a mesh of many: which axis of an array is sharded over which axis of the mesh.

The mesh is JAX's context mesh: code under `jax.set_mesh(make_mesh(...))` is sharded, and the same code
without a mesh runs on a single device. XLA (GSPMD) inserts the collectives; kernels and the KV cache,
whose layout is local, run under `shard_map` (`per_device`).

Mesh axes: `data` has copies of the model, `fsdp` has parts of the parameters and of the batch,
`context` has parts of the parameters and of each row's tokens, `tensor` has parts of each layer's heads,
features and vocabulary.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from utils.errors import ConfigError, raise_all

Array = jax.Array
Axes = tuple[str | None, ...]

MESH_AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Mesh axes over which each logical axis is sharded; () is none.

    Attributes:
        batch: rows.
        tokens: tokens of a row.
        embed: the model dimension, of parameters only.
        heads, kv_heads: heads of queries; heads of keys and values.
        ffn: features of the feed-forward layer.
        vocab: rows of the embedding and of the output head.
    """

    batch: tuple[str, ...]
    tokens: tuple[str, ...]
    embed: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    ffn: tuple[str, ...]
    vocab: tuple[str, ...]

    def __post_init__(self):
        raise_all(
            "ShardingRules",
            [
                f"{field.name}={axes!r}, expected a tuple of {', '.join(MESH_AXES)}, each once"
                for field in dataclasses.fields(self)
                if not isinstance(axes := getattr(self, field.name), tuple)
                or not set(axes) <= set(MESH_AXES)
                or len(set(axes)) < len(axes)
            ],
        )

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """Mesh axes that shard a logical axis; () for None."""
        return () if logical is None else getattr(self, logical)

    def spec(self, axes: Axes) -> PartitionSpec:
        """PartitionSpec of an array with these logical axes."""
        return PartitionSpec(*(self.mesh_axes(axis) or None for axis in axes))


# Training gathers a layer's parameters over fsdp when it is that layer's turn (ZeRO, 1910.02054).
TRAINING = ShardingRules(
    batch=("data", "fsdp"),
    tokens=("context",),
    embed=("fsdp", "context"),
    heads=("tensor",),
    kv_heads=("tensor",),
    ffn=("tensor",),
    vocab=("tensor",),
)
# Attention in training: each device has all tokens of a row and some of its heads (DeepSpeed Ulysses,
# 2309.14509).
MEETING = dataclasses.replace(
    TRAINING, tokens=(), heads=("tensor", "context"), kv_heads=("tensor", "context")
)
# A decode step has few activations and all the parameters: the parameters stay where they are.
_STAY = ("tensor", "fsdp", "context")
DECODING = ShardingRules(
    batch=("data",), tokens=(), embed=(), heads=_STAY, kv_heads=_STAY, ffn=_STAY, vocab=_STAY
)
# Attention in decoding where fsdp · context · tensor has more parts than the model has kv heads: by
# rows, so that no two devices hold the same keys and values.
BY_ROWS = dataclasses.replace(
    DECODING, batch=("data", "fsdp", "context"), heads=("tensor",), kv_heads=("tensor",)
)

# The embedding in training: each device looks up its columns for all tokens of its group, so that no
# device needs the whole table, nor its gradient.
LOOKUP = dataclasses.replace(TRAINING, batch=("data",), tokens=())
# Then it sends them on, one axis at a time: XLA would gather everything if two axes changed at once.
LOOKED_UP = dataclasses.replace(LOOKUP, tokens=("context",), embed=("fsdp",))


def make_mesh(spec: str | Mapping[str, int] | None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, including those of other processes.

    Args:
        spec: "data=2,fsdp=4" or a dict; missing axes have size 1, and one axis may be -1: all remaining
            devices. None: all on `fsdp`.
        devices: default: jax.devices().

    Raises:
        ConfigError: an unknown axis, or sizes for another number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(spec, len(devices))
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    # A side of a pod's grid may be split: 128 of 8 x 8 x 8 chips are 8 x 8 x 2.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(spec: str | Mapping[str, int] | None, n_devices: int) -> dict[str, int]:
    """The size of every axis of `make_mesh`, with the same errors."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    sizes |= _parse(spec) if isinstance(spec, str) else dict(spec or {"fsdp": -1})
    text = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    if unknown := set(sizes) - set(MESH_AXES):
        known = ", ".join(MESH_AXES)
        raise ConfigError(f"--mesh {text}: no axis {sorted(unknown)[0]!r}; axes are {known}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"--mesh {text}: expected sizes from 1, and -1 for one axis at most")
    if open_axes and n_devices % given == 0:
        sizes[open_axes[0]] = n_devices // given
    if math.prod(sizes.values()) != n_devices:
        raise ConfigError(
            f"--mesh {text} is for {given} devices{' or a multiple' if open_axes else ''}, and "
            f"there are {n_devices}; their product must be that"
        )
    return sizes


class ModelSizes(Protocol):
    """The fields of a ModelConfig that say how it can be shared."""

    vocab_size: int
    dim: int
    matrix_shapes: Mapping[str, tuple[int, int]]


def default_mesh(model: ModelSizes, n_devices: int) -> dict[str, int]:
    """The largest `fsdp` that divides all of a model's matrices, the rest on `data`.

    Each device keeps 128 numbers of the model dimension, a TPU's register: with fewer, XLA sums whole
    gradients and then slices them, which sends twice the bytes of a reduce-scatter.
    """
    sizes = {model.vocab_size, *(size for shape in model.matrix_shapes.values() for size in shape)}
    most = math.gcd(n_devices, *sizes)
    fsdp = max(n for n in range(1, most + 1) if most % n == 0 and (n == 1 or model.dim // n >= 128))
    return {"data": n_devices // fsdp, "fsdp": fsdp}


def check_rows(**rows: int | None) -> None:
    """Raises ConfigError, with the given names, if the mesh cannot share a training step's rows."""
    raise_all("rows", _not_shared(TRAINING.batch, rows))


def check_tokens(n_heads: int, **tokens: int) -> None:
    """The same for the tokens of a row, and for the heads, on a mesh that shares a row's tokens."""
    if axis_size(TRAINING.tokens) > 1:
        heads = _not_shared(MEETING.heads, {"n_heads": n_heads}, "a --mesh that divides them")
        raise_all("tokens of a row", _not_shared(TRAINING.tokens, tokens) + heads)


def _not_shared(
    axes: Sequence[str], sizes: Mapping[str, int | None], use: str | None = None
) -> list[str]:
    parts, over = axis_size(axes), " x ".join(f"{axis}={axis_size([axis])}" for axis in axes)
    return [
        f"{name}={n} cannot be shared by {over} devices; use {use or f'a multiple of {parts}'}"
        for name, n in sizes.items()
        if n is not None and n % parts
    ]


def whole_rounds(rows: int | None) -> int | None:
    """Rows of a training step, rounded up to a multiple of the devices that share them; None stays."""
    parts = axis_size(TRAINING.batch)
    return rows and -(-rows // parts) * parts


def _parse(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d{1,9})\s*", part)
        if match is None or match[1] in sizes:
            raise ConfigError(f"--mesh {text!r:.60}, expected for example data=2,fsdp=4,tensor=2")
        sizes[match[1]] = int(match[2])
    return sizes


def current_mesh() -> Any:
    """The mesh of the trace; None without a mesh, on one device, or inside `per_device`.

    Raises:
        ConfigError: its axes are explicit, jax.make_mesh's default: nothing would be sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(mesh.axis_names) <= set(MESH_AXES):
        return None
    if AxisType.Explicit in mesh.axis_types:
        raise ConfigError(
            "the mesh has explicit axes, expected AxisType.Auto; make it with "
            "utils.sharding.make_mesh, or pass axis_types to jax.make_mesh"
        )
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def axis_size(axes: Sequence[str]) -> int:
    """Devices along these mesh axes; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


def fitting(axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The mesh axes, or () if they do not divide a dimension of that size, which then is not sharded."""
    return axes if size % axis_size(axes) == 0 else ()


def constrain(x: Array, rules: ShardingRules, *axes: str | None) -> Array:
    """Tells XLA how to shard x; a dimension that its mesh axes do not divide is not sharded."""
    if current_mesh() is None:
        return x
    names = (fitting(rules.mesh_axes(axis), size) or None for axis, size in zip(axes, x.shape))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*names))


def share_rows(x: Array) -> Array:
    """Tells XLA to shard the rows of x over as many mesh axes as divide them, and nothing else."""
    if current_mesh() is None:
        return x
    groups = (MESH_AXES[:n] for n in range(len(MESH_AXES), -1, -1))
    axes = next(axes for axes in groups if len(x) % axis_size(axes) == 0)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes or None))


def per_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """The function, run on each device's own part of its arguments; as it is without a mesh."""
    if current_mesh() is None:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def param_specs(
    params: Any,
    table: Mapping[str, Axes],
    rules: ShardingRules,
    mesh: Any = None,
    *,
    all_rows: bool = True,
) -> Any:
    """A PartitionSpec for every parameter.

    Args:
        params: a tree of arrays or of shapes.
        table: logical axes by a regex that matches the whole path, "layers/attn/wq".
        rules: logical to mesh axes.
        mesh: default: the context mesh; without one, nothing is sharded and the table not read.
        all_rows: whether a row of the table without a parameter is an error.

    Raises:
        ConfigError: no row or two for a parameter, an unused row, a wrong rank, a mesh axis twice in
            one parameter, a size that its mesh axes do not divide; all of them at once.
    """
    mesh = current_mesh() if mesh is None else mesh
    if mesh is None:
        return jax.tree.map(lambda _: PartitionSpec(), params)
    problems, used = [], set()

    def spec(path, leaf) -> PartitionSpec:
        # Values and scales of an Int8 lie where the matrix does.
        part = path[-1].name if isinstance(path[-1], GetAttrKey) else None
        name, shape = path_name(path[:-1] if part else path), tuple(leaf.shape)
        rows = [row for row in table if re.fullmatch(row, name)]
        used.update(rows)
        if len(rows) != 1:
            found = f"rows {rows}" if rows else "no row"
            problems.append(f"{name} {list(shape)} matches {found} of the table, expected one")
            return PartitionSpec()
        axes = table[rows[0]][:-1] if part == "scales" else table[rows[0]]
        if len(axes) != len(shape):
            problems.append(f"{name} has shape {list(shape)}, its row {rows[0]!r} axes {axes}")
            return PartitionSpec()
        problems.extend(_problems(name, shape, axes, rules, mesh))
        return rules.spec(axes)

    specs = jax.tree_util.tree_map_with_path(spec, params)
    if all_rows:
        problems += [f"no parameter matches row {row!r}" for row in table if row not in used]
    raise_all("sharding", problems)
    return specs


def _problems(name: str, shape: tuple[int, ...], axes: Axes, rules: ShardingRules, mesh: Any):
    mesh_axes = [rules.mesh_axes(axis) for axis in axes]
    flat = [axis for group in mesh_axes for axis in group]
    for axis in sorted({axis for axis in flat if flat.count(axis) > 1}):
        yield f"{name} {list(shape)} has mesh axis {axis!r} twice: {axes}"
    for size, logical, group in zip(shape, axes, mesh_axes):
        parts = math.prod(mesh.shape[axis] for axis in group)
        if size % parts:
            over = " x ".join(
                f"{axis}={mesh.shape[axis]}" for axis in group if mesh.shape[axis] > 1
            )
            yield f"{name} {list(shape)}: {logical} has size {size}, not a multiple of {over}"


def path_name(path: Sequence[Any]) -> str:
    """A leaf's path in a tree as "layers/attn/wq"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def state_specs(state: Any, params: Any, specs: Any) -> Any:
    """Specs of an optimizer's state: an array with a parameter's name and shape has its spec."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    known = {
        path_name(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(flat, jax.tree.leaves(specs), strict=True)
    }

    def spec(path, leaf):
        names = path_name(path).split("/")
        for start in range(len(names)):
            shape, found = known.get("/".join(names[start:]), (None, None))
            if shape == leaf.shape:
                return found
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, state)


def constrain_tree(tree: Any, specs: Any) -> Any:
    """Tells XLA how to shard each array of a tree; as it is without a mesh."""
    if current_mesh() is None:
        return tree
    return jax.tree.map(lambda spec, x: jax.lax.with_sharding_constraint(x, spec), specs, tree)


def replicate(tree: Any) -> Any:
    """Each array of a tree whole on every device; as it is without a mesh."""
    return constrain_tree(tree, jax.tree.map(lambda _: PartitionSpec(), tree))


def place(tree: Any, specs: Any) -> Any:
    """Puts each array where its spec says, on the context mesh; as it is without a mesh.

    Each process takes its own devices' parts of a numpy array.
    """
    if current_mesh() is None or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
        return constrain_tree(tree, specs)
    mesh = jax.sharding.get_mesh()

    def put(spec: PartitionSpec, x: Any) -> Array:
        sharding = NamedSharding(mesh, spec)
        if isinstance(x, np.ndarray):
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
        return jax.device_put(x, sharding)

    return jax.tree.map(put, specs, tree)


def place_batch(batch: Any) -> Any:
    """Shards the rows of a batch of numpy arrays; as it is without a mesh, and where they do not fit."""
    if current_mesh() is None:
        return batch
    rows = jax.tree.map(lambda x: PartitionSpec(fitting(TRAINING.batch, len(x))), batch)
    return place(batch, rows)


def shapes_on(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """ShapeDtypeStructs of a tree's arrays, sharded on a mesh."""

    def shape(spec: PartitionSpec, x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(shape, specs, tree)
