"""What a job needs: closed forms, the command line, and one real step compiled for a TPU."""

import dataclasses
import json
import re
import types

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from models.llama.presets import PRESETS
from models.llama.formats import hf
from tests.cli import inside, run
from trainers.planning.chips import CHIPS, parse_topologies, parse_topology, roofline
from trainers.planning.compile import Compiler, attention_cost, device_bytes, needed_bytes
from trainers.planning.estimate import estimate_job
from trainers.planning.hlo_text import Array
from trainers.planning.job import Job, model_config
from trainers.planning.search import search_job
from utils.errors import ConfigError
from utils.sharding import MESH_AXES

KEYS = "fits argument_bytes temp_bytes peak_bytes flops bytes_accessed collective_bytes"
KEYS += " roofline_seconds compile_seconds"
ONE = dict.fromkeys(MESH_AXES, 1)
ONE_DEVICE = AbstractMesh(tuple(ONE.values()), tuple(ONE), axis_types=(AxisType.Auto,) * 4)
SMOL = PRESETS["smollm2-135m"]


def job(name="llama-3.2-1b", **changes):
    fields = dict(model=PRESETS[name], kind="sft", batch=4, seq=2048, prompt_len=512)
    return Job(**fields | dict(remat="block") | changes)


def programs(mesh=None, **changes):
    return {p.name: p for p in estimate_job(job(**changes), ONE | (mesh or {}))}


def test_a_step_computes_six_products_a_parameter_and_token_and_two_more_where_it_recomputes():
    n, tokens = PRESETS["llama-3.2-1b"].n_params, 4 * 2048
    attention = 2 * 4 * 2048**2 * 2048 * 16
    step = programs(remat="dots")["train step"]
    assert step.cost.flops == pytest.approx(6 * n * tokens + 4.5 * attention, rel=0.001)
    again = programs()["train step"].cost.flops - step.cost.flops
    layers = n - 128256 * 2048 - 16 * 8192 * 2048  # all but the last product of a layer
    assert again == pytest.approx(2 * layers * tokens + attention, rel=0.001)
    assert programs({"fsdp": 4})["train step"].cost.flops * 4 == pytest.approx(
        programs()["train step"].cost.flops
    )


def test_a_group_computes_its_prompt_once_and_its_logits_twice():
    # 2 prompts with 8 completions.
    flops = programs(kind="grpo", batch=16, seq=1024, prompt_len=256, remat="dots")
    head, n = 128256 * 2048, PRESETS["llama-3.2-1b"].n_params
    expected = 2 * 6 * (n - head) * (256 + 8 * 768) + 16 * 8 * head * 768
    seen = 2 * (256**2 + 8 * 768 * (2 * 256 + 768))
    expected += 4.5 * 2 * seen * 2048 * 16
    assert flops["train step"].cost.flops == pytest.approx(expected, rel=0.001)


def test_decoding_reads_the_weights_and_the_cache():
    step = programs({"tensor": 8}, name="llama-3.1-8b", kind="generate", batch=32, seq=4096)
    weights = PRESETS["llama-3.1-8b"].n_params * 2
    cache = 2 * 32 * 32 * 8 * 4096 * 128 * 2
    found = step["decode step"].cost
    assert found.bytes_accessed == pytest.approx((weights + cache) / 8, rel=0.001)
    assert step["decode step"].argument_bytes == pytest.approx((weights + cache) / 8, rel=0.001)
    assert step["decode step"].runs == 4096 - 512 - 1


def test_sharing_parameters_costs_gathering_them():
    alone, shared = programs()["train step"], programs({"fsdp": 8}, batch=32)["train step"]
    assert alone.cost.collectives == {}
    head, tokens = 128256 * 2048, 4 * 2048 * 2048
    layers = PRESETS["llama-3.2-1b"].n_params - head
    assert shared.cost.collectives == {
        # Matrices twice, and a chunk's hidden states.
        "all-gather": pytest.approx(2 * 2 * layers * 7 / 8 + 2 * 7 * tokens, rel=0.001),
        "reduce-scatter": pytest.approx(4 * layers * 7 / 8 + 4 * 7 * tokens, rel=0.001),
        # The head and the embedded tokens, and their gradients.
        "all-to-all": pytest.approx(2 * 7 / 8 * (4 * head / 8 + 2 * tokens), rel=0.001),
    }
    assert shared.parts["parameters"] == pytest.approx(alone.parts["parameters"] / 8, rel=0.001)
    tensor = programs({"tensor": 4})["train step"].cost.collectives
    # Five results of a layer in float32; the head's gradient by its input, the embedded tokens.
    assert tensor == {"all-reduce": pytest.approx(2 * 3 / 4 * tokens * (16 * 5 * 4 + 4 + 2))}


