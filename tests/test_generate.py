"""generate(): batches, stops, keys, limits, streaming, on tiny random models."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from models.llama import decoding
from models.llama.decoding import GenerationConfig
from models.llama.generation import Generation, RowText, finish, generate, stream, stream_text
from models.llama.load import load_checkpoint
from models.llama.model import LLaMa, for_decoding
from sampling import Greedy, TopP
from tests import tiny
from utils.errors import ArtifactError, SamplingError
from utils.kvcache import bucket

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 160, n).tolist() for n in (7, 1, 23, 20, 16)]
SAMPLER = TopP(temperature=0.9, top_p=0.9)


@functools.cache
def load(name="gqa"):
    config, params = load_checkpoint(tiny.hf_model(name)[0], dtype="float32")
    return LLaMa(config), for_decoding(params)


def run(prompts, sampler=Greedy(), name="gqa", key=None, tokenizer=None, **config):
    config = GenerationConfig(**{"max_new_tokens": 20, **config})
    return generate(*load(name), prompts, sampler, config, key=key, tokenizer=tokenizer)


def rows(done):
    return [done.row(i) for i in range(len(done.lengths))]


class Letters:
    """A tokenizer for these tests: token i is one letter, or a piece of one."""

    def decode(self, ids, skip_special=False, after=None):
        return "".join(map(self.push, ids))

    def stream(self, skip_special=False, after=None):
        return self

    def stop_id(self, stop):
        return None

    def push(self, token):
        return chr(97 + token % 26)

    def finish(self):
        return ""


@pytest.mark.parametrize("name", ["gqa", "qwen3_biases"])
def test_greedy_equals_transformers(name):
    model = tiny.hf_model(name)[1]
    done = run(PROMPTS, name=name)
    for prompt, ours in zip(PROMPTS, rows(done)):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            theirs = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert ours == theirs[0, len(prompt) :].tolist()
    assert done.finish_reason == ["length"] * len(PROMPTS)


# Most tests draw two samples of each prompt: they share two programs, of the prefill and of the steps.


@pytest.mark.covers("C7", "C10")
def test_a_row_is_the_same_alone_and_in_any_batch():
    together = run(PROMPTS, SAMPLER, n=2)
    order = [3, 0, 4, 2, 0]
    shuffled = run([PROMPTS[i] for i in order], SAMPLER, n=2)
    for place, i in enumerate(order):
        alone = run([PROMPTS[i]], SAMPLER, n=2)
        for j in range(2):
            assert together.row(2 * i + j) == shuffled.row(2 * place + j) == alone.row(j)
            np.testing.assert_allclose(together.logprobs[2 * i + j], alone.logprobs[j], atol=1e-4)


@pytest.mark.covers("C9")
def test_keys():
    key = jax.random.key(5)
    first = rows(run(PROMPTS, SAMPLER, key=key, n=2))
    assert first == rows(run(PROMPTS, SAMPLER, key=key, n=2))
    assert first != rows(run(PROMPTS, SAMPLER, key=jax.random.key(6), n=2))
    assert all(first[i] != first[i + 1] for i in range(0, 10, 2))  # samples of one prompt differ
    keys = jax.random.split(key, len(PROMPTS))
    own = rows(run(PROMPTS[2:3], SAMPLER, key=keys[2:3], n=2))
    assert rows(run(PROMPTS, SAMPLER, key=keys, n=2))[4:6] == own != first[4:6]


def test_each_draw_of_a_row_is_another_one():
    flat = rows(run(PROMPTS, TopP(temperature=1e6), n=2))
    # 20 draws of 160 ids that are equally likely have about 18.8 different ones.
    assert min(len(set(row)) for row in flat) > 12
    # Nor are the draws of one row those of another, or its own a step later.
    assert all(np.mean(np.equal(a[:19], b[k : 19 + k])) < 0.3 for a, b, k in _pairs(flat))


def _pairs(rows):
    """(a row, a row, how far the second is shifted), but for a row with itself in place."""
    return [
        (a, b, k)
        for i, a in enumerate(rows)
        for j, b in enumerate(rows)
        for k in (0, 1)
        if i != j or k
    ]


def test_streaming_equals_the_batch():
    model, params = load()
    config = GenerationConfig(max_new_tokens=20)
    done = run(PROMPTS, SAMPLER, n=2)  # a prompt's first sample is the one without others
    for i, prompt in enumerate(PROMPTS):
        pieces = list(stream(model, params, prompt, SAMPLER, config))
        assert [token for token, _ in pieces] == done.row(2 * i)
        np.testing.assert_allclose([lp for _, lp in pieces], done.logprobs[2 * i], atol=1e-4)


def test_logprobs_are_those_of_the_full_forward_pass():
    model, params = load()
    done = run(PROMPTS, TopP(temperature=0.7, top_p=0.8), n=2)
    whole = [PROMPTS[i // 2] + done.row(i) for i in range(10)]
    padded = np.asarray([row + [0] * (48 - len(row)) for row in whole])
    logits, _ = jax.jit(lambda params: model.apply({"params": params}, padded))(params)
    logprobs = np.asarray(jax.nn.log_softmax(logits / 0.7))
    for i, row in enumerate(whole):
        at = np.arange(len(PROMPTS[i // 2]), len(row))
        np.testing.assert_allclose(done.logprobs[i], logprobs[i, at - 1, row[at[0] :]], atol=1e-4)


@pytest.mark.covers("C8")
def test_stop_ids_end_a_row_and_the_others_go_on():
    free = rows(run(PROMPTS))
    stops = frozenset({free[0][0], free[2][5]})  # a first token, and one in the middle
    done = run(PROMPTS, stop_ids=stops)
    assert done.lengths[0] == 1 and done.finish_reason[0] == "stop"
    for i, row in enumerate(free):
        cut = next((k + 1 for k, token in enumerate(row) if token in stops), len(row))
        assert done.row(i) == row[:cut]
        assert (done.tokens[i, cut:] == 0).all()
        assert done.finish_reason[i] == ("stop" if row[cut - 1] in stops else "length")


def test_decoding_ends_early_when_all_rows_have_ended():
    free = rows(run(PROMPTS))
    model, params = load()
    stops = frozenset(row[3] for row in free)
    config = GenerationConfig(max_new_tokens=40, stop_ids=stops)
    active = Generation(model, params, Greedy(), config)
    active.start(PROMPTS)
    active.advance()
    # The cache holds all but a row's last token: nothing ran on after the last row ended.
    assert (np.asarray(active.state.cache.lengths) <= [len(p) + 4 for p in PROMPTS]).all()


@pytest.mark.covers("C8")
def test_stop_strings_across_tokens():
    free = rows(run(PROMPTS))
    letters = ["".join(chr(97 + t % 26) for t in row) for row in free]
    stop = letters[0][9:12]
    done = run(PROMPTS, stop_strings=(stop, "no such text"), tokenizer=Letters())
    for i, text in enumerate(letters):
        at = text.find(stop)
        if at < 0:
            assert done.row(i) == free[i] and done.stop_text[i] is None
        else:
            assert done.stop_text[i] == text[:at] and done.finish_reason[i] == "stop"
            assert done.row(i) == free[i][: at + 3]
    # In the first token, before any step of decoding.
    first = run(PROMPTS[:1], stop_strings=(letters[0][0],), tokenizer=Letters(), max_new_tokens=1)
    assert first.stop_text == [""] and first.finish_reason == ["stop"]
    with pytest.raises(SamplingError, match="none of them empty"):
        run(PROMPTS, stop_strings=("",), tokenizer=Letters())
    with pytest.raises(SamplingError, match="need a tokenizer"):
        run(PROMPTS, stop_strings=("a",))


def test_streamed_text_never_shows_a_part_of_a_stop_string():
    text = "".join(chr(97 + t % 26) for t in run(PROMPTS[:1]).row(0))
    stop = text[9:12]
    model, params = load()
    config = GenerationConfig(max_new_tokens=20, stop_strings=(stop, text[4:6] + "?"))
    active = Generation(model, params, Greedy(), config)
    active.start(PROMPTS[:1])
    pieces = list(stream_text(active, Letters()))
    assert "".join(pieces) == text[: text.find(stop)]
    assert active.completions().finish_reason == ["stop"]
    row = RowText(Letters(), GenerationConfig(stop_strings=(stop,)))
    for token in (ord(c) - 97 for c in stop[:2]):
        row.push(token)
    assert row.certain == 0 and row.text == stop[:2]


def test_a_stop_id_that_is_an_ordinary_token_is_in_no_text():
    """generation_config.json may name any id, and `skip_special` leaves out control tokens alone."""
    model, params = load()
    ids = run(PROMPTS[:1]).row(0)
    stop = next(i for i in range(4, 20) if ids[i] not in ids[:i])
    expected = Letters().decode(ids[:stop])
    config = GenerationConfig(max_new_tokens=20, stop_ids=frozenset({ids[stop]}))
    done = generate(model, params, PROMPTS[:1], Greedy(), config)
    assert done.row(0) == ids[: stop + 1] and done.finish_reason == ["stop"]
    assert done.text(0, Letters()) == expected
    for never in ((), ("?",), (chr(97 + ids[stop] % 26) + "?",)):
        active = Generation(
            model, params, Greedy(), dataclasses.replace(config, stop_strings=never)
        )
        active.start(PROMPTS[:1])
        assert "".join(stream_text(active, Letters())) == expected
    # A stop string that only the stop token's text would end is none.
    last = Letters().push(ids[stop])
    if last not in expected:
        found = run(
            PROMPTS[:1], stop_ids=config.stop_ids, stop_strings=(last,), tokenizer=Letters()
        )
        assert found.stop_text == [None] and found.text(0, Letters()) == expected
    assert run(PROMPTS[:1]).text(0, Letters()) == Letters().decode(ids)  # cut by the limit: whole


@pytest.mark.parametrize("stops", [("bc", "c"), ("c", "bc"), ("d", "bc", "abcd")])
def test_of_stop_strings_that_appear_together_the_first_in_the_text_cuts(stops):
    row = RowText(Letters(), GenerationConfig(stop_strings=stops))
    for token in range(3):
        assert not row.stopped
        row.push(token)
    assert row.stopped and row.text == "a" and row.tokens == 3 and row.certain == 1


@pytest.mark.covers("C3")
def test_numbers_of_new_tokens():
    none = run(PROMPTS, max_new_tokens=0)
    assert none.lengths.tolist() == [0] * 5 and none.finish_reason == ["length"] * 5
    assert run(PROMPTS, max_new_tokens=1).lengths.tolist() == [1] * 5
    for large in (2**31, None):
        done = run(PROMPTS, max_new_tokens=large, max_seq_len=60)
        assert done.lengths.tolist() == [60 - len(prompt) for prompt in PROMPTS]
    for wrong in (-1, 1.5, True, "8"):
        with pytest.raises(SamplingError, match="max_new_tokens"):
            run(PROMPTS, max_new_tokens=wrong)


@pytest.mark.covers("C1")
def test_prompts_that_do_not_fit_are_refused_with_their_counts():
    prompt = RNG.integers(3, 160, 30).tolist()
    # The last token of a full context is right: nothing was written over.
    whole = run([prompt], max_new_tokens=10).row(0)
    assert run([prompt], max_new_tokens=10, max_seq_len=40).row(0) == whole
    assert run([prompt], max_new_tokens=1, max_seq_len=31).row(0) == whole[:1]
    message = "30 tokens and max_gen_len=10: 40 exceed max_seq_len=39; .* pass --max_seq_len 40"
    with pytest.raises(SamplingError, match=message):
        run([prompt], max_new_tokens=10, max_seq_len=39)
    for context in (30, 29):
        with pytest.raises(SamplingError, match="30 tokens: no room"):
            run([prompt], max_new_tokens=10, max_seq_len=context)


@pytest.mark.covers("C1")
def test_more_than_the_models_context_is_refused():
    context = load()[0].config.max_seq_len
    with pytest.raises(SamplingError, match=f"={context}; shorten either$"):
        run([[5]], max_new_tokens=context, max_seq_len=context)


@pytest.mark.covers("C14")
def test_a_cache_that_grows_must_fit(monkeypatch):
    model, params = load()
    first = Generation(model, params, Greedy(), GenerationConfig(max_new_tokens=4))
    first.start([[5]])
    monkeypatch.setattr("utils.memory.available_bytes", lambda: 1000)
    longer = Generation(model, params, Greedy(), GenerationConfig(max_new_tokens=100))
    with pytest.raises(ArtifactError, match="KV cache of 1 rows of 128 tokens"):
        longer.start([[6]], cache=first.state.cache)
    again = Generation(model, params, Greedy(), GenerationConfig(max_new_tokens=4))
    again.start([[6]], cache=first.state.cache)  # it does not grow


@pytest.mark.covers("C2")
def test_empty_prompts():
    with pytest.raises(SamplingError, match="prompt 1 is empty"):
        run([[5], []])
    with pytest.raises(SamplingError, match="no prompts"):
        run([])
    assert len(run([[1]]).row(0)) == 20  # BOS alone


@pytest.mark.covers("B13")
@pytest.mark.parametrize("token", [-1, 160, 2**31])
def test_ids_outside_the_vocabulary(token):
    with pytest.raises(SamplingError, match=f"token id {token}, expected 0..159"):
        run([[3, token]])


@pytest.mark.covers("C6")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_named_by_row_and_step(value):
    model, params = load()
    prompts = [PROMPTS[0], PROMPTS[1], *[PROMPTS[0]] * 3]
    free = run(PROMPTS).row(1)
    bad = {**params, "embed": params["embed"].at[free[3]].set(value)}
    # Row 1 meets the broken row of the embedding when it has sampled four tokens.
    assert free[3] not in PROMPTS[0] + PROMPTS[1] + free[:3]
    with pytest.raises(SamplingError, match="row 1 at step 4 are not finite") as e:
        config = GenerationConfig(max_new_tokens=8, prompt_width=24)
        generate(model, bad, prompts, Greedy(), config)
    assert e.value.exit_code == 5


@pytest.mark.covers("B6")
def test_padding_rows_of_the_vocabulary_are_never_sampled():
    done = run(PROMPTS, TopP(temperature=50.0), vocab_limit=40, n=2)
    assert done.tokens.max() < 40
    full = run(PROMPTS, TopP(temperature=50.0), n=2)
    assert full.tokens.max() >= 150


def test_repetition_penalty_counts_the_prompt_and_the_completion():
    model = tiny.hf_model("gqa")[1]
    done = run(PROMPTS, Greedy(repetition_penalty=1.5))
    assert rows(done) != rows(run(PROMPTS))
    for prompt, ours in zip(PROMPTS, rows(done)):
        theirs = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=20,
            do_sample=False,
            repetition_penalty=1.5,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ours == theirs[0, len(prompt) :].tolist()


def test_a_filled_cache_goes_on():
    model, params = load()
    row = PROMPTS[3] + run(PROMPTS[3:4]).row(0)
    config = GenerationConfig(max_new_tokens=10)
    first = Generation(model, params, Greedy(), config)
    first.start([PROMPTS[3]])
    done = finish(first)
    assert first.state.cache.lengths.tolist() == [len(PROMPTS[3]) + 9]
    second = Generation(model, params, Greedy(), config)
    second.start([done.row(0)[-1:]], cache=first.state.cache)
    assert PROMPTS[3] + done.row(0) + finish(second).row(0) == row
    with pytest.raises(SamplingError, match="n=2 with a filled cache, expected n=1"):
        Generation(model, params, Greedy(), GenerationConfig(n=2, max_new_tokens=1)).start(
            [[5]], cache=second.state.cache
        )


@pytest.mark.covers("R6")
def test_rows_that_ended_apart_go_on_apart():
    """Each at the slot behind its own last token, whichever step its neighbours ran to."""
    model, params = load()
    sampler = Greedy(repetition_penalty=1.5)
    stop = run(PROMPTS, sampler).row(1)[3]
    config = GenerationConfig(max_new_tokens=9, stop_ids=frozenset({stop}))
    first = Generation(model, params, sampler, config)
    first.start(PROMPTS)
    done = finish(first)
    assert done.lengths.tolist() == [9, 4, 9, 9, 9] == [len(done.row(i)) for i in range(5)]
    # The cache holds all of a row but its last token.
    held = [len(p) + n - 1 for p, n in zip(PROMPTS, done.lengths)]
    assert first.state.cache.lengths.tolist() == held
    turn = [5, 9, 2, 8, 4]
    second = Generation(model, params, sampler, GenerationConfig(max_new_tokens=9))
    second.start([done.row(i)[-1:] + turn[: i + 1] for i in range(5)], cache=first.state.cache)
    fresh = [p + done.row(i) + turn[: i + 1] for i, p in enumerate(PROMPTS)]
    assert rows(finish(second)) == rows(run(fresh, sampler, max_new_tokens=9))


def test_buckets():
    sizes = sorted({bucket(n, 16) for n in range(1, 4097)})
    assert sizes == [
        16,
        24,
        32,
        48,
        64,
        96,
        128,
        192,
        256,
        384,
        512,
        768,
        1024,
        1536,
        2048,
        3072,
        4096,
    ]
    assert all(n <= bucket(n, 16) <= max(16, n * 1.5) for n in range(1, 5000))


def test_other_lengths_and_numbers_do_not_retrace(monkeypatch):
    traces = []
    sample = decoding.sample
    monkeypatch.setattr(decoding, "sample", lambda *a: traces.append(1) or sample(*a))
    model, params = load()
    # Of another context, so that no other test has traced it.
    model = LLaMa(dataclasses.replace(model.config, max_seq_len=200))

    def run(prompts, sampler, **config):
        generate(model, params, prompts, sampler, GenerationConfig(**config))

    run(PROMPTS[:2], TopP(), max_new_tokens=20)
    assert len(traces) == 2  # once in prefill, once in decode
    run([PROMPTS[0] + [9], [4] * 11], TopP(0.3, 0.4, 5, 0.1), max_new_tokens=43)
    run([[5], [4]], TopP(0, 1), stop_ids=frozenset({7, 9}), max_new_tokens=20)
    assert len(traces) == 2
