"""Adapters in PEFT's format: peft's logits from its folders, and ours from those that we write."""

import copy
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.llama.checkpoint import open_checkpoint
from models.llama.layout import leaves
from models.llama.load import load_checkpoint, save_adapter
from models.llama.lora import LoRAConfig, init_lora, merge
from models.llama.model import LLaMa, for_decoding
from tests import cli, tiny
from tests.programs import check_error
from tests.test_sft_trainer import fast
from tests.test_torch_training import batch_of
from tests.tiny_gguf import write_gguf
from trainers.runs.start import start
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils.errors import ArtifactError, CheckpointError
from utils.files import flatten
from utils.int8 import Int8

TOKENS = np.random.default_rng(0).integers(0, 160, (2, 24))
EVERY = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
CASES = {
    "mha": ("mha", dict(r=3, lora_alpha=5, target_modules=EVERY)),
    "gqa": ("gqa", dict(r=4, lora_alpha=16, use_rslora=True, target_modules="all-linear")),
    "tied": ("tied", dict(r=2, target_modules=["q_proj", "layers.1.mlp.down_proj"])),
    "biases": ("biases", dict(target_modules=r".*\.(1|2)\.self_attn\.(q|k|o)_proj")),
    "patterns": (
        "gqa",
        dict(
            r=4,
            target_modules=["q_proj", "v_proj", "up_proj"],
            layers_to_transform=[0, 2],
            exclude_modules=["layers.2.self_attn.v_proj"],
            rank_pattern={"q_proj": 6, r"layers\.2\.mlp\.up_proj": 1},
            alpha_pattern={"v_proj": 40, r"^model.layers.0.self_attn.q_proj": 3},
        ),
    ),
}


@functools.cache
def adapted(case: str):
    """(base folder, adapter's folder, peft's logits) of a random adapter."""
    name, settings = CASES[case]
    path, model = tiny.hf_model(name)
    torch.manual_seed(0)
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(copy.deepcopy(model), config)
    folder = tiny.cache_dir() / f"adapter-{case}"
    model.save_pretrained(folder)
    return path, folder, logits_of(model)


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@functools.partial(fast, static_argnums=0)
def logits(config, params):
    return LLaMa(config).apply({"params": params}, TOKENS)[0]


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max() / 10)


@pytest.mark.covers("R44")
@pytest.mark.parametrize("case", CASES)
def test_logits_are_pefts(case):
    base, folder, wanted = adapted(case)
    config, params = load_checkpoint(base, adapter=folder)
    found = logits(config, params)
    close(found, wanted)
    assert np.abs(found - logits(*load_checkpoint(base))).max() > 0.5


def test_a_base_of_another_format_takes_the_adapter_of_hugging_faces(tmp_path):
    """Meta's and GGUF's rows of q and k come in another order."""
    _, folder, wanted = adapted("gqa")
    _, model = tiny.hf_model("gqa")
    write_gguf(tmp_path / "model.gguf", model.config, model.state_dict())
    for base in (tiny.write_meta(tmp_path / "meta", model), tmp_path / "model.gguf"):
        close(logits(*load_checkpoint(base, adapter=folder)), wanted)


def test_the_layout_for_decoding_has_the_same_bits():
    base, folder, _ = adapted("patterns")
    opened = open_checkpoint(base, adapter=folder)
    wanted = for_decoding(opened.params())
    jax.tree.map(np.testing.assert_array_equal, opened.params(decoding=True), wanted)


@pytest.mark.slow
def test_over_eight_bits_it_stays_beside_the_matrices():
    base, folder, _ = adapted("patterns")
    opened = open_checkpoint(base, adapter=folder, quantize=True)
    narrow = open_checkpoint(base, quantize=True).params()
    merged = merge(narrow, opened.adapter_params("float32"), opened.lora)
    wanted = logits(opened.config, merged)
    for decoding in (False, True):
        params = opened.params(decoding=decoding)
        layer = params["layers"][0] if decoding else params["layers"]
        assert isinstance(layer["attn"]["wq"], Int8) and "wq_a" in layer["attn"]
        # A single row is rounded, several are not.
        close(logits(opened.config, params), wanted)


