"""Datasets: what becomes of a row, and that batches are a function of seed and position."""

import copy
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from models.llama.chat_format import chat_format_for
from models.llama.tokenizer import load_tokenizer
from tests.oracles import tokenizer_files as oracle
from trainers.data import DataConfig, Dataset, load_dataset, tokenizer_digest
from trainers.data import Examples
from utils.errors import ArtifactError, ConfigError, DataError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
MORE = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye now."}]


@pytest.fixture(scope="module")
def smollm(default_model_path):
    return load_tokenizer(default_model_path)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama2")
    (folder / "tokenizer.model").write_bytes(oracle.sentencepiece_model())
    return load_tokenizer(folder)


@pytest.fixture
def load(tmp_path, smollm):
    def load(rows, tokenizer=None, skip_bad=0, **options):
        path = tmp_path / "data.jsonl"
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines))
        config = DataConfig(**{"shuffle": False, "batch_size": 1} | options)
        return load_dataset(path, tokenizer or smollm, config, skip_bad=skip_bad)

    return load


def documents(data):
    """(ids, targets) of each unpacked row; the lengths are the dataset's own."""
    rows = [
        (tokens, mask)
        for batch in data.epoch_batches()
        for tokens, mask in zip(batch["tokens"], batch["target_mask"])
    ]
    return [
        (tokens[:n].tolist(), mask[:n].tolist()) for (tokens, mask), n in zip(rows, data._lengths)
    ]


def numbered(lengths, **options):
    """A dataset in which the tokens of example i are all i + 1."""
    examples = Examples(options.get("seq_len", 512), "truncate")
    for i, n in enumerate(lengths):
        examples.add([i + 1] * n, [True] * n, is_text=True)
    return Dataset("numbers.jsonl", DataConfig(**options), examples, "digest")


# From a row to targets --------------------------------------------------------------------------


def test_text_has_bos_and_eos_and_all_targets_but_the_first(load, smollm, llama2):
    for tokenizer in (smollm, llama2):
        ((ids, targets),) = documents(load([{"text": "the cat sat"}], tokenizer))
        bos = [tokenizer.bos_id] * tokenizer.adds_bos
        assert ids == [*bos, *tokenizer.encode("the cat sat"), tokenizer.eos_id]
        assert targets == [False] + [True] * (len(ids) - 1)
    assert llama2.adds_bos and not smollm.adds_bos


@pytest.mark.covers("N14")
def test_columns_that_nothing_reads_are_named_once(load, monkeypatch):
    rows = [{"text": "a", "sytem": "s", "id": 1}, {"prompt": "p", "completion": "c", "id": 2}]
    rows += [{"messages": [USER, ANSWER], "tools": None, "mesages": None, "text": None}] * 2
    data, said = load(rows), []
    assert data.counts["ignored"] == ["id", "sytem"] and load(rows[2:]).counts["ignored"] == []
    monkeypatch.setattr(train.cli, "note", said.append)
    train._say_counts("data", "d.jsonl", data)
    assert said[0].endswith(" · columns that are ignored: id, sytem") and len(said) == 1


def test_prompt_and_completion_are_tokenised_apart(load, smollm, llama2):
    row = {"prompt": "the c", "completion": "at sat"}
    for tokenizer in (smollm, llama2):
        prompt = tokenizer.encode("the c", bos=tokenizer.adds_bos)
        completion = tokenizer.encode_pieces(["at sat"], continues=True) + [tokenizer.eos_id]
        for mask in ("auto", "completion", "all"):
            ((ids, targets),) = documents(load([row], tokenizer, mask=mask))
            assert ids == prompt + completion
            first = 1 if mask == "all" else len(prompt)
            assert targets == [False] * first + [True] * (len(ids) - first)


