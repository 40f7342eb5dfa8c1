"""The forms that a CPU is given: the same results as the straight ones, by whatever the machine is."""

import functools
import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from utils import detours, ops
from utils.int8 import Int8, quantize

LAYERS, DIM, WIDE = 7, 24, 40


def draw(seed: int, *shape: int, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("jaxlib_version", [(0, 10, 2), (0, 12, 0)])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 17, 32, 33, 300])
def test_each_form_of_a_product_is_the_product(monkeypatch, rows, dtype, native, jaxlib_version):
    monkeypatch.setattr(detours, "multiplies_bfloat16", lambda: native)
    monkeypatch.setattr(jaxlib.version, "__version_info__", jaxlib_version)
    x, weight, dy = draw(0, rows, DIM), draw(1, WIDE, DIM), draw(2, rows, WIDE)
    x, weight, dy = (array.astype(dtype) for array in (x, weight, dy))
    whole = [np.asarray(array, np.float64) for array in (x, weight, dy)]
    wanted = {
        "x @ w.T": (x, weight, 1, 1, whole[0] @ whole[1].T),
        "dy @ w": (dy, weight, 1, 0, whole[2] @ whole[1]),
        "dy.T @ x": (dy, x, 0, 0, whole[2].T @ whole[0]),
    }
    for what, (a, b, a_axis, b_axis, right) in wanted.items():
        found = jax.jit(ops.matmul, static_argnums=(2, 3))(a, b, a_axis, b_axis)
        assert found.dtype == jnp.float32 and found.shape == right.shape, what
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-4, err_msg=what)


def test_a_gradient_by_a_matrix_may_be_turned(monkeypatch):
    """XLA would move the transposition into a product of bfloat16 that it then cannot compute."""
    monkeypatch.setattr(detours, "multiplies_bfloat16", lambda: True)
    x, dy = draw(0, 33, DIM, dtype="bfloat16"), draw(1, 33, WIDE, dtype="bfloat16")
    found = jax.jit(lambda dy, x: ops.matmul(dy, x, 0, 0).T)(dy, x)
    right = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-4)


def test_a_row_apart_from_its_product_is_the_row():
    rows = [[-0.0, 0.0, 1e-45, np.inf, -np.inf, np.nan, 3.0], [np.nan, -1.0, 0.5, 2.0, 1, 7, 8]]
    for dtype in ("float32", "bfloat16"):
        row = jnp.asarray(rows, dtype)
        found = jax.jit(detours.apart_from_dot)(row)
        assert np.asarray(found).tobytes() == np.asarray(row).tobytes()
    for row in (jnp.arange(-3, 9, dtype="int16"), jnp.full(5, -(2**15), "int16")):
        assert (jax.jit(detours.apart_from_dot)(row) == row).all()


def block(x, layer, constants):
    scale = constants["scale"] * layer["steps"].astype(x.dtype)
    hidden = jnp.tanh(ops.linear(x * scale, layer["up"])) + ops.linear(x, layer["frozen"])
    return x + ops.linear(hidden, layer["down"])


def stack(dtype):
    layers = {
        "up": draw(0, LAYERS, WIDE, DIM, dtype=dtype) / 8,
        "down": draw(1, LAYERS, DIM, WIDE, dtype=dtype) / 8,
        "frozen": quantize(draw(2, LAYERS, WIDE, DIM) / 8),
        "steps": jnp.arange(LAYERS, dtype=jnp.int32),
    }
    return draw(3, 5, DIM, dtype=dtype), layers, {"scale": jnp.asarray(0.25, dtype), "none": None}


def plain(block, x, layers, constants):
    return jax.lax.scan(lambda x, layer: (block(x, layer, constants), None), x, layers)[0]


@pytest.mark.parametrize("policy", [None, "nothing_saveable", "dots_saveable"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loop_over_layers_is_that_of_jax(dtype, policy):
    x, layers, constants = stack(dtype)
    step = block
    if policy is not None:
        step = jax.checkpoint(block, policy=getattr(jax.checkpoint_policies, policy))

    def loss(scan, trained, x):
        y = scan(step, x, layers | trained, constants)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    trained = {name: layers[name] for name in ("up", "down")}
    found, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(loss, scan), argnums=(0, 1)))(trained, x)
        for scan in (detours._scan_on_cpu, plain)  # float32 is not given to it, and is exact
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    norms = jax.tree.map(lambda a: float(jnp.linalg.norm(a.astype(jnp.float32))), wanted)
    differences = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, found, wanted)
    for difference, norm in zip(jax.tree.leaves(differences), jax.tree.leaves(norms)):
        assert jnp.linalg.norm(difference) <= tolerance * norm


def test_no_stack_of_bfloat16_is_widened():
    """As jaxlib 0.10 does for a plain loop, and 0.12 does not: it converts what it reads, and copies
    what it fills in each step.
    """
    x, layers, constants = stack("bfloat16")
    layers["frozen"] = Int8(*(array[:, :WIDE] for array in jax.tree.leaves(layers["frozen"])))

    def text(scan):
        def loss(trained):
            return jnp.sum(scan(block, x, layers | trained, constants).astype(jnp.float32))

        trained = {name: layers[name] for name in ("up", "down")}
        return jax.jit(jax.grad(loss)).lower(trained).compile().as_text()

    stacks = re.compile(rf"f32\[{LAYERS},({WIDE},{DIM}|{DIM},{WIDE}|5,{WIDE}|5,{DIM})\]")
    if jaxlib.version.__version_info__ < (0, 11):
        assert stacks.search(text(plain))
    assert not stacks.search(text(detours.scan))


SCRIPT = """
import os, pathlib, sys
from utils.console import pages
pages._MODE = pathlib.Path(sys.argv[1])
print("started", flush=True)
pages.use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages of 2 MB are asked for on Linux")
@pytest.mark.parametrize("mode, given", [("madvise", None), ("madvise", "own"), ("always", None)])
def test_a_program_asks_for_huge_pages_once(tmp_path, mode, given):
    (tmp_path / "enabled").write_text(f"always {mode} never".replace(mode, f"[{mode}]"))
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {"GLIBC_TUNABLES": given} if given else {}
    command = [sys.executable, tmp_path / "script.py", tmp_path / "enabled", "a b", "c"]
    environment["PYTHONPATH"] = os.getcwd()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    asks = mode == "madvise" and given is None
    shown = "glibc.malloc.hugetlb=1" if asks else given
    assert done.stdout == "started\n" * (1 + asks) + f"{shown} ['a b', 'c']\n"