def test_it_reads_the_parts_of_a_shared_matrix_alone():
    base, folder, _ = adapted("gqa")
    opened = open_checkpoint(base, adapter=folder)
    source = opened.adapter.added_to(opened.source, leaves(opened.config, "hf"))
    name, part = "model.layers.1.mlp.up_proj.weight", (slice(3, 50), slice(8, 24))
    np.testing.assert_allclose(source.read_part(name, part), source.read(name)[part], rtol=1e-5)
    assert (source.read(name) != opened.source.read(name)).all()


# Out --------------------------------------------------------------------------------------------


def noisy(config, lora):
    tree = init_lora(config, lora, jax.random.key(1))
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), tree)


def pefts(name, folder):
    """peft's logits of an adapter on a model of transformers."""
    return logits_of(peft.PeftModel.from_pretrained(copy.deepcopy(tiny.hf_model(name)[1]), folder))


@pytest.mark.parametrize(
    "name, lora",
    [
        ("mha", dict(rank=3, alpha=4.5)),
        ("gqa", dict(rank=4)),
        ("qwen2_tied", dict(rank=1, alpha=1, targets=("wk", "w_down"))),
        ("qwen3_biases", dict(rank=2, targets=("wo", "w_gate"))),
    ],
)
def test_peft_loads_ours_and_has_the_merged_models_logits(name, lora, tmp_path):
    config, params = load_checkpoint(tiny.hf_model(name)[0])
    lora = LoRAConfig(**lora)
    tree = noisy(config, lora)
    save_adapter(tmp_path / "adapter", config, tree, lora, base=name)
    close(pefts(name, tmp_path / "adapter"), logits(config, merge(params, tree, lora)))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == name
    assert len(settings["target_modules"]) == len(lora.targets)
    with pytest.raises(CheckpointError, match="exists already"):
        save_adapter(tmp_path / "adapter", config, tree, lora, base=name)


@pytest.mark.parametrize("case", ["gqa", "patterns"])
def test_what_was_read_can_be_written_again(case, tmp_path):
    """With one rank and one scale for all: the rest is zeros, and factors of b."""
    base, folder, wanted = adapted(case)
    opened = open_checkpoint(base, adapter=folder)
    tree = opened.adapter_params("float32")
    save_adapter(tmp_path / "adapter", opened.config, tree, opened.lora, base="")
    close(pefts("gqa", tmp_path / "adapter"), wanted)
    again = open_checkpoint(base, adapter=tmp_path / "adapter")
    assert again.lora == opened.lora
    jax.tree.map(np.testing.assert_array_equal, again.adapter_params("float32"), tree)


# Training that goes on --------------------------------------------------------------------------


class WithReference(SFTConfig):
    """For a loss that compares with the model at the start."""

    needs_reference = True


@pytest.mark.slow
def test_training_goes_on_from_it_and_what_is_not_there_stays_away():
    base, folder, wanted = adapted("patterns")
    opened = open_checkpoint(base, adapter=folder)
    trainer = SFTTrainer(LLaMa(opened.config), WithReference(learning_rate=0.01), opened.lora)
    state, frozen = start(trainer, opened, opened.base.params(), jax.random.key(0))
    first = jax.tree.map(np.asarray, state.params)
    close(logits(opened.config, trainer.model_params(state.params, frozen)), wanted)
    step = fast(lambda s, f, b: trainer.train_step(s, f, b))
    state, metrics = step(state, frozen, batch_of([24, 17, 9], 24))
    assert metrics["updated"]
    moved = flatten(jax.tree.map(lambda x, y: np.asarray(x != y), state.params, first))
    for path, x in flatten(first).items():
        np.testing.assert_array_equal(moved[path], x != 0, err_msg=path)
    # Layers that it lacks, and the rows beyond a smaller rank.
    assert not first["layers"]["attn"]["wv_a"][1:].any()
    assert not first["layers"]["mlp"]["w_up_a"][2, 1:].any()
    # The reference is the model at the start; what is exported, base and adapter of now.
    close(logits(opened.config, frozen), wanted)
    exported = trainer.export_params(state, frozen)
    assert flatten(exported).keys() == flatten(opened.base.params()).keys()
    attached = logits(opened.config, trainer.model_params(state.params, frozen))
    close(logits(opened.config, exported), attached)
    assert np.abs(attached - wanted).max() > 0.1


