"""Checkpoints that go from mesh to mesh; a script, since JAX counts devices once a process.

python -m tests.mesh_checkpoints FOLDER SAVE_AS MESH [RESTORE_FROM …]: restores each of the checkpoints on
the mesh, compares every bit, and saves its own. Then, on copies of parameters that differ: E8.
"""

import re
import sys
from pathlib import Path

import jax
import numpy as np

from tests import small_runs
from trainers.runs.checkpoint import Checkpointer
from utils import sharding
from utils.errors import TrainError
from utils.distributed import check_replicas


def state_on(mesh):
    """A state with numbers that depend on nothing but their place, and its specs."""
    trainer = small_runs.trainer()
    like = jax.eval_shape(lambda: small_runs.start(trainer)[0])
    specs = trainer.specs(like)
    shapes = sharding.shapes_on(mesh, like, specs) if sharding.current_mesh() else like
    rng = np.random.default_rng(0)

    def fill(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(7)
        return np.asarray(rng.normal(size=x.shape) * 9, x.dtype)

    plain = jax.tree.map(fill, like)
    return plain, sharding.place(plain, specs), shapes, specs


def main(folder: str, name: str, mesh: str, *others: str) -> None:
    """See above."""
    made = sharding.make_mesh(mesh)
    jax.set_mesh(made)
    plain, state, shapes, specs = state_on(made)
    for other in others:
        with Checkpointer(Path(folder, other)) as saved:
            got = saved.restore(shapes).state
        assert small_runs.digest(got) == small_runs.digest(plain), (other, mesh)
        if made.size > 1:
            assert got.params["embed"].sharding == state.params["embed"].sharding
    with Checkpointer(Path(folder, name)) as saving:
        saving.save(1, state, {})
    if made.shape["data"] > 1:
        differ(made, state.params, specs.params)
    print("fine", flush=True)


def differ(mesh, params, specs) -> None:
    """A copy of one leaf with one bit less, on one device, is found."""
    check_replicas(params, specs)
    leaf = params["layers"]["mlp"]["w_up"]
    parts = [np.array(shard.data) for shard in leaf.addressable_shards]
    parts[-1].view(np.uint32).reshape(-1)[3] ^= 1
    devices = [shard.device for shard in leaf.addressable_shards]
    bad = jax.make_array_from_single_device_arrays(
        leaf.shape, leaf.sharding, [jax.device_put(x, d) for x, d in zip(parts, devices)]
    )
    mlp = params["layers"]["mlp"] | {"w_up": bad}
    params = params | {"layers": params["layers"] | {"mlp": mlp}}
    try:
        check_replicas(params, specs)
    except TrainError as e:
        text = f"layers/mlp/w_up is not the same .* device {devices[-1].id} of process 0"
        assert re.search(text, str(e)), e
    else:
        raise AssertionError("nothing was found")


if __name__ == "__main__":
    main(*sys.argv[1:])
