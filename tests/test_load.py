"""load_checkpoint: the right numbers in the right place, from every layout, in little memory."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from models.llama.formats import hf
from models.llama.load import load_checkpoint
from models.llama.model import for_decoding
from models.llama.stream import count_nonfinite
from tests import tiny
from tests.tiny_gguf import write_gguf
from utils.errors import ArtifactError, ConfigError
from utils.files import flatten

# Written out here a second time, so that a wrong row in the library's table is seen.
HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers/attn/wq": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attn/wk": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attn/wv": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attn/wo": "model.layers.{}.self_attn.o_proj.weight",
    "layers/attn/q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attn/k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers/attn/bq": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attn/bk": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attn/bv": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attn/bo": "model.layers.{}.self_attn.o_proj.bias",
    "layers/mlp/w_gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/w_up": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/w_down": "model.layers.{}.mlp.down_proj.weight",
    "layers/mlp/b_gate": "model.layers.{}.mlp.gate_proj.bias",
    "layers/mlp/b_up": "model.layers.{}.mlp.up_proj.bias",
    "layers/mlp/b_down": "model.layers.{}.mlp.down_proj.bias",
    "layers/attn_norm": "model.layers.{}.input_layernorm.weight",
    "layers/ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}


def assert_holds(params, model) -> None:
    """The parameters are the transformers model's weights to the bit, and nothing else."""
    state, seen = model.state_dict(), set()
    for path, array in flatten(params).items():
        pattern = HF_NAMES[path]
        names = [pattern.format(i) for i in range(model.config.num_hidden_layers)]
        names = names if "{}" in pattern else [pattern]
        for name, layer in zip(names, array if "{}" in pattern else [array], strict=True):
            np.testing.assert_array_equal(np.asarray(layer, np.float32), state[name], err_msg=name)
            seen.add(name)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert seen == set(state) - tied


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_hf(name):
    path, model = tiny.hf_model(name)
    _, params = load_checkpoint(path)
    assert_holds(params, model)
    want = {"bf16": jnp.bfloat16, "f16": jnp.float16}.get(name, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(want)}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("gqa", {}),
        ("mha", dict(shards=2)),
        ("gqa", dict(shards=2, embed_dim=1)),
        ("llama3_meta", dict(shards=2, vocab_size=-1)),
        ("llama3_meta", dict(shards=2, embed_dim=1, vocab_size=-1)),
        ("tied", {}),
    ],
    ids=str,
)
def test_meta(tmp_path, name, written):
    path, model = tiny.hf_model(name)
    config, params = load_checkpoint(tiny.write_meta(tmp_path, model, **written))
    assert_holds(params, model)
    want = hf.to_config(model.config.to_dict())
    # Meta's file does not say how long the context is.
    assert config.rope_scaling == want.rope_scaling and config.rope_theta == want.rope_theta
    assert (config.n_params, config.ffn_dim) == (want.n_params, want.ffn_dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_meta_half_precision_saved_on_a_gpu(tmp_path, monkeypatch, dtype):
    _, model = tiny.hf_model("bf16" if dtype is torch.bfloat16 else "f16")
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    # Halving and back is exact: the model's weights came from this dtype.
    half = tiny.random_model(model.config).to(dtype)
    _, params = load_checkpoint(tiny.write_meta(tmp_path, half, shards=2))
    assert_holds(params, model)
    assert params["embed"].dtype.name == str(dtype).removeprefix("torch.")


def test_meta_with_the_embedding_twice_is_tied(tmp_path):
    _, model = tiny.hf_model("tied")
    tiny.write_meta(tmp_path, model)
    file = tmp_path / "consolidated.00.pth"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"output.weight": state["tok_embeddings.weight"].clone()}, file)
    config, params = load_checkpoint(tmp_path)
    assert config.tie_embeddings and "lm_head" not in params
    config, params = load_checkpoint(tmp_path, tie=False)
    assert not config.tie_embeddings
    assert np.array_equal(params["lm_head"], params["embed"])


@pytest.mark.parametrize("name", ["gqa", "tied", "biases", "llama3_meta", "linear"])
def test_gguf(tmp_path, name):
    _, model = tiny.hf_model(name)
    write_gguf(tmp_path / "model.gguf", model.config, model.state_dict())
    for path in (tmp_path, tmp_path / "model.gguf"):
        config, params = load_checkpoint(path)
        assert_holds(params, model)
        want = hf.to_config(model.config.to_dict()).rope_scaling
        assert (config.rope_scaling and config.rope_scaling.kind) == (want and want.kind)