def test_masks_of_conversations(load, smollm):
    form = chat_format_for(smollm)
    messages = [USER, ANSWER, *MORE]
    whole = form.encode_chat(messages, False)
    both, last = (form.encode_training(messages, first)[1] for first in (0, 2))
    assert sum(both) > sum(last) > 2
    every = [False] + [True] * (len(whole) - 1)
    split = {"prompt": messages[:2], "completion": messages[2:]}
    for row, mask, targets in [
        ({"messages": messages}, "auto", both),
        ({"messages": messages}, "assistant", both),
        ({"messages": messages}, "last", last),
        ({"messages": messages}, "all", every),
        ({"messages": messages + [USER]}, "last", last),
        (split, "auto", last),
        (split, "completion", last),
        (split, "assistant", both),
        (split, "last", last),
        (split, "all", every),
        ({"prompt": [USER], "completion": [ANSWER, *MORE]}, "auto", both),
    ]:
        ((ids, got),) = documents(load([row], mask=mask))
        assert ids[: len(whole)] == whole and got[: len(whole)] == targets
        assert not any(got[len(whole) :])
    # Columns that are named like the fields of other kinds.
    row = {"messages": messages, "completion": "a column"}
    assert documents(load([row])) == [(whole, both)]


def test_first_token_of_a_document_is_never_a_target(load):
    rows = [{"prompt": "", "completion": "a b"}, {"text": "a b"}]
    for packing in (False, True):
        data = load(rows, packing=packing, mask="all")
        for batch in data.epoch_batches():
            starts = batch["positions"] == 0 if packing else np.arange(64) == 0
            assert not (batch["target_mask"] & starts).any()
        assert data.counts["targets"] == data.counts["tokens"] - 2


@pytest.mark.covers("D6")
def test_mask_or_chat_format_that_does_not_fit_names_the_row(load, smollm, llama2):
    text, pair, talk = (
        {"text": "a"},
        {"prompt": "a", "completion": "b"},
        {"messages": [USER, ANSWER]},
    )
    wrong = [(text, m) for m in ("assistant", "last", "completion")]
    wrong += [(pair, m) for m in ("assistant", "last")] + [(talk, "completion")]
    for row, mask in wrong:
        with pytest.raises(DataError, match=f"data.jsonl:1: mask='{mask}' does not fit a row of"):
            load([row], mask=mask)
    bad = [{"messages": [ANSWER]}, {"messages": [USER, {"role": "assistant", "content": "\n\nx"}]}]
    for row in bad:
        with pytest.raises(DataError, match=r"data.jsonl:2: message \d"):
            load([text, row])
    # Both kinds of bad rows are of one budget.
    rows = [talk, bad[0], "{", talk, bad[1]]
    assert load(rows, skip_bad=3).counts["bad"] == 3
    with pytest.raises(DataError, match="has 3 bad rows, and skip_bad=2; the first: .*jsonl:3"):
        load(rows, skip_bad=2)
    with pytest.raises(ArtifactError, match="no default chat template"):
        load([talk], llama2)
    assert load([talk], llama2, chat_format="llama2").counts["examples"] == 1
    assert load([text], llama2).counts["examples"] == 1


# Too long, without targets, too few --------------------------------------------------------------


@pytest.mark.covers("D5")
def test_overlong_conversations_by_policy(load, smollm):
    form = chat_format_for(smollm)
    messages = [USER, ANSWER, {"role": "tool", "content": "many words of a tool " * 9}, MORE[1]]
    ids, mask = form.encode_training(messages)
    answer = mask.index(True)
    second = max(n for n in range(1, len(ids)) if mask[n] and not mask[n - 1])
    for seq_len in (2, answer, answer + 1, answer + 3, second, second + 2, len(ids) - 1, len(ids)):
        rows = [{"messages": messages}, {"text": "a"}]
        kept = int(any(mask[:seq_len]))
        cut = seq_len < len(ids)
        for policy in ("truncate", "split"):  # a conversation is not split
            data = load(rows, seq_len=seq_len, overlong=policy)
            if kept:
                assert documents(data)[0] == (ids[:seq_len], mask[:seq_len])
            assert data.counts["truncated"] == (cut and kept)
            assert data.counts["dropped_no_target"] == 1 - kept
            assert data.counts["examples"] == 1 + kept
        data = load(rows, seq_len=seq_len, overlong="drop")
        assert data.counts["dropped_overlong"] == cut and data.counts["examples"] == 2 - cut
        assert data.counts["truncated"] == data.counts["dropped_no_target"] == 0


