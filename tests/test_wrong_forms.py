"""Programs that users run, compiled: none has a form that XLA is known to compute wrong.

XLA's library of kernels for CPUs (YNN) computes two kinds of fused products wrong: those reduced over
another axis than the last (jaxlib 0.10.2, jax#39103), and those with a factor that is broadcast inside
(0.10.2 to 0.12.0.1). And on GPUs float32 means TF32 unless it is asked for.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sampling
from models.llama import decoding
from models.llama.presets import PRESETS
from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa, for_decoding, init_params
from tests import compiling
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.planning.hlo_text import parse
from trainers.sft_trainer import SFTConfig, SFTTrainer

pytestmark = pytest.mark.slow

# Real widths and few layers: of a stack, one is compiled.
DEFAULT, LARGE = (
    dataclasses.replace(PRESETS[name], n_layers=2) for name in ("smollm2-135m", "llama-3.2-1b")
)


def wrong_forms(text):
    """The fused products of a compiled program that XLA may compute wrong, as their opcodes."""
    found, (_, computations) = [], parse(text)
    calls = [i for c in computations.values() for i in c.values() if "__ynn_fusion" in i.rest]
    for call in calls:
        fused = computations[call.called]
        products = [i for i in fused.values() if i.opcode == "dot"]
        factors = {made_by(fused, name) for i in products for name in i.operands}
        sums = [i for i in fused.values() if i.opcode.startswith("reduce")]
        if products and ("broadcast" in factors or any(not of_last_axis(fused, i) for i in sums)):
            found.append([i.opcode for i in fused.values()])
    return found


def made_by(computation, name):
    """Opcode of what makes a value, apart from changes of its shape and dtype."""
    while computation[name].opcode in ("bitcast", "reshape", "transpose", "copy", "convert"):
        name = computation[name].operands[0]
    return computation[name].opcode


def of_last_axis(computation, reduction):
    last = len(computation[reduction.operands[0]].arrays[0].dims) - 1
    return reduction.attribute("dimensions") == f"{{{last}}}"


def test_the_wrong_forms_are_seen():
    broadcast = lambda E, c: jnp.sum((E @ jnp.broadcast_to(c[:, None, None], E.shape)) * E, -1)
    first_axis = lambda M, x: jax.vmap(lambda row: jnp.sum((M @ row) ** 2))(x)
    last_axis = lambda x, w: jnp.max(x @ w.T, -1)
    draw = np.random.default_rng(0).standard_normal
    for form, *shapes in ((broadcast, (5, 60, 60), (5,)), (first_axis, (3, 3), (40_000, 3))):
        arrays = [draw(shape, np.float32) for shape in shapes]
        compiled = jax.jit(form).lower(*arrays).compile()
        # A jaxlib that does not fuse them any more may pass for what it computes.
        with jax.disable_jit():
            exact = form(*(jnp.asarray(x) for x in arrays))
        assert wrong_forms(compiled.as_text()) or np.allclose(compiled(*arrays), exact, 1e-3, 1e-3)
    compiled = jax.jit(last_axis).lower(np.ones((512, 64)), np.ones((640, 64))).compile()
    assert not wrong_forms(compiled.as_text())


def shape(*dims, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(dims, dtype)


def sft(config, dtype, lora=None, packed=False, evaluation=False):
    """A step of SFT, or of an evaluation, traced."""
    trainer = SFTTrainer(LLaMa(config, dtype, "dots"), SFTConfig(), lora)
    batch = {"tokens": shape(4, 256), "target_mask": shape(4, 256, dtype=bool)}
    if packed:
        batch |= {"segment_ids": shape(4, 256), "positions": shape(4, 256)}
    state, frozen = start(trainer)
    if evaluation:
        return SFTTrainer.eval_step.trace(trainer, state.params, frozen, batch)
    return SFTTrainer.train_step.trace(trainer, state, frozen, batch)


def grpo(config, dtype, lora=None):
    """A step of GRPO, traced."""
    settings = GRPOConfig(beta=0.04, micro_batch_size=1, max_completion_len=64)
    trainer = GRPOTrainer(LLaMa(config, dtype, "dots"), settings, lora)
    by_token, numbers = functools.partial(shape, 2, 8, 64), shape(2, 8, dtype=jnp.float32)
    batch = {"tokens": by_token(), "target_mask": by_token(dtype=bool)}
    batch |= {"prompts": shape(2, 32), "prompt_lengths": shape(2)}
    batch |= {"counts": numbers, "advantages": numbers}
    batch |= dict.fromkeys(("sampler_logprobs", "ref_logprobs"), by_token(dtype=jnp.float32))
    return GRPOTrainer.train_step.trace(trainer, *start(trainer), batch)


def start(trainer):
    """Shapes of (state, frozen)."""
    config, key = trainer.model.config, jax.random.key(0)
    return jax.eval_shape(lambda: trainer.init(init_params(config, key), key))


def generation(config, dtype, rows, decodes):
    """Prefill of prompts of 256 tokens, or decode steps after it, traced."""
    key, model = jax.random.key(0), LLaMa(config)
    params = jax.eval_shape(lambda: for_decoding(init_params(config, key, dtype)))
    sampler = jax.eval_shape(lambda: sampling.traced(sampling.TopP(top_p=0.9)))
    keys = jax.eval_shape(lambda: jax.random.split(key, rows))
    rules = decoding.Rules(sampler, shape(8), shape())
    batch = shape(rows, 256), shape(rows), shape(rows), keys
    prefill = decoding.prefill.trace(model, (1, 512), params, rules, None, batch)
    if not decodes:
        return prefill
    return decoding.decode.trace(model, params, rules, prefill.out_info, shape())


LORA = LoRAConfig(rank=16)
F32, BF16 = jnp.float32, jnp.bfloat16
PROGRAMS = {
    "sft": lambda: sft(DEFAULT, F32),
    "sft, 1b": lambda: sft(LARGE, BF16),
    "sft, packed, LoRA": lambda: sft(DEFAULT, BF16, LORA, packed=True),
    "evaluation": lambda: sft(DEFAULT, F32, evaluation=True),
    "grpo": lambda: grpo(DEFAULT, BF16),
    "grpo, LoRA": lambda: grpo(DEFAULT, F32, LORA),
    "prefill": lambda: generation(DEFAULT, F32, 2, decodes=False),
    "prefill, 1b": lambda: generation(LARGE, BF16, 2, decodes=False),
    "decode, 1 row": lambda: generation(DEFAULT, BF16, 1, decodes=True),
    "decode, 1 row, 1b": lambda: generation(LARGE, F32, 1, decodes=True),
    "decode, 16 rows": lambda: generation(DEFAULT, F32, 16, decodes=True),
    "decode, 16 rows, 1b": lambda: generation(LARGE, BF16, 16, decodes=True),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_has_a_wrong_form(name):
    traced = PROGRAMS[name]()
    assert not wrong_forms(traced.lower().compile(compiling.in_haste()).as_text())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    inexact = [x for x in products if "xbf16>" not in x and "precision = [HIGHEST" not in x]
    # bfloat16's gradients have products of a float32 and a widened factor in attention.
    assert products and (not inexact or "xbf16>" in text), inexact