def test_two_gguf_files_in_a_folder_are_ambiguous(tmp_path):
    _, model = tiny.hf_model("gqa")
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, model.config, model.state_dict())
    with pytest.raises(ArtifactError, match="2 .gguf files"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["gqa", "bf16", "f16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(name, dtype):
    path, model = tiny.hf_model(name)
    _, params = load_checkpoint(path, dtype=dtype)
    state = model.state_dict()["model.layers.2.mlp.up_proj.weight"]
    want = state.to(getattr(torch, dtype)).float()
    for given in (dtype, jnp.dtype(dtype)):
        _, params = load_checkpoint(path, dtype=given)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
        np.testing.assert_array_equal(
            np.asarray(params["layers"]["mlp"]["w_up"][2], np.float32), want
        )


# Four devices, of which each reads its part of every tensor.
SHARED = """
import sys, jax, numpy as np
from models.llama.load import load_checkpoint
from utils.sharding import make_mesh
for path in sys.argv[1:]:
    wanted = load_checkpoint(path)[1]
    with jax.set_mesh(make_mesh("fsdp=2,tensor=2")):
        found = load_checkpoint(path)[1]
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert all(len(x.sharding.device_set) == 4 for x in jax.tree.leaves(found))
    assert any(x.addressable_shards[0].data.size < x.size for x in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
"""


@pytest.mark.slow
def test_a_mesh_loads_what_one_device_does(tmp_path):
    """From all formats: the rows of wq and wk are in another order in Meta's and in GGUF's."""
    path, model = tiny.hf_model("gqa")
    write_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), "BF16")
    paths = path, tiny.write_meta(tmp_path / "meta", model), tmp_path / "model.gguf"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", SHARED, *map(str, paths)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float64", "int8", "nonsense", 3])
def test_bad_dtype(dtype):
    with pytest.raises(ConfigError, match="expected float32, bfloat16, float16"):
        load_checkpoint(tiny.hf_model("gqa")[0], dtype=dtype)


def test_safetensors_come_before_other_formats(tmp_path):
    path, model = tiny.hf_model("gqa")
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    tiny.write_meta(tmp_path, tiny.hf_model("mha")[1])
    assert_holds(load_checkpoint(tmp_path)[1], model)


def test_progress_counts_to_the_end():
    told = []
    _, params = load_checkpoint(tiny.hf_model("gqa")[0], progress=lambda *args: told.append(args))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    done = [args[1] for args in told]
    assert done == sorted(done) and done[-1] == total and len(done) == 30
    assert {args[2] for args in told} == {total}


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("hf", "gqa"),
        ("hf", "biases"),
        ("hf", "bf16"),
        ("hf", "qwen3_biases"),
        ("meta", "tied"),
        ("gguf", "biases"),
        ("gguf", "qwen2"),
    ],
)
def test_the_layout_for_decoding_is_that_of_for_decoding(tmp_path, name, format):
    folder, model = tiny.hf_model(name)
    if format == "meta":
        folder = tiny.write_meta(tmp_path / "meta", model, shards=2)
    elif format == "gguf":
        write_gguf(tmp_path / "model.gguf", model.config, model.state_dict())
        folder = tmp_path
    config, stacked = load_checkpoint(folder)
    _, laid_out = load_checkpoint(folder, decoding=True)
    expected = for_decoding(stacked)
    assert jax.tree.structure(laid_out) == jax.tree.structure(expected)
    assert len(laid_out["layers"]) == config.n_layers
    assert jax.tree.all(jax.tree.map(jnp.array_equal, laid_out, expected))


def test_layers_lie_in_jax_without_a_copy(monkeypatch):
    placed, put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x: placed.append((x, put(x))) or placed[-1][1])
    load_checkpoint(tiny.hf_model("bf16")[0])
    assert len(placed) == 12
    for ours, array in placed:
        assert array.unsafe_buffer_pointer() == ours.ctypes.data


def test_parameters_may_be_donated():
    _, params = load_checkpoint(tiny.hf_model("gqa")[0])
    before = np.array(params["embed"])
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    with warnings.catch_warnings(action="ignore"):
        after = step(params)
    np.testing.assert_array_equal(after["embed"], before + 1)


def test_extra_frequencies_are_ignored(tmp_path):
    """Old exports hold RoPE's frequencies; they follow from the config."""
    path, model = tiny.hf_model("gqa")
    change_tensors(
        path,
        tmp_path,
        lambda t: t
        | {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "model.rotary_emb.inv_freq": torch.ones(8),
        },
    )
    assert_holds(load_checkpoint(tmp_path)[1], model)