@pytest.mark.covers("D4", "D5")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    data=st.data(),
    seq_len=st.integers(2, 9),
    policy=st.sampled_from("truncate drop split windows".split()),
)
def test_counts_are_exact_for_any_rows(data, seq_len, policy):
    examples, kept, at = Examples(seq_len, policy), [], 1
    count = dict(dropped_no_target=0, dropped_overlong=0, truncated=0, split=0)
    count["targets_left_out"] = 0
    for _ in range(data.draw(st.integers(1, 12))):
        is_text = data.draw(st.booleans())
        n = data.draw(st.integers(1, 25))
        mask = [True] * n if is_text else data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
        ids, at = list(range(at, at + n)), at + n
        examples.add(ids, mask, is_text=is_text)
        mask = [False] + mask[1:]
        if n > seq_len and policy == "drop":
            count["dropped_overlong"] += 1
            count["targets_left_out"] += sum(mask)
        elif n > seq_len and any(mask) and (policy == "windows" or policy == "split" and is_text):
            count["split"] += 1
            kept.append([t for t, m in zip(ids, mask) if m])
        elif not any(mask[:seq_len]):
            count["dropped_no_target"] += 1
        else:
            count["truncated"] += n > seq_len
            count["targets_left_out"] += sum(mask[seq_len:])
            kept.append([t for t, m in zip(ids[:seq_len], mask) if m])
    tokens, targets, offsets = examples.arrays()
    assert examples.counts == count
    # Each token that should be learnt is a target once, and no example is without one.
    assert tokens[targets].tolist() == [t for row in kept for t in row]
    for start, end in zip(offsets, offsets[1:]):
        assert 2 <= end - start <= seq_len and targets[start:end].any() and not targets[start]
        assert (np.diff(tokens[start:end]) == 1).all()


@pytest.mark.covers("R33")
@pytest.mark.parametrize("n", [*range(2, 30), 64])
def test_windows_are_those_of_lm_evals_rolling_loglikelihood(n):
    """`get_rolling_token_windows` with context_len 1 and, as inputs, seq_len - 1 tokens."""
    seq_len, expected = 8, []
    size, tokens = seq_len - 1, list(range(1, n))  # token 0 is the prefix
    expected.append((min(size, len(tokens)), [0, *tokens[:size]]))
    predicted = size
    while predicted < len(tokens):
        count = min(len(tokens) - predicted, size)
        end = predicted + count
        expected.append((count, tokens[end - size - 1 : end]))
        predicted += count
    examples = Examples(seq_len, "windows")
    examples.add(list(range(n)), [True] * n, is_text=True)
    tokens, targets, offsets = examples.arrays()
    found = [(targets[a:b].sum(), tokens[a:b].tolist()) for a, b in zip(offsets, offsets[1:])]
    assert found == expected


@pytest.mark.covers("D4")
def test_rows_without_a_target_are_dropped_and_counted(load):
    nothing = [{"messages": [USER]}, {"text": ""}, {"prompt": [USER], "completion": [USER]}]
    data = load([*nothing, {"text": "a b"}])
    assert data.counts["dropped_no_target"] == 3 and data.counts["read"] == 4
    assert len(data) == data.counts["rows"] == data.counts["examples"] == 1


@pytest.mark.covers("D3")
def test_too_few_rows_are_named_with_both_numbers(load):
    with pytest.raises(DataError, match=r"data.jsonl: no row is left to train on \(read 0, bad 0,"):
        load([])
    with pytest.raises(DataError, match="read 2, bad 1, dropped_no_target 1, dropped_overlong 0"):
        load(["{", {"text": ""}], skip_bad=1)
    with pytest.raises(DataError, match="dropped_overlong 1") as e:
        load([{"text": "a b c d"}], seq_len=2, overlong="drop")
    assert e.value.exit_code == 4
    few = load([{"text": "a"}] * 3, batch_size=4)
    for start in (few.batches, few.largest_batch):
        with pytest.raises(DataError, match="data.jsonl: 3 rows, fewer than batch_size=4; lower"):
            start()
    (batch,) = few.epoch_batches()  # evaluation takes any number
    assert batch["target_mask"].any(axis=1).tolist() == [True] * 3 + [False]
    packed = load([{"text": "a"}] * 8, batch_size=4, packing=True)
    with pytest.raises(DataError, match="1 row packed to 512 tokens, fewer than batch_size=4"):
        packed.batches()


def test_config_lists_all_problems():
    with pytest.raises(ConfigError) as e:
        DataConfig(seq_len=1, batch_size=True, seed=-1, mask="some", overlong=None, shuffle=1)
    for name in ("seq_len=1", "batch_size=True", "seed=-1", "mask='some'"):
        assert name in str(e.value)
    assert "overlong=None" in str(e.value) and "shuffle=1" in str(e.value)
    with pytest.raises(ConfigError, match="packing='yes'.*chat_format=3"):
        DataConfig(packing="yes", chat_format=3, seed=2**32 - 1)