@pytest.mark.slow
def test_a_run_writes_an_adapter_that_another_goes_on_from(programs, tmp_path):
    rows = [{"prompt": "Say " + "abc"[i % 3], "completion": "xyz"[i % 3]} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = cli.checkpoint()
    common = dict(ckpt_dir=base, data=tmp_path / "rows.jsonl", seq_len=32, max_steps=2, lr=0.1)
    done = programs.run("train.py", "sft", **common, out_dir=tmp_path / "one", lora_rank=2)
    assert done.code == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "one" / "adapter")
    wanted = logits_of(model)
    close(logits(*load_checkpoint(tmp_path / "one" / "export")), wanted)
    close(logits(*load_checkpoint(base, adapter=tmp_path / "one" / "adapter")), wanted)
    # Its weights come from there; the run knows it, and refuses another on a resume.
    more = common | dict(out_dir=tmp_path / "two", adapter=tmp_path / "one" / "adapter")
    check_error(programs.run("train.py", "sft", lora_rank=2, **more), 2, "leave out --lora_rank")
    done = programs.run("train.py", "sft", **more)
    assert done.code == 0 and "LoRA rank 2" in done.stderr, done.stderr
    second = logits(*load_checkpoint(base, adapter=tmp_path / "two" / "adapter"))
    close(logits(*load_checkpoint(tmp_path / "two" / "export")), second)
    assert 0.01 < np.abs(second - wanted).max()
    source = json.loads((tmp_path / "two" / "run.json").read_text())["source"]
    assert source["adapter"] == str(tmp_path / "one" / "adapter") and source["name"] == str(base)
    other = more | dict(adapter=tmp_path / "two" / "adapter", max_steps=3, resume=True)
    check_error(programs.run("train.py", "sft", **other), 2, "base_weights")
    out = dict(run=tmp_path / "two", out=tmp_path / "model")
    done = programs.run("train.py", "export", **out)
    assert done.code == 0, done.stderr
    close(logits(*load_checkpoint(base, adapter=tmp_path / "model-adapter")), second)
    adapter = ["--ckpt_dir", str(base), "--adapter", str(tmp_path / "model-adapter")]
    models = [["--ckpt_dir", str(tmp_path / "model")], adapter, [*adapter, "--quantize", "int8"]]
    asked = ["--prompt", "Say a", "--max_gen_len", "4", "--temperature", "0"]
    texts = [cli.inside("generate.py", *asked, *model).stdout for model in models]
    assert texts[0] == texts[1] and all(text.strip() for text in texts)
    data = ["--data", str(tmp_path / "rows.jsonl"), "--json"]
    found = [json.loads(programs.run("evaluate.py", "ppl", *data, *m).stdout) for m in models]
    np.testing.assert_allclose(*(x["loss"] for x in found[:2]), rtol=1e-5)
    assert abs(found[2]["loss"] - found[0]["loss"]) < 0.1


