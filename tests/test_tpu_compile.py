"""Attention compiled for a TPU, on a machine without one (libtpu from PyPI has the compiler)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from utils import sharding
from utils.attention import attend

T, HEADS, KV_HEADS, H, P, G = 1536, 4, 2, int(sys.argv[1]), 768, 2
devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
rows, values = PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp"), None, "tensor")
bits = jnp.bfloat16


def compiled(masks):
    def loss(q, k, v, masks):
        return jnp.sum(attend(q, k, v, masks, None)[0].astype(jnp.float32) ** 2)

    shape = lambda n, dtype, spec: jax.ShapeDtypeStruct(n, dtype, sharding=NamedSharding(mesh, spec))
    heads = [shape((4, T, n, H), bits, values) for n in (HEADS, KV_HEADS, KV_HEADS)]
    masks = jax.tree.map(lambda x: shape((4, *x.shape[1:]), x.dtype, rows), masks)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*heads, masks).compile().as_text()


mesh = sharding.make_mesh("fsdp=2,tensor=2", devices)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    C = (T - P) // G
    branches = (jnp.zeros((4, P), bool), jnp.zeros((4, G, C), bool))
    packed = {"segment_ids_BT": jnp.zeros((4, T), jnp.int32)}
    for masks, calls in ((packed, 3), ({"branches": branches}, 6)):
        text = compiled(masks)
        assert text.count('custom_call_target="tpu_custom_call"') == calls, text
        shapes = re.findall(r"\\b(?:f32|bf16|pred|s32)\\[([\\d,]+)\\]", text)
        # Heads, lanes and copies over sublanes are 128 at most: two longer axes are scores.
        scores = {x for x in shapes if min([0, 0, *map(int, x.split(","))][-2:]) > 128}
        assert not scores, scores
        for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert name not in text, name
"""


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_training_on_a_mesh_runs_the_kernel_and_has_no_score_matrix(head_dim):
    # The first two variables let a machine without a TPU compile, beside others that do.
    env = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CODE, str(head_dim)]
    root = Path(__file__).parents[1]
    out = subprocess.run(
        command, cwd=root, env=os.environ | env, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr[-4000:]