# Batches ----------------------------------------------------------------------------------------


def test_buckets_are_those_that_batches_can_have():
    assert numbered([10, 70, 300], seq_len=1000, batch_size=1).buckets == (64, 128, 256, 512)
    assert numbered([70, 80], batch_size=1).buckets == (128,)
    assert numbered([64], batch_size=1).buckets == (64,)
    assert numbered([65, 400], seq_len=400, batch_size=1).buckets == (128, 256, 400)
    assert numbered([5, 9], seq_len=10, batch_size=1).buckets == (10,)
    assert numbered([5, 9], seq_len=100, batch_size=1, packing=True).buckets == (100,)


def test_a_batch_has_the_first_bucket_that_suffices_and_is_padded_on_the_right():
    lengths = [random.Random(n).randint(2, 500) for n in range(60)]
    data = numbered(lengths, batch_size=2, seed=5)
    batches, widths = data.batches(), set()
    for _ in range(60):
        batch = next(batches)
        assert batch.keys() == {"tokens", "target_mask"}
        examples = batch["tokens"][:, 0] - 1
        longest = max(lengths[i] for i in examples)
        width = batch["tokens"].shape[1]
        assert width == next(b for b in (64, 128, 256, 512) if b >= longest)
        widths.add(width)
        for i, tokens, mask in zip(examples, batch["tokens"], batch["target_mask"]):
            n = lengths[i]
            assert (tokens[:n] == i + 1).all() and not tokens[n:].any()
            assert mask.tolist() == [False] + [True] * (n - 1) + [False] * (width - n)
    assert widths == set(data.buckets)


@pytest.mark.parametrize("packing", [False, True])
def test_largest_batch_is_real_and_of_the_largest_shape(packing):
    lengths = [random.Random(n).randint(2, 200) for n in range(60)]
    data = numbered(lengths, batch_size=4, seq_len=256, packing=packing)
    batch = data.largest_batch()
    assert batch["tokens"].shape == (4, data.buckets[-1])
    filled = (batch["tokens"] > 0).sum(axis=1)
    sums = sorted(((b["tokens"] > 0).sum(axis=1) for b in data.epoch_batches()), key=max)
    assert filled.tolist() == sorted(np.concatenate(sums).tolist(), reverse=True)[:4]
    assert next(data.batches()).keys() == batch.keys()


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_epoch_has_every_row_once_in_an_order_of_its_own(shuffle):
    data = numbered([3] * 10, batch_size=4, shuffle=shuffle, seed=1)
    batches = data.batches()
    rows = np.concatenate([next(batches)["tokens"][:, 0] for _ in range(15)]).reshape(6, 10)
    assert all(sorted(epoch) == list(range(1, 11)) for epoch in rows.tolist())
    orders = {tuple(epoch) for epoch in rows.tolist()}
    assert len(orders) == (6 if shuffle else 1)
    assert (tuple(range(1, 11)) in orders) != shuffle
    other = numbered([3] * 10, batch_size=4, shuffle=shuffle, seed=2).batches()
    assert (next(other)["tokens"][:, 0].tolist() == rows[0, :4].tolist()) != shuffle


@pytest.mark.covers("D24")
@pytest.mark.parametrize("packing", [False, True])
def test_a_restored_position_continues_to_the_token(packing):
    """At every step, over two edges of epochs, in a dataset made anew."""
    lengths = [random.Random(n).randint(2, 150) for n in range(31)]
    make = lambda: numbered(lengths, batch_size=4, seq_len=192, packing=packing, seed=7).batches()
    batches, states, expected = make(), [], []
    for _ in range(20):
        states.append(json.loads(json.dumps(batches.get_state())))
        expected.append(next(batches))
    for step, state in enumerate(states):
        resumed = make()
        resumed.set_state(state)
        assert resumed.get_state() == state
        for want in expected[step : step + 3]:
            got = next(resumed)
            assert want.keys() == got.keys()
            assert all((want[k] == got[k]).all() and want[k].shape == got[k].shape for k in want)
    rewound = batches
    rewound.set_state(states[0])
    assert (next(rewound)["tokens"] == expected[0]["tokens"]).all()