# Bad input --------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """A function that makes a changed copy of an adapter, and opens it."""

    def change(case="gqa", tensors=None, **settings):
        base, folder, _ = adapted(case)
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        if tensors is not None:
            held = load_file(tmp_path / "adapter_model.safetensors")
            tensors(held)
            save_file(held, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        return open_checkpoint(base, adapter=tmp_path)

    return change


HEAD = "base_model.model.lm_head.lora_A.weight"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.covers("A35")
def test_an_adapter_that_does_not_fit_is_named(broken, tmp_path):
    base, folder, _ = adapted("gqa")
    with pytest.raises(
        ArtifactError, match=r"k_proj.lora_B.weight' is \[32, 4\], expected \[64, 4"
    ):
        open_checkpoint(tiny.hf_model("mha")[0], adapter=folder)
    with pytest.raises(ArtifactError, match=r"r=8.* 42 misshapen: .* \[4, 64\], expected \[8, 64"):
        broken(r=8)
    with pytest.raises(ArtifactError, match=f"1 missing: '{FIRST}'"):
        broken(tensors=lambda held: held.pop(FIRST))
    with pytest.raises(ArtifactError, match=f"1 unexpected: '{HEAD}'"):
        broken(tensors=lambda held: held.update({HEAD: torch.zeros(4, 64), FIRST: held[FIRST]}))
    with pytest.raises(ArtifactError, match="6 unexpected: .*q_proj.lora_A"):
        broken(target_modules=EVERY[1:])
    with pytest.raises(ArtifactError, match="names no matrix of a layer"):
        broken(target_modules=["c_attn"])
    spoil = lambda held: held.update({FIRST: held[FIRST] * float("nan")})
    with pytest.raises(ArtifactError, match=f"NaN or infinity in '{FIRST}'"):
        broken(tensors=spoil, target_modules=EVERY).params()
    with pytest.raises(ArtifactError, match="holds no checkpoint|holds an adapter: pass it as"):
        open_checkpoint(folder)
    with pytest.raises(ArtifactError, match="holds no adapter: it lacks 'adapter_config.json'"):
        open_checkpoint(base, adapter=base)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="lacks .*safetensors'; load it with peft and save"):
        open_checkpoint(base, adapter=tmp_path)


@pytest.mark.covers("A36")
@pytest.mark.parametrize(
    "settings, pattern",
    [
        (dict(peft_type="IA3"), "peft_type='IA3', expected one of LORA"),
        (dict(use_dora=True), "use_dora=True is not supported"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\] is not supported"),
        (dict(lora_bias=True, bias="all"), "bias='all', expected one of none; lora_bias=True is"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(trainable_token_indices=[3]), "trainable_token_indices"),
        (dict(something_new={"a": 1}), "something_new"),
        (
            dict(init_lora_weights="pissa_niter_4"),
            "init_lora_weights='pissa_niter_4', expected true",
        ),
        (dict(init_lora_weights="olora"), "olora"),
        (dict(init_lora_weights="loftq"), "loftq"),
        (dict(r=0, lora_alpha=-1), "r=0, expected an integer from 1 .*; lora_alpha=-1, expected"),
        (dict(r=True, lora_alpha="8"), "r=True.*lora_alpha='8'"),
        (dict(target_modules=None), "target_modules=None, expected a regular expression or a list"),
        (dict(target_modules=[3]), "target_modules"),
        (dict(target_modules="(q"), r"'\(q' is not a regular expression"),
        (dict(target_modules="(.+)+!"), r"'\(\.\+\)\+!' repeats groups"),
        (dict(rank_pattern={"(.*)*!": 3}), "repeats groups"),
        (dict(rank_pattern={"q_proj": 0}), "rank_pattern"),
        (dict(alpha_pattern=[1]), "alpha_pattern"),
        (dict(layers_to_transform=["1"]), "layers_to_transform"),
        (dict(layers_pattern="h"), "layers_pattern"),
    ],
)
def test_settings_that_are_not_a_plain_adapters_are_refused_by_name(broken, settings, pattern):
    with pytest.raises(ArtifactError, match=f"adapter_config.json: .*{pattern}"):
        broken(**settings)
