"""Whether the copies of a parameter, on several devices, are still the same."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from utils.errors import TrainError
from utils.sharding import MESH_AXES, current_mesh, path_name

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def check_replicas(tree: Any, specs: Any) -> None:
    """Compares a checksum of each array's bits between the devices that hold the same part of it.

    Args:
        tree: arrays on the context mesh; without one nothing is to be compared.
        specs: the PartitionSpec of each, as in `Trainer.specs`.

    Raises:
        TrainError: two copies differ; the array and the process of the odd one are named.
    """
    if current_mesh() is None:
        return
    mesh = jax.sharding.get_mesh()
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    flat = tuple(structure.flatten_up_to(specs))
    sums = np.asarray(_checksums(tuple(x for _, x in leaves), flat))
    for (path, _), spec, of_leaf in zip(
        leaves, flat, sums.reshape(len(leaves), *mesh.devices.shape)
    ):
        shared = {axis for axes in spec if axes for axis in np.atleast_1d(axes)}
        first = of_leaf
        for i, axis in enumerate(MESH_AXES):
            if axis not in shared:
                first = first.take([0], axis=i)
        if (of_leaf != first).any():
            place = tuple(np.argwhere(of_leaf != first)[0])
            device = mesh.devices[place]
            raise TrainError(
                f"{path_name(path)} is not the same on all devices that hold a copy of it: device "
                f"{device.id} of process {device.process_index} has another one; go on from the "
                "last checkpoint, without that machine if it happens again"
            )


@functools.partial(jax.jit, static_argnums=1)
def _checksums(arrays: tuple, specs: tuple) -> jax.Array:
    """[arrays, devices] uint32."""

    def local(*parts: jax.Array) -> jax.Array:
        return jnp.stack([_checksum(part) for part in parts])[:, None]

    everywhere = PartitionSpec(None, MESH_AXES)
    sums = jax.shard_map(local, in_specs=specs, out_specs=everywhere, check_vma=False)(*arrays)
    return jax.lax.with_sharding_constraint(sums, PartitionSpec())


def _checksum(x: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).reshape(-1)
    # Odd factors: a change of one word always changes the sum, and so does an exchange of two.
    factors = 2 * jnp.arange(len(words), dtype=jnp.uint32) + 1
    return jnp.sum(words.astype(jnp.uint32) * factors, dtype=jnp.uint32)
