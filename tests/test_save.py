"""save_checkpoint: bit-equal through transformers and Meta's layout, whole or not at all."""

import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from generate import generate
from models.llama.formats import hf
from models.llama.chat_format import chat_format_for
from models.llama.config import ModelConfig, RopeScaling
from models.llama.decoding import GenerationConfig
from models.llama.load import load_checkpoint, save_checkpoint
from models.llama.model import LLaMa
from models.llama.tokenizer import load_tokenizer
from tests import cli, tiny
from tests.oracles import tokenizer_files as oracle
from tests.test_tokenizer_save import small_metadata
from utils.errors import ArtifactError, CheckpointError, ConfigError
from utils.files import atomic_directory, atomic_file


def loaded(name: str):
    """(config, params) of a tiny checkpoint."""
    return load_checkpoint(tiny.hf_model(name)[0])


def assert_same(a, b) -> None:
    """Two trees are equal to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_transformers_reads_it_back(tmp_path, name):
    _, model = tiny.hf_model(name)
    config, params = loaded(name)
    save_checkpoint(tmp_path / "out", config, params)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", attn_implementation="eager"
    )
    want = model.state_dict()
    got = theirs.state_dict()
    assert type(theirs) is type(model)
    assert set(got) == set(want)
    for key, weight in got.items():
        assert torch.equal(weight.float(), want[key]), key
    assert str(next(theirs.parameters()).dtype) == f"torch.{params['embed'].dtype.name}"
    assert theirs.config.rope_parameters == model.config.rope_parameters
    tokens = torch.arange(96)[None] % 160
    assert torch.equal(theirs.float()(tokens).logits, model(tokens).logits)
    config_again, params_again = load_checkpoint(tmp_path / "out")
    assert config_again == config
    assert_same(params_again, params)


@pytest.mark.parametrize("name", ["gqa", "bf16", "f16", "llama3_meta"])
def test_meta_layout(tmp_path, name):
    _, model = tiny.hf_model(name)
    config, params = loaded(name)
    save_checkpoint(tmp_path / "out", config, params, format="meta")
    state = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    want = tiny.meta_state(model)
    assert set(state) == set(want)
    for key, weight in state.items():
        assert torch.equal(weight.float(), want[key]), key
    theirs = json.loads((tmp_path / "out" / "params.json").read_text())
    for key, value in tiny.meta_params(model).items():
        assert key == "multiple_of" or theirs[key] == value
    config_again, params_again = load_checkpoint(tmp_path / "out")
    assert config_again.rope_scaling == config.rope_scaling
    assert_same(params_again, params)


def test_meta_layout_of_a_tied_model_has_the_head_that_metas_code_loads(tmp_path):
    config, params = loaded("tied")
    save_checkpoint(tmp_path / "out", config, params, format="meta")
    state = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])
    config_again, params_again = load_checkpoint(tmp_path / "out")
    assert config_again.tie_embeddings
    assert_same(params_again, params)


@pytest.mark.parametrize("limit", [1, 30_000, 100_000, 10**6])
def test_shards(tmp_path, limit):
    config, params = loaded("gqa")
    save_checkpoint(tmp_path / "out", config, params, max_shard_bytes=limit)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    largest = 192 * 64 * 4
    assert all(file.stat().st_size <= max(limit, largest) + 4000 for file in shards)
    assert (len(shards) == 1) == (limit == 10**6)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (len(shards) > 1)
    if len(shards) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert index["metadata"]["total_size"] == total
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for key, weight in tiny.hf_model("gqa")[1].state_dict().items():
        assert torch.equal(model.state_dict()[key], weight)
    assert_same(load_checkpoint(tmp_path / "out")[1], params)


def test_nan_and_negative_zero_survive(tmp_path):
    config, params = loaded("bf16")
    odd = np.array([np.nan, -0.0, np.inf, 1e-40], ml_dtypes.bfloat16)
    odd.view(np.uint16)[0] = 0xFFC1  # a NaN with a sign and a payload
    params["final_norm"] = params["final_norm"].at[:4].set(odd)
    bits = np.asarray(params["final_norm"]).tobytes()
    for format in ("hf", "meta"):
        save_checkpoint(tmp_path / format, config, params, format=format)
        with pytest.warns(UserWarning, match="NaN or infinity"):
            _, again = load_checkpoint(tmp_path / format)
        assert np.asarray(again["final_norm"]).tobytes() == bits


@pytest.mark.covers("D31")
@pytest.mark.parametrize("format", ["hf", "meta"])
def test_the_tokenizer_goes_along(tmp_path, format):
    """A model and its tokenizer, out and in again; what is exported again is the same."""
    source, out = cli.checkpoint(), tmp_path / "out"
    config, params = load_checkpoint(source)
    save_checkpoint(out, config, params, format=format, tokenizer=source)
    ours, again = load_tokenizer(source), load_tokenizer(out)
    assert {k: v for k, v in vars(again).items() if not k.startswith("_")} == {
        k: v for k, v in vars(ours).items() if not k.startswith("_")
    }
    assert again.encode("<s>a\xff 12") == ours.encode("<s>a\xff 12")
    config_again, params_again = load_checkpoint(out)
    assert_same(params_again, params)
    save_checkpoint(tmp_path / "twice", config_again, params_again, format=format, tokenizer=out)
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "twice").iterdir())
    for name in names:
        if name != "consolidated.00.pth":  # torch writes a fresh number into each file
            assert (out / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


@pytest.mark.covers("D31")
def test_transformers_generates_from_an_export_as_we_do(tmp_path, default_model_path):
    """Weights, token ids, chat, the answer and where it stops, with a part of the default tokenizer."""
    sizes = dict(vocab_size=1500, max_position_embeddings=128, num_hidden_layers=1)
    original = tiny.random_model(LlamaConfig(**(tiny.BASE | sizes)))
    original.save_pretrained(tmp_path / "model")
    config, params = load_checkpoint(tmp_path / "model")
    source, out = tmp_path / "model.gguf", tmp_path / "out"
    # Ends of text that are not the usual ids, and one more that the greedy answer comes to.
    metadata = small_metadata(default_model_path, eos_token_id=4, bos_token_id=5)
    oracle.write_tokenizer_gguf(source, metadata)
    messages = [{"role": "user", "content": "a  12 ½\n"}]
    prompt = chat_format_for(load_tokenizer(source)).encode_chat(messages)
    greedy = dict(do_sample=False, max_new_tokens=8)
    last = int(original.generate(torch.tensor([prompt]), eos_token_id=-1, **greedy)[0, -3])
    oracle.write_tokenizer_gguf(source, metadata | {"tokenizer.ggml.eot_token_id": last})
    save_checkpoint(out, config, params, tokenizer=source)

    tokenizer = AutoTokenizer.from_pretrained(out)
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    stops = sorted(load_tokenizer(source).stop_ids)
    assert {4, last} < set(stops)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == stops
    assert theirs.config.bos_token_id == theirs.generation_config.bos_token_id == 5
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert inputs["input_ids"][0].tolist() == prompt
    answer = theirs.generate(**inputs, **greedy)[0, len(prompt) :]
    again = load_tokenizer(out)
    stopping = GenerationConfig(max_new_tokens=8, stop_ids=again.stop_ids)
    ours = generate(LLaMa(config), params, [prompt], config=stopping)
    assert answer.tolist() == ours.row(0)
    assert answer[-1] == last and len(answer) < 8
    assert again.decode(answer.tolist()) == tokenizer.decode(answer)


def test_a_tokenizer_that_does_not_fit_the_model(tmp_path):
    config, params = loaded("gqa")
    with pytest.raises(ArtifactError, match="ids up to 258, the model 160 rows"):
        save_checkpoint(tmp_path / "out", config, params, tokenizer=cli.checkpoint())
    with pytest.raises(ArtifactError, match="no-tokenizer"):
        save_checkpoint(tmp_path / "out", config, params, tokenizer=tmp_path / "no-tokenizer")
    assert not list(tmp_path.iterdir())


@pytest.mark.covers("D31")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_tokenizer_leaves_what_was_there(tmp_path, monkeypatch, overwrite, error):
    config, params = load_checkpoint(cli.checkpoint())
    out, write = tmp_path / "out", Path.write_bytes
    if overwrite:
        save_checkpoint(out, config, params)

    def fail_half_way(path, data):
        if path.name == "generation_config.json":
            write(path, data[:7])
            raise error
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail_half_way)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        save_checkpoint(out, config, params, tokenizer=cli.checkpoint(), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
    if overwrite:
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]


def wrong_params(config, params):
    yield "layers/attn/wq is missing", params | {"layers": params["layers"] | {"attn": {}}}
    yield "lm_head is missing", {k: v for k, v in params.items() if k != "lm_head"}
    yield "extra is not a parameter", params | {"extra": params["embed"]}
    yield r"embed is \[64, 160\], expected \[160, 64\]", params | {"embed": params["embed"].T}
    yield "final_norm has dtype int32", params | {"final_norm": params["final_norm"].astype(int)}


def test_params_that_do_not_fit_the_config(tmp_path):
    config, params = loaded("gqa")
    for message, wrong in wrong_params(config, params):
        with pytest.raises(ConfigError, match=message):
            save_checkpoint(tmp_path / "out", config, wrong)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["biases", "gelu", "linear", "head_dim", "llama3_8"])
def test_what_metas_layout_cannot_say_is_refused(tmp_path, name):
    config, params = loaded(name)
    with pytest.raises(ConfigError, match="export with format='hf'"):
        save_checkpoint(tmp_path / "out", config, params, format="meta")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path):
    config, params = loaded("gqa")
    with pytest.raises(ConfigError, match="format='gguf'"):
        save_checkpoint(tmp_path / "out", config, params, format="gguf")
    with pytest.raises(ConfigError, match="max_shard_bytes=0"):
        save_checkpoint(tmp_path / "out", config, params, max_shard_bytes=0)
    scaling = RopeScaling(kind="factors", factors=(1.0,) * 8)
    fields = {f: getattr(config, f) for f in ModelConfig.__dataclass_fields__}
    with pytest.raises(ConfigError, match="RoPE factors"):
        save_checkpoint(
            tmp_path / "out", ModelConfig(**fields | dict(rope_scaling=scaling)), params
        )


def test_existing_folder(tmp_path):
    config, params = loaded("gqa")
    out = tmp_path / "out"
    out.mkdir()
    save_checkpoint(out, config, params)  # empty: fine
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already; pass overwrite=True"):
        save_checkpoint(out, config, params)
    assert (out / "notes.txt").read_text() == "mine"
    save_checkpoint(out, config, params, overwrite=True)
    assert not (out / "notes.txt").exists()
    assert_same(load_checkpoint(out)[1], params)
    with pytest.raises(CheckpointError, match="is a file"):
        save_checkpoint(out / "config.json", config, params, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_what_was_there(tmp_path, monkeypatch, overwrite, error):
    config, params = loaded("gqa")
    out, calls = tmp_path / "out", []
    if overwrite:
        save_checkpoint(out, config, params)

    def write_then_fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        write(*args)

    write = hf.write_tensors
    monkeypatch.setattr(hf, "write_tensors", write_then_fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as e:
        save_checkpoint(out, config, params, max_shard_bytes=50_000, overwrite=overwrite)
    assert not isinstance(error, OSError) or "out: No space left" in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
    if overwrite:
        assert_same(load_checkpoint(out)[1], params)


def test_unwritable_place(tmp_path):
    config, params = loaded("gqa")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "out", config, params)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_are_on_disk_before_the_folder_appears(tmp_path, monkeypatch):
    """fsync of every file, of the folder, then the rename, then fsync of the parent."""
    events = []

    def named(fd) -> str:
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name

    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(named(fd)) or fsync(fd))
    monkeypatch.setattr(
        os, "rename", lambda a, b: events.append(f"-> {Path(b).name}") or rename(a, b)
    )
    save_checkpoint(tmp_path / "out", *loaded("gqa"))
    assert {*events[:2]} == {"config.json", "model.safetensors"}
    assert events[2].startswith(".out.tmp-")
    assert events[3:] == ["-> out", tmp_path.name]


def test_atomic_file(tmp_path):
    path = tmp_path / "x"
    with atomic_file(path) as f:
        f.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    with pytest.raises(RuntimeError), atomic_file(path) as f:
        f.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_atomic_directory_puts_the_old_one_back(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.mkdir()
    (path / "old").touch()
    rename = os.rename

    def fail(a, b):
        if Path(b) == path and ".tmp-" in str(a):
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output"), atomic_directory(path, overwrite=True):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "old"]


def test_saved_from_a_checkpoint_in_the_same_place(tmp_path):
    """Parameters do not refer to the file they came from."""
    shutil.copytree(tiny.hf_model("gqa")[0], tmp_path / "model")
    config, params = load_checkpoint(tmp_path / "model")
    save_checkpoint(tmp_path / "model", config, params, overwrite=True)
    assert_same(load_checkpoint(tmp_path / "model")[1], params)