def test_a_second_micro_batch_adds_up_gradients_in_float32():
    steps = (programs(batch=64, micro_batch_size=n)["train step"].parts for n in (None, 32))
    whole, halves = steps
    assert "sums of gradients" not in whole
    assert halves["sums of gradients"] == 4 * PRESETS["llama-3.2-1b"].n_params
    assert halves["activations"] * 2 == whole["activations"] == 16 * 64 * 2048 * 2048 * 2


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b"])
@pytest.mark.parametrize(
    "changes",
    [
        *(dict(optimizer=name) for name in ("adamw", "adafactor", "lion", "muon")),
        *(dict(kind="lora", lora_rank=16, optimizer=name) for name in ("adamw", "adafactor")),
        dict(kind="grpo"),
        dict(kind="grpo", lora_rank=8, param_dtype="bfloat16", state_dtype="bfloat16"),
    ],
)
def test_what_a_step_is_given_is_exact(name, changes):
    """Next to the trainer's own arrays, as they lie on a mesh."""
    wanted = job(name, batch=128, **changes)
    sizes = {"data": 2, "fsdp": 2, "context": 2, "tensor": 2}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        real = Compiler(wanted, mesh, False, lambda what: None)
        batch = device_bytes(real.batch())
    found = estimate_job(wanted, sizes)[-1].parts
    for part, size in (real.stays | {"batch": batch}).items():
        assert found.get(part, 0) == pytest.approx(size, rel=0.003 if part == "optimizer" else 0)


def test_adapters_need_neither_gradients_nor_moments_of_the_model():
    lora = programs(kind="lora", lora_rank=16)["train step"].parts
    full = programs()["train step"].parts
    assert lora["frozen parameters"] == 2 * PRESETS["llama-3.2-1b"].n_params
    assert lora["parameters"] == 4 * 16 * 16 * (2 * 2048 * 2 + 2 * 2560 + 3 * (2048 + 8192))
    assert (
        lora["optimizer"] == 2 * lora["parameters"] and full["optimizer"] > 30 * lora["optimizer"]
    )


def test_a_rollout_is_held_beside_the_training_state():
    found = programs(kind="grpo", batch=16)
    state = found["train step"].parts
    for name in ("prefill", "decode step"):
        assert found[name].parts["optimizer"] == state["optimizer"]
        assert found[name].parts["policy for sampling"] == 2 * PRESETS["llama-3.2-1b"].n_params


def test_a_kernels_cost_by_its_name_and_shapes():
    array = lambda *dims, kind="bf": Array(dims, kind, 16, False)
    info, q, k = array(2, 4, 4, kind="s"), array(2, 32, 1024, 64), array(2, 8, 1024, 64)
    one = 2 * 32 * 1024 * 1024 * 64  # half of a product of all pairs, two a multiply-add
    for name, products in {"fwd_residuals": 2, "dq_no_residuals": 3, "dkv_segmented": 4}.items():
        flops, moved = attention_cost(f"jit(f)/splash_mha_{name}", [info, q, k, k, q])
        assert flops == products * one
        assert moved == 2 * (2 * q.size / 2 + 2 * k.size / 2 + info.size / 2)
    turned = [info, array(2, 32, 64, 1024), array(2, 8, 64, 2048), array(2, 8, 64, 2048), q]
    assert attention_cost("splash_mqa_fwd", turned)[0] == 2 * one * 3
    assert attention_cost("other", [q, k, k])[0] == 0


def test_the_roofline_is_flops_bytes_and_links_over_the_chips_own():
    v5e = CHIPS["v5e"]
    assert roofline(v5e, 197e12, 819e9 / 2, 50e9) == {"compute": 1, "memory": 0.5, "links": 0.25}
    assert v5e.memory_bytes < 16 * 2**30 < CHIPS["v6e"].memory_bytes


@pytest.mark.parametrize(
    "text",
    ["v5e", "v5e:", "v9e:4", "v5e:4x", "v5e:0x4", "v5e:2x2x2", "v5p:4x4", "v5e:x", "h100:-1"],
)
def test_an_unknown_topology_says_what_is_known(text):
    with pytest.raises(ConfigError, match=re.escape(repr(text))):
        parse_topology(text)
    assert parse_topology("v5p:2x2x4").n_chips == 16 and parse_topology("h100:8").n_chips == 8


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(kind="dpo"), ["kind='dpo'", "sft, lora, grpo, generate"]),
        (dict(batch=0, seq=True, remat="all"), ["batch=0", "seq=True", "remat='all'"]),
        (dict(dtype="float8", optimizer="sgd"), ["dtype='float8'", "optimizer='sgd'"]),
        (dict(seq=10**6), ["seq=1000000", "131072"]),
        (dict(kind="generate", prompt_len=2048), ["prompt_len=2048", "seq=2048"]),
        (dict(kind="grpo", batch=12), ["batch=12"]),
        (dict(kind="lora", lora_rank=0), ["lora_rank=0"]),
    ],
)
def test_a_wrong_job_says_all_that_is_wrong(changes, named):
    with pytest.raises(ConfigError) as e:
        job(**changes)
    assert all(text in str(e.value) for text in named)


