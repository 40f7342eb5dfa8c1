"""The default model, real weights: greedy tokens equal transformers', from GGUF and from our export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from generate import GenerationConfig, generate
from models.llama.chat_format import chat_format_for
from models.llama.presets import PRESETS
from models.llama.load import load_checkpoint, save_checkpoint
from models.llama.model import LLaMa, for_decoding
from models.llama.tokenizer import load_tokenizer

RAW = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 4, 5,",
    "Water boils at",
    "The three laws of motion were written by",
)
CHAT = (
    "What is the capital of France?",
    "Write a haiku about snow.",
    "Give me three uses of a brick.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue? Explain in two sentences, and then give an example from daily life.",
)
NEW = 40


@pytest.fixture(scope="module", autouse=True)
def optimized():
    """A model of this size is worth it."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def ours(default_model_path):
    """(config, params in float32)."""
    return load_checkpoint(default_model_path, dtype="float32")


@pytest.fixture(scope="module")
def prompts(default_model_path):
    tokenizer = load_tokenizer(default_model_path)
    chat = chat_format_for(tokenizer)
    raw = [tokenizer.encode(text, bos=tokenizer.adds_bos) for text in RAW]
    return raw + [chat.encode_chat([{"role": "user", "content": text}]) for text in CHAT]


@pytest.fixture(scope="module")
def from_gguf(default_model_path):
    """transformers' own reading of the GGUF file."""
    path = default_model_path
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def rows(ours, prompts):
    """Greedy tokens behind each prompt."""
    config, params = ours
    done = generate(
        LLaMa(config),
        for_decoding(params),
        prompts,
        config=GenerationConfig(max_new_tokens=NEW),
    )
    return [done.row(i) for i in range(len(prompts))]


def their_greedy(model, prompt, row):
    """What transformers' greedy decoding takes after each token before: all at once, if `row` is it."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + row[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.argmax(-1).tolist()


def test_config_is_that_of_the_preset(ours):
    assert ours[0] == PRESETS["smollm2-135m"]


@pytest.mark.slow
def test_40_greedy_tokens_equal_transformers_on_11_prompts(rows, prompts, from_gguf):
    for i, row in enumerate(rows):
        assert len(row) == NEW
        assert row == their_greedy(from_gguf, prompts[i], row), f"prompt {i}"


@pytest.mark.slow
def test_logits_at_far_positions_equal_transformers(ours, from_gguf):
    # A forgotten permutation of wq and wk still reads well for twenty tokens.
    config, params = ours
    tokens = np.random.default_rng(0).integers(20, 49152, (1, 160)).astype(np.int32)
    run = jax.jit(lambda params: LLaMa(config).apply({"params": params}, tokens)[0])
    with torch.no_grad():
        theirs = from_gguf(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(run(params), theirs, atol=2e-3)


@pytest.mark.slow
def test_the_export_is_what_transformers_and_we_load(ours, rows, prompts, from_gguf, tmp_path):
    config, params = ours
    save_checkpoint(tmp_path / "export", config, params, format="hf")
    again_config, again = load_checkpoint(tmp_path / "export")
    assert again_config == config
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, params))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, from_gguf.state_dict()[name]), name
    assert rows[-1] == their_greedy(theirs, prompts[-1], rows[-1])