@pytest.mark.covers("R25")
@pytest.mark.parametrize("sizes", [(4, 8), (8, 4), (4, 3), (5, 7)])
@pytest.mark.parametrize("packing", [False, True])
def test_another_batch_size_repeats_no_row_and_leaves_none_out(sizes, packing):
    first, second = (
        numbered([9] * 40, batch_size=n, seq_len=9, packing=packing, seed=3).batches()
        for n in sizes
    )
    seen = [x for _ in range(3) for x in next(first)["tokens"][:, 0]]
    second.set_state(json.loads(json.dumps(first.get_state())))
    while len(seen) < 80:
        seen += list(next(second)["tokens"][:, 0])
    assert sorted(seen[:40]) == sorted(seen[40:80]) == list(range(1, 41))
    whole = numbered([9] * 40, batch_size=40, seq_len=9, packing=packing, seed=3).batches()
    assert seen[:40] == next(whole)["tokens"][:, 0].tolist()


@pytest.mark.parametrize("packing", [False, True])
def test_processes_share_each_global_batch(packing):
    lengths = [random.Random(n).randint(2, 150) for n in range(50)]
    data = numbered(lengths, batch_size=4, seq_len=192, packing=packing)
    for name in ("batches", "epoch_batches", "largest_batch"):
        start = getattr(data, name)
        if name == "largest_batch":
            start = lambda **share: iter([data.largest_batch(**share)])
        whole = start()
        for count in (1, 2, 4):
            parts = [start(process_index=p, process_count=count) for p in range(count)]
            whole = start()
            for _ in range(1 if name == "largest_batch" else 3):
                want, got = next(whole), [next(part) for part in parts]
                for key in want:
                    assert (want[key] == np.concatenate([g[key] for g in got])).all()
        with pytest.raises(ConfigError, match="batch_size=4 is not a multiple of the 3 processes"):
            next(start(process_index=0, process_count=3))


def test_epoch_batches_have_every_row_once_in_order():
    for n in (1, 3, 4, 5, 8):
        batches = list(numbered([3] * n, batch_size=4).epoch_batches())
        rows = [int(row[0]) for batch in batches for row in batch["tokens"]]
        assert rows == [*range(1, n + 1)] + [0] * (-n % 4)
        masks = np.concatenate([batch["target_mask"] for batch in batches])
        assert masks.sum() == 2 * n and not masks[n:].any()


# Identity ---------------------------------------------------------------------------------------


@pytest.mark.covers("D7")
def test_digest_changes_with_content_order_size_tokenizer_and_config(load, llama2, smollm):
    rows = [{"text": "a"}, {"text": "b"}, {"prompt": "c", "completion": "d"}]
    digest = lambda rows=rows, *args, **options: load(rows, *args, **options).digest
    same = digest()
    assert digest() == same
    # The order of batches is a matter of the run, and compared field by field.
    assert digest(batch_size=2, shuffle=True, seed=9) == same
    others = [
        digest(rows[::-1]),
        digest(rows[:2]),
        digest(rows + rows[:1]),
        digest([{"text": "A"}, *rows[1:]]),
        digest([{"text": "a", "x": 1}, *rows[1:]]),
        digest(rows, llama2),
        digest(seq_len=256),
        digest(packing=True),
        digest(mask="all"),
        digest(overlong="drop"),
        digest(chat_format="llama3"),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_tokenizer_digest(smollm, llama2, default_model_path):
    digest = tokenizer_digest(smollm)
    assert (
        digest == tokenizer_digest(load_tokenizer(default_model_path)) != tokenizer_digest(llama2)
    )
    for name, value in (
        ("chat_templates", {}),
        ("adds_bos", True),
        ("stop_ids", frozenset({2, 3})),
        ("eos_id", 3),
        ("special_tokens", {}),
    ):
        changed = copy.copy(smollm)
        setattr(changed, name, value)
        assert tokenizer_digest(changed) != digest


@pytest.mark.covers("R26")
def test_a_context_that_is_exceeded_is_a_warning_about_the_examples():
    data = numbered([5, 9], seq_len=64)
    data.check_context(9)
    with pytest.warns(UserWarning, match="has 9 tokens, the model's context 8; --seq_len 8 cuts"):
        data.check_context(8)