def test_what_xla_says_of_a_program_that_does_not_fit():
    text = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    assert (
        needed_bytes(text + "Used 22.50G of 15.75G hbm. Exceeded by 6.75G.") == 22.505 * 2**30 // 1
    )
    text = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    assert needed_bytes(text + "(64.00G) exceeds available HBM (15.75G).") == 64.005 * 2**30 // 1
    assert needed_bytes("INTERNAL: something else") is None


def test_a_model_may_be_a_preset_a_config_or_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf.from_config(SMOL)))
    assert model_config("smollm2-135m") == model_config(str(tmp_path)) == SMOL
    assert model_config(str(tmp_path / "config.json")) == SMOL
    with pytest.raises(ConfigError, match="llama-3.1-405b"):
        model_config("llama-9")


def test_the_search_takes_the_cheapest_way_that_fits():
    topology = parse_topology("v5e:2x4")
    tried = []

    def compile_(job, topology, mesh):
        tried.append((job, mesh))
        found = estimate_job(job, mesh)
        # Twice what was estimated, as a compiler might find.
        return [dataclasses.replace(p, parts={k: 2 * n for k, n in p.parts.items()}) for p in found]

    estimated = lambda job, topology, mesh: estimate_job(job, mesh)
    best, where, mesh, found = search_job(job(batch=512), [topology], estimated)
    assert max(p.peak_bytes for p in found) <= topology.chip.memory_bytes
    with_less, *_, found = search_job(job(batch=512), [topology], compile_)
    assert len(tried) == 2 and max(p.peak_bytes for p in found) <= topology.chip.memory_bytes
    assert (with_less.batch, with_less.remat) != (best.batch, best.remat)
    with pytest.raises(ConfigError, match="no mesh"):
        search_job(job("llama-3.1-405b", batch=64), [topology], estimated)
    _, where, _, _ = search_job(job("llama-3.1-70b", batch=64), parse_topologies("v5p"), estimated)
    smaller = [place for place in parse_topologies("v5p") if place.n_chips < where.n_chips]
    assert smaller
    with pytest.raises(ConfigError, match="v5p:2x2x1"):
        search_job(job("llama-3.1-70b", batch=64), smaller, estimated)


def test_the_search_takes_most_rows_and_cuts_groups_and_rows_where_it_must():
    estimated = lambda job, topology, mesh: estimate_job(job, mesh)
    v5p, v5e = parse_topology("v5p:2x2x1"), parse_topology("v5e:8x8")
    best, _, mesh, found = search_job(job(batch=512), [v5p], estimated)
    assert best.micro_batch_size is None and best.batch > 4 and mesh["context"] == 1
    twice = estimate_job(dataclasses.replace(best, batch=2 * best.batch), mesh)
    assert max(p.peak_bytes for p in found) <= v5p.chip.memory_bytes
    assert max(p.peak_bytes for p in twice) > v5p.chip.memory_bytes
    small = dict(param_dtype="bfloat16", state_dtype="bfloat16", seq=4096, prompt_len=1024)
    group = job("llama-3.1-70b", kind="grpo", batch=512, **small)
    best, _, mesh, _ = search_job(group, [v5e], estimated)
    assert best.micro_batch_size is not None or mesh["context"] > 1
    # Of a group in one row the completions alone are kept; as rows of their own they have their prompts.
    one, whole = (
        estimate_job(dataclasses.replace(group, micro_batch_size=n), mesh)[-1] for n in (1, 8)
    )
    ratio = 8 * one.parts["activations"] / whole.parts["activations"]
    assert ratio == pytest.approx(8 * 4096 / (1024 + 8 * 3072), rel=0.01)


def cli(*args):
    done = inside("plan.py", "--estimate", *args)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_line_says_what_fits_and_exits_by_it():
    flags = "--model llama-3.2-1b --seq 1024 --remat block --json".split()
    code, out, err = cli(*flags, "--topology", "v5e:2x2")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["fits"] and set(KEYS.split()) <= set(found)
    assert found["peak_bytes"] + found["spare_bytes"] == 15.75 * 2**30
    assert found["peak_bytes"] == sum(found["programs"][0]["parts"].values())
    code, out, _ = cli("--model", "llama-3.1-70b", "--topology", "h100:8", "--batch", "8")
    assert code == 1 and re.search(r"does not fit, by [\d.]+ GB \(estimated", out)
    code, out, err = cli("--model", "llama-3.1-8b", "--topology", "v5e:2x4", "--mesh", "fsdp=3")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "8" in err
    flags = "--model llama-3.1-8b --topology v5e:2x4 --job grpo --batch 32 --mesh fsdp=4,context=2"
    code, out, err = cli(*flags.split(), "--json")
    assert code in (0, 1) and json.loads(out)["job"]["batch"] == 32
    code, out, err = cli(*flags.replace("context", "data").split())
    assert (code, out) == (2, "") and "4 rows of 8 completions, which data=2 x fsdp=4" in err