def change_tensors(source: Path, target: Path, change) -> Path:
    """A copy of a one-file checkpoint with other tensors."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    file = target / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return target


def change_config(folder: Path, **changes) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def with_head(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}


@pytest.mark.covers("A17")
def test_tied_by_the_config_but_the_file_has_another_head(tmp_path):
    path, model = tiny.hf_model("tied")
    change_tensors(path, tmp_path, with_head)
    with pytest.raises(ArtifactError, match="lm_head.weight differs"):
        load_checkpoint(tmp_path)
    config, params = load_checkpoint(tmp_path, tie=True)
    assert config.tie_embeddings
    assert_holds(params, model)
    config, params = load_checkpoint(tmp_path, tie=False)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["lm_head"], params["embed"] + 1)


@pytest.mark.covers("A17")
def test_tied_with_the_embedding_a_second_time_is_fine(tmp_path):
    path, model = tiny.hf_model("tied")
    change_tensors(
        path, tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    config, params = load_checkpoint(tmp_path)
    assert config.tie_embeddings
    assert_holds(params, model)


@pytest.mark.covers("A17")
def test_untied_without_a_head_is_not_tied_in_silence(tmp_path):
    path, _ = tiny.hf_model("tied")
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ArtifactError, match="missing: 'lm_head.weight'"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, tie=True)[0].tie_embeddings


def with_bad_numbers(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 6] = -float("inf")
    tensors["model.norm.weight"][0] = float("inf")
    return tensors


@pytest.mark.covers("A16")
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_bad_numbers(tmp_path, dtype):
    change_tensors(tiny.hf_model("gqa")[0], tmp_path, with_bad_numbers)
    pattern = (
        r"NaN or infinity in 2 tensors: 'model.layers.1.mlp.up_proj.weight' \(2\), "
        r"'model.norm.weight' \(1\)"
    )
    with pytest.warns(UserWarning, match=pattern):
        load_checkpoint(tmp_path, dtype=dtype)
    with pytest.raises(ArtifactError, match=pattern):
        load_checkpoint(tmp_path, dtype=dtype, check_finite=True)


@pytest.mark.covers("A16")
def test_overflow_of_a_cast_is_seen(tmp_path):
    def large(tensors):
        tensors["model.norm.weight"][1] = 1e6
        return tensors

    change_tensors(tiny.hf_model("gqa")[0], tmp_path, large)
    load_checkpoint(tmp_path, check_finite=True)
    with pytest.raises(ArtifactError, match=r"'model.norm.weight' \(1\)"):
        load_checkpoint(tmp_path, dtype="float16", check_finite=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_count_nonfinite(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 100_003)).astype(dtype)
    x[0, 0], x[1, 5], x[2, -1], x[2, 7] = np.nan, np.inf, -np.inf, np.finfo(np.float16).max
    assert count_nonfinite(x) == np.count_nonzero(~np.isfinite(x.astype(np.float64))) == 3


# In a process of its own, where no freed memory of earlier tests can be used again.
MEASURE = """
import sys
from pathlib import Path
import jax
from models.llama.load import load_checkpoint

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

load_checkpoint(sys.argv[3], dtype=sys.argv[2])  # what is imported and started once
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = memory("VmRSS")
_, loaded = load_checkpoint(sys.argv[1], dtype=sys.argv[2])
params = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
print(memory("VmHWM") - before, params)
"""


@pytest.fixture(scope="module")
def large_model():
    # 214 MB in float32, in the proportions of a real model.
    sizes = dict(vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=14)
    config = LlamaConfig(**(tiny.BASE | sizes | dict(num_attention_heads=8)))
    return tiny.random_model(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dtype"), [("hf", "float32"), ("hf", "bfloat16"), ("meta", "bfloat16")]
)
def test_memory_while_loading(large_model, layout, dtype, tmp_path):
    """Under 1.3 × the parameters at the target dtype, plus one tensor."""
    folder = tiny.cache_dir() / f"large-{layout}"
    if not folder.exists() and layout == "hf":
        large_model.save_pretrained(folder)
    elif not folder.exists():
        tiny.write_meta(folder, large_model, shards=2, multiple_of=128)
    small, model = tiny.hf_model("gqa")
    if layout == "meta":
        small = tiny.write_meta(tmp_path / "small", model)
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), dtype, str(small)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    used, params = map(int, out.stdout.split())
    # The lower bound shows that this measures.
    assert 0.9 * params < used < 1.3 * params + 8192 * 512 * 4
