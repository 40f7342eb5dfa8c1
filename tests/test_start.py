"""What a command line settles before it starts: JAX's precision, libtpu, the folder of compiled programs."""

import logging
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama.hub import resolve
from sampling import Greedy, TopP
from tests import cli as programs
from utils.console import cli
from utils.errors import ArtifactError, ConfigError


@pytest.mark.covers("R21")
def test_samplers_draw_the_same_tokens_with_64_bits():
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), 4)))
    logits = np.random.default_rng(0).standard_normal((4, 300), np.float32) * 3
    samplers = TopP(0.8, 0.9), TopP(1.0, top_k=9, min_p=0.01), TopP(0.0), Greedy()

    def drawn():
        rows = jax.random.wrap_key_data(jnp.asarray(keys))
        return [[np.asarray(x) for x in s(jnp.asarray(logits), rows)] for s in samplers]

    expected = drawn()
    with jax.enable_x64(True):
        found = drawn()
    for (tokens, logprobs), (wide_tokens, wide_logprobs) in zip(expected, found):
        assert wide_tokens.dtype == np.int32 and wide_logprobs.dtype == np.float32
        np.testing.assert_array_equal(tokens, wide_tokens)
        np.testing.assert_allclose(logprobs, wide_logprobs, atol=1e-6)


@pytest.mark.covers("R21")
def test_programs_answer_the_same_with_64_bits():
    flags = ["--ckpt_dir", str(programs.checkpoint()), "--prompt", "hi", "--max_gen_len", "4"]
    plain, wide = (
        programs.run("generate.py", *flags, env=programs.environment() | more)
        for more in ({}, {"JAX_ENABLE_X64": "1"})
    )
    assert (wide.returncode, wide.stdout) == (0, plain.stdout), wide.stderr
    assert len(wide.stderr.splitlines()) == 1


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    return os.environ


@pytest.mark.covers("N8", "N9")
def test_libraries_are_quiet_where_there_is_no_tpu(settled, monkeypatch):
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: [])
    cli._settle_libraries()
    assert cli.NO_TPU.items() <= settled.items()
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
    settled.clear()
    settled["TPU_WORKER_ID"] = "3"  # whoever sets one knows why
    cli._settle_libraries()
    assert settled["TPU_WORKER_ID"] == "3"


@pytest.mark.covers("N8")
@pytest.mark.parametrize("why", ["chips", "asked"])
def test_a_real_tpu_is_left_alone(settled, monkeypatch, why):
    chips = ["/dev/vfio/0"] if why == "chips" else []
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: chips)
    settled |= {"JAX_PLATFORMS": "tpu,cpu"} if why == "asked" else {}
    cli._settle_libraries()
    assert not cli.NO_TPU.keys() & settled.keys()


@pytest.mark.parametrize("version, times", [("0.11.1", 1), ("0.10.2", 0), ("0.12.0.1", 0)])
def test_a_jaxlib_that_is_known_to_be_slow_is_named_once(monkeypatch, capsys, version, times):
    monkeypatch.setattr(cli.jaxlib, "__version__", version)
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert cli._run(lambda: 0, debug=False) == 0
    assert capsys.readouterr().err.count("jaxlib 0.11.1 copies whole buffers") == times


_COMPILES = """
import sys, jax
from utils.console import cli
def main():
    cli.keep_compilations()
    jax.jit(lambda x: x * 3 + 1)(1.0).block_until_ready()
cli.run(main)
"""


@pytest.mark.covers("R31")
def test_a_cut_entry_is_replaced_and_nothing_is_said(tmp_path):
    def start():
        env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_MAX_SIZE": "99"}
        done = subprocess.run(
            [sys.executable, "-c", _COMPILES], env=env, cwd=programs.ROOT, capture_output=True
        )
        assert (done.returncode, done.stderr) == (0, b""), done.stderr
        return {path: path.read_bytes() for path in folder.glob("*-cache")}

    folder = tmp_path / "altiplano" / "xla"
    whole = start()
    assert whole
    for path in whole:
        path.write_bytes(path.read_bytes()[:100])
    assert start().keys() == whole.keys()
    assert all(path.stat().st_size > 100 for path in whole)


@pytest.mark.covers("R31")
def test_the_oldest_compiled_programs_go_beyond_the_bound(tmp_path):
    for i, name in enumerate("abc"):
        (tmp_path / f"{name}-cache").write_bytes(b"x" * 10)
        os.utime(tmp_path / f"{name}-cache", (1000 - i, 1000 - i))
    (tmp_path / "other").write_bytes(b"x" * 100)
    cli._drop_oldest(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-cache", "b-cache", "other"]


@pytest.mark.covers("N14")
def test_a_runs_folder_is_not_a_model_but_its_export_is(tmp_path):
    run = tmp_path / "run"
    step = run / "checkpoints" / "step-00000012"
    step.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    for folder in (run, run / "checkpoints", step):
        with pytest.raises(ArtifactError, match="a training run's folder.*train.py export --run"):
            resolve(folder)
    (run / "export").mkdir()
    with pytest.raises(ArtifactError, match="did you mean .*run/export?"):
        resolve(step)
    assert resolve(run / "export") == run / "export"


@pytest.mark.covers("N14")
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    cli.check_writable(None)
    cli.check_writable(str(tmp_path / "x.html"))
    with pytest.raises(ConfigError, match="--out .*absent/x.html: cannot write into the folder"):
        cli.check_writable(str(tmp_path / "absent" / "x.html"))
    assert not (tmp_path / "absent").exists()
