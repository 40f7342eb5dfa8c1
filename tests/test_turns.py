"""Turns on one cache: what is sampled is what a full pass over the whole row would give."""

import functools
import random

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama.chat.turns import ROWS, WIDTHS, Turns, following_ids, read
from models.llama.chat_format import chat_format_for
from models.llama.decoding import GenerationConfig
from models.llama.load import load_checkpoint
from models.llama.model import LLaMa, for_decoding
from sampling import TopP
from tests import tiny
from tests.test_chat_format import CASES, cases, make

SAMPLER = TopP(temperature=1.0)
STOPS = frozenset(range(3, 23))  # a turn has about eight tokens
TURN, TURNS = 12, 4


@functools.cache
def load():
    config, params = load_checkpoint(tiny.hf_model("gqa")[0], dtype="float32")
    return LLaMa(config), params, for_decoding(params)


def prompts(n=9):
    draw = random.Random(1)
    return [draw.choices(range(30, 160), k=draw.randint(1, 30)) for _ in range(n)]


def said(row, turn):
    """What others say: 1 to 80 tokens, so some are read in several pieces."""
    draw = random.Random(row * 100 + turn)
    return draw.choices(range(30, 160), k=draw.choice((1, 3, 15, 16, 20, *WIDTHS, 80)))


def play(asked, order, stride=5, n=1):
    """Every row for TURNS turns; `order` chooses which of the ended rows read now.

    Returns, per row, its ids after the prompt, whether each was sampled, and the log-probs.
    """
    model, _, params = load()
    config = GenerationConfig(max_new_tokens=TURN, n=n, stop_ids=STOPS)
    run = Turns(model, params, SAMPLER, config)
    run.start(asked, key=jax.random.key(3), room=250)
    R = len(asked) * n
    ids, mask, counts, turn = [[] for _ in range(R)], [[] for _ in range(R)], [0] * R, [0] * R
    live = set(range(R))
    while live:
        done = run.completions()
        ended = [r for r in sorted(live) if done.finish_reason[r] != "running"]
        if run.running and len(ended) < order.choice((1, 3, R)):
            run.advance(stride)
            continue
        ended = order.sample(ended, order.randint(1, len(ended)))
        more = {}
        for r in ended:
            new = done.row(r)[counts[r] :]
            counts[r] += len(new)
            ids[r] += new
            mask[r] += [True] * len(new)
            turn[r] += 1
            if turn[r] == TURNS:
                live.remove(r)
                continue
            more[r] = said(r, turn[r])
            ids[r] += more[r]
            mask[r] += [False] * len(more[r])
        run.read(more, dict.fromkeys(more, TURN))
    done = run.completions()
    return ids, mask, [done.logprobs[r, : done.lengths[r]] for r in range(R)]


def test_several_turns_are_one_pass_over_the_whole_row():
    asked, (model, params, _) = prompts(), load()
    ids, mask, logprobs = play(asked, random.Random(0))
    longest = max(len(p) + len(i) for p, i in zip(asked, ids))
    full = np.zeros((len(asked), longest), np.int32)
    for row, prompt, more in zip(full, asked, ids):
        row[: len(prompt) + len(more)] = prompt + more
    logits = model.apply({"params": params}, jnp.asarray(full))[0]
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for r, prompt in enumerate(asked):
        at = [len(prompt) + i for i, sampled in enumerate(mask[r]) if sampled]
        wanted = [expected[r, i - 1, full[r, i]] for i in at]
        assert len(at) > 8 and not all(mask[r])
        np.testing.assert_allclose(logprobs[r], wanted, atol=1e-4)


@pytest.mark.slow
def test_a_row_may_fill_its_room():
    """The padding of its last piece has a place behind it."""
    model, params, decoding = load()
    prompt, more = list(range(30, 40)), list(range(60, 105))
    run = Turns(model, decoding, SAMPLER, GenerationConfig(max_new_tokens=8))
    run.start([prompt] * ROWS, key=jax.random.key(3), room=64)
    run.advance()
    run.read(dict.fromkeys(range(ROWS), more), dict.fromkeys(range(ROWS), 1))
    done = run.completions()
    row = prompt + done.row(0)[:8] + more + done.row(0)[8:]
    assert len(row) == 64
    logits = model.apply({"params": params}, jnp.asarray([row]))[0][0]
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    at = [*range(10, 18), 63]
    np.testing.assert_allclose(done.logprobs[0], [expected[i - 1, row[i]] for i in at], atol=1e-4)


def test_a_row_does_not_depend_on_when_it_reads_or_on_its_batch_mates():
    asked = prompts()
    assert len(asked) > ROWS
    first = play(asked, random.Random(0))
    for seed in (1, 2):
        ids, mask, logprobs = play(asked, random.Random(seed), stride=seed)
        assert ids == first[0] and mask == first[1]
        for one, other in zip(logprobs, first[2]):
            np.testing.assert_array_equal(one, other)
    alone = play(asked[4:5] * len(asked), random.Random(3))  # other mates, the same shapes
    sampled = [i for i, m in zip(alone[0][4], alone[1][4]) if m]
    assert sampled == [i for i, m in zip(first[0][4], first[1][4]) if m]
    np.testing.assert_array_equal(alone[2][4], first[2][4])


def test_reading_compiles_once_however_turns_vary():
    play(prompts(), random.Random(0))
    before = read._cache_size()
    for seed in (5, 6):
        play(prompts(), random.Random(seed), stride=3)
    assert read._cache_size() == before


@pytest.mark.parametrize("case", CASES)
@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(data=st.data())
def test_the_ids_after_an_answer_are_the_templates(make, case, data):
    form = chat_format_for(make(*cases(make)[case]))
    text = st.text("ab <>|_/im1\n", min_size=1, max_size=12).filter(str.strip)
    asked, answer, more = (data.draw(text) for _ in range(3))
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    said = [{"role": "user", "content": more}]
    after = following_ids(form, messages, said, None)
    whole, alone = form.encode_chat(messages + said), form.encode_chat(messages[:1])
    assert after == whole[len(whole) - len(after) :]
    assert whole[len(whole) - len(after) - 1] in form.tokenizer.stop_ids
    # As many stop tokens before it as the first message and the answer have.
    stops = form.tokenizer.stop_ids
    before = whole[: len(whole) - len(after)]
    assert sum(i in stops for i in before) == sum(i in stops for i in alone) + 1
