"""Real steps compiled for TPUs, on a machine without one (libtpu from PyPI has the compiler)."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.llama.formats import hf
from models.llama.presets import PRESETS
from tests import cli

ATTENTION = """
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


def run(code, *arguments):
    """What a program prints that compiles for TPUs."""
    # The first two let a machine without a TPU compile, beside others that do.
    env = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert out.returncode == 0, out.stderr[-4000:]
    return out.stdout


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_training_on_a_mesh_runs_the_kernel_and_has_no_score_matrix(head_dim):
    run(ATTENTION, str(head_dim))


STEPS = """
import dataclasses
import json
import sys

import plan
from trainers.planning import job as planning
from trainers.planning.hlo_text import parse
from utils import fields

texts, analyse = [], planning.analyse
planning.analyse = lambda text, *rest: texts.append(text) or analyse(text, *rest)
try:
    plan.main(**fields.build(plan.main, json.loads(sys.argv[1]) | {"json": True}))
finally:
    for text in texts:
        arrays = {
            array.dims
            for computation in parse(text)[1].values()
            for instruction in computation.values()
            for array in instruction.arrays
        }
        print(json.dumps(sorted(arrays)))
"""


def compiled(**flags):
    """(what plan.py finds, the dims of all arrays of each program)."""
    found, *arrays = map(json.loads, run(STEPS, json.dumps(flags)).splitlines())
    assert found["compiled"] and found["fits"], found
    return found, arrays


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, topology, batch, seq, budget, added_up",
    [
        # The budget is half of google-tunix's 5.73 GiB. Gradients go around a ring of four beside the
        # products, which takes one and a half times as much as a reduce-scatter.
        ("llama-3.2-1b", "v5e:2x2", 4, 4096, 2.865, 1.5),
        ("llama-3.1-8b", "v5e:8x8", 64, 2048, 2.8, 1),
    ],
)
def test_a_training_step(model, topology, batch, seq, budget, added_up):
    config, bits = PRESETS[model], {"param_dtype": "bfloat16", "state_dtype": "bfloat16"}
    shape = {"model": model, "topology": topology, "batch": batch, "seq": seq, "remat": "block"}
    found, [arrays] = compiled(**shape, **bits)
    assert found["temp_bytes"] <= found["reserved_bytes"] <= budget * 2**30
    flags = [f"--{name}={value}" for name, value in (shape | bits).items()]
    estimate = json.loads(cli.inside("plan.py", "--estimate", "--json", *flags).stdout)
    for key, rel in dict(argument_bytes=0.005, flops=0.005, temp_bytes=0.1, peak_bytes=0.1).items():
        assert estimate[key] == pytest.approx(found[key], rel=rel), key
    # The sharded state is given, and no device has more than its part of it.
    parts, devices = found["mesh"]["fsdp"], math.prod(found["mesh"].values())
    assert found["argument_bytes"] == pytest.approx(config.n_params * 8 / parts, rel=0.01)

    square = [dims for dims in arrays if dims.count(seq) > 1 and seq != config.dim]
    assert not square, f"scores of all queries and keys: {square}"
    logits = [
        dims
        for dims in arrays
        if {config.vocab_size, config.vocab_size // parts} & set(dims) and config.dim not in dims
        if math.prod(dims) > batch * seq * config.vocab_size // (2 * devices)
    ]
    assert not logits, f"logits of all tokens: {logits}"

    # A layer's matrices are gathered once in each direction, in bfloat16, and their gradients added
    # up once, in float32; a tenth more is for tokens, hidden states and the embedding.
    sent = found["programs"][0]["collectives"]
    matrices = config.n_layers * sum(a * b for a, b in config.matrix_shapes.values())
    least = (1 - 1 / parts) * matrices * (2 * 2 + 4 * added_up)
    copies = 2 * (1 - 1 / found["mesh"]["data"]) * 4 * config.n_params / parts
    assert sent.pop("all-reduce") <= 1.1 * copies + 1e6
    assert 0.95 * least <= sum(sent.values()) <= 1.1 * least


@pytest.mark.slow
def test_rows_of_32k_tokens_that_no_device_holds():
    config = PRESETS["llama-3.1-8b"]
    mesh, shape = "fsdp=4,context=8", dict(batch=4, seq=32768, remat="block")
    bits = dict(param_dtype="bfloat16", state_dtype="bfloat16")
    flags = dict(model="llama-3.1-8b", topology="v5e:4x8", mesh=mesh)
    found, [arrays] = compiled(**flags, **shape, **bits)
    assert found["temp_bytes"] <= 3.2e9
    whole = [dims for dims in arrays if 32768 in dims and {4096, 14336} & set(dims)]
    assert not whole, f"hidden states of all of a row's tokens: {whole}"
    # Beside the parameters, queries, keys, values and results go to where a row meets and back:
    # forward, again, and backward.
    sent = found["programs"][0]["collectives"]
    numbers = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim * config.n_layers
    meeting = 3 * 7 / 8 * 2 * numbers * 32768 / 8
    assert meeting <= sent["all-to-all"] <= 1.05 * meeting
    matrices = config.n_layers * sum(a * b for a, b in config.matrix_shapes.values())
    assert sum(sent.values()) - meeting <= 1.15 * 31 / 32 * matrices * (2 * 2 + 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, n_layers, topology",
    # Heads of 128, where some layers tell as much as 32; and heads of 64.
    [("llama-3.1-8b", 4, "v5e:2x4"), ("llama-3.2-1b", 16, "v5e:2x2")],
)
def test_a_decode_step_moves_the_weights_and_the_cache_once(tmp_path, model, n_layers, topology):
    config = dataclasses.replace(PRESETS[model], n_layers=n_layers)
    (tmp_path / "config.json").write_text(json.dumps(hf.from_config(config)))
    flags = dict(model=str(tmp_path), topology=topology, job="generate", batch=32, seq=4096)
    found, _ = compiled(**flags, prompt_len=128)
    decode = found["programs"][-1]
    held = decode["parts"]["parameters"] + decode["parts"]["KV cache"]
    assert held == pytest.approx(found["argument_bytes"], rel=0.01)
    assert 0.95 * held <= decode["bytes_accessed"] <= 1.15 * held


@pytest.mark.slow
def test_a_mesh_may_split_the_sides_of_a_pods_grid():
    code = """
from trainers.planning.chips import parse_topology
from utils.sharding import make_mesh
devices = parse_topology("v5p:8x8x8").tpu_devices()
print(dict(make_mesh("data=4,fsdp=128", devices).shape))
"""
    assert run(code).splitlines()[-1] == "{'data': 4, 'fsdp': 128, 'context': 1, 'tensor': 1}"