@pytest.mark.parametrize(
    "name, rows, sizes",
    [
        ("llama-3.1-8b", 6, {"tensor": 8}),
        ("llama-3.1-8b", 32, {"data": 2, "fsdp": 4, "tensor": 4}),
        ("llama-3.1-8b", 6, {"data": 2, "fsdp": 4, "tensor": 4}),
        ("llama-3.1-8b", 32, {"tensor": 16}),
        ("llama-3.1-8b", 32, {"fsdp": 2, "context": 4, "tensor": 2}),
        ("smollm2-135m", 32, {"fsdp": 4, "tensor": 2}),
        ("smollm2-135m", 5, {"fsdp": 4}),
    ],
)
def test_what_a_device_holds_of_the_kv_cache_is_exact(name, rows, sizes):
    sizes = ONE | sizes
    wanted = job(name, kind="generate", batch=rows, seq=2100)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        cache = Compiler(wanted, mesh, False, lambda what: None).cache(rows, 3072)
    for program in estimate_job(wanted, sizes):
        assert program.parts["KV cache"] == device_bytes((cache.k, cache.v))


def test_a_losss_loop_goes_over_completions_alone():
    one = Compiler(job(kind="grpo", batch=16, seq=1024), ONE_DEVICE, False, lambda what: None)
    assert one.loss_chunks() == 16 * 512 // 256


class Compiled:
    """What XLA says of a program that holds 70 bytes at most, 50 of them given."""

    def as_text(self):
        return "HloModule m\n\nENTRY %e (a: f32[2]) -> f32[2] {\n  ROOT %a = f32[2]{0} parameter(0)\n}\n"

    def memory_analysis(self):
        sizes = dict(argument=50, output=55, alias=48, temp=40)
        sizes = {f"{name}_size_in_bytes": size for name, size in sizes.items()}
        return types.SimpleNamespace(peak_memory_in_bytes=70, **sizes)


def test_a_program_needs_what_lives_at_once_and_not_what_xla_reserves():
    lowered = types.SimpleNamespace(compile=lambda options: Compiled())
    one = Compiler(job(), ONE_DEVICE, False, lambda what: None)
    found, _ = one.compile("train step", lambda: lowered, {"parameters": 50})
    assert found.parts == {"parameters": 50, "results": 7, "temporaries": 13}
    assert (found.peak_bytes, found.temp_bytes, found.reserved_bytes) == (70, 13, 40)


def test_a_program_that_xla_refuses_does_not_fit_beside_the_training_state():
    def refused(options):
        raise jax.errors.JaxRuntimeError("… Used 15.75G of 15.75G hbm. Exceeded by 1.0M.")

    lowered = types.SimpleNamespace(compile=refused)
    one = Compiler(job(kind="grpo", batch=16), ONE_DEVICE, False, lambda what: None)
    limit, state = CHIPS["v5e"].memory_bytes, sum(one.stays.values())
    for name, given, beside, least in (
        ("train step", one.stays, {}, limit),
        ("prefill", {"policy for sampling": 10**9}, one.stays, limit + state),
    ):
        found, compiled = one.compile(name, lambda: lowered, given, beside)
        assert compiled is None and least < found.peak_bytes < 1.001 * least


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--batch 4 --remat none --job lora --mesh fsdp=2,tensor=2",
        "--batch 2 --remat block --mesh fsdp=2,context=2",
    ],
)
def test_the_closed_form_of_a_real_step_compiled_for_a_tpu(flags):
    flags = f"--model llama-3.2-1b --topology v5e:2x2 --seq 2048 --json {flags}".split()
    done = run("plan.py", *flags, timeout=600)
    assert done.returncode == 0, done.stderr
    found, estimate = (
        json.loads(x.stdout) for x in (done, inside("plan.py", "--estimate", *flags))
    )
    assert found["compiled"] and not estimate["compiled"]
    exact, close = ("argument_bytes", "flops"), ("temp_bytes", "peak_bytes", "collective_bytes")
    for key in exact:
        assert found[key] == pytest.approx(estimate[key], rel=0.005), key
    for key in close:
        assert estimate[key] == pytest.approx(found[key], rel=0.1), key
    assert found["compile_seconds"] > 1 and found["temp_bytes"] <= found["reserved_bytes"]
