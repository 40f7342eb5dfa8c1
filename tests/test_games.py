"""Ready-made environments, called directly: no process and no model."""

import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.environments.games import Calculator, Guess, calculate, deal
from trainers.environments.search import Search
from utils.errors import ConfigError, DataError

COLLECTION = Path(__file__).parent / "search_collection"


def say(text):
    return {"role": "assistant", "content": text}


EXPRESSIONS = st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", " * ", " / ", "//", "%"]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(EXPRESSIONS)
def test_an_expression_has_python_s_value(text):
    try:
        right = eval(text)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            calculate(text)
        return
    found = calculate(text)
    assert float(found) == pytest.approx(right, rel=1e-14)
    assert not isinstance(right, int) or found == str(right)


def test_expressions_as_models_write_them():
    assert calculate("3 × (4 − 1) ÷ 2") == "4.5"
    assert calculate("2^10") == "1024" and calculate("0.1 + 0.2") == "0.3"
    assert calculate(" 6/2\n") == "3" and calculate("12345678901234 / 1") == "12345678901234"


@pytest.mark.covers("G1")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "()",
        "1+",
        "1 2",
        "__import__('os')",
        "a",
        "1,000",
        "9**9**9",
        "10**100",
        "1e400",
        "-" * 300,
    ]
    + ["(-8)**0.5", "2**(2**(2**9))", "(" * 150, "1\0", "0x10", "1j", "1 if 1 else 2", "٣"],
)
def test_what_is_no_small_sum_is_refused_at_once(text):
    with pytest.raises(ValueError):
        calculate(text)


def test_sums_are_as_ordered_and_their_answers_right():
    sums = Calculator(digits=2, terms=4, operations="+-").examples(50, seed=3)
    assert sums == Calculator(digits=2, terms=4, operations="+-").examples(50, seed=3)
    assert sums != Calculator(digits=2, terms=4, operations="+-").examples(50, seed=4)
    used = set()
    for row in sums:
        total = row["question"].removeprefix("What is ").removesuffix("?")
        numbers, signs = total.split()[::2], total.split()[1::2]
        used |= set(signs)
        assert len(numbers) == 4 and all(1 <= int(n) <= 99 for n in numbers)
        assert str(eval(total)) == row["answer"]
    assert used == {"+", "-"} and json.loads(json.dumps(sums)) == sums


@pytest.mark.parametrize(
    ("text", "right"),
    [("-1,143", 1), ("121 - 780 - 484 = -1143.", 1), ("\\boxed{−1143}", 1), ("1143", 0), ("", 0)]
    + [("-1143 or -1144", 0), ("none", 0), ("**-1 143**", 1)],
)
def test_the_last_number_of_a_reply_is_its_answer(text, right):
    game = Calculator()
    (message,) = game.reset({"question": "What is 121 - 780 - 484?", "answer": "-1143"})
    assert message == {"role": "user", "content": "What is 121 - 780 - 484?"}
    assert game.step(say(text)) == ([], right, True)


def test_halving_finds_any_number_in_time():
    for secret in range(1, 9):
        game, low, high = Guess(), 1, 8
        (message,) = game.reset({"secret": secret})
        assert message == {"role": "user", "content": "guess 1 to 8"}
        for _ in range(4):
            guess = (low + high) // 2
            answers, reward, done = game.step(say(f"is it {guess} ?"))
            if done:
                break
            assert reward is None
            low, high = (guess + 1, high) if answers[0]["content"] == "higher" else (low, guess - 1)
        assert guess == secret and (answers, reward) == ([], 1.0)


def test_guesses_are_counted_and_read_with_tolerance():
    game = Guess(high=100, turns=5)
    game.reset({"secret": 60})
    heard = [game.step(say(text)) for text in ("50 or 70", "no idea", "59.5", "9" * 5000)]
    assert [answers[0]["content"] for answers, _, _ in heard] == [
        "lower",
        "say a number",
        "higher",
        "say a number",
    ]
    assert [answer[1:] for answer in heard] == [(None, False)] * 4
    assert game.step(say("61")) == ([], 0.0, True)
    game.reset({"secret": 60})  # an episode starts anew
    assert game.step(say("Now 60!")) == ([], 1.0, True)


def test_secrets_are_spread_evenly():
    secrets = [row["secret"] for row in Guess(high=4).examples(4000, seed=0)]
    assert all(900 < secrets.count(n) < 1100 for n in (1, 2, 3, 4)) and len(set(secrets)) == 4


def test_every_question_can_be_answered_by_searching_and_reading():
    game = Search(str(COLLECTION))
    questions = game.examples(12, seed=1)
    assert len({row["question"] for row in questions}) == 12
    assert game.examples(30, 1)[:12] == questions and game.examples(12, 2) != questions
    for row in questions:
        (message,) = game.reset(row)
        found = [line.split(":")[0] for line in game.search(message["content"]).splitlines()]
        assert len(found) == 3
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        read = " ".join(game.read(name) for name in found)
        assert any(answer in read for answer in answers)
        assert game.step(say(f"It is the {answers[0].upper()}.")) == ([], 1.0, True)
        assert game.step(say("<answer>unknown</answer>"))[1] == 0
        assert game.step(say(read))[1] == 0  # a copy of it all is no answer


def test_answers_are_whole_words():
    game = Search(str(COLLECTION))
    game.reset({"question": "How many?", "answer": ["9", "nine"]})
    assert [game.step(say(t))[1] for t in ("19", "ninety", "Nine!", "(9)", "")] == [0, 0, 1, 1, 0]


def test_search_ranks_by_bm25(tmp_path):
    texts = {"a": "red red tulip", "b": "red house", "c": "blue house by the long long river"}
    rows = [{"id": k, "title": k.upper(), "text": v} for k, v in texts.items()]
    (tmp_path / "articles.jsonl").write_text("\n".join(map(json.dumps, rows)))
    game = Search(str(tmp_path), results=2)
    assert game.search("a RED, tulip?") == "a: A\nb: B" and game.search("green") == "nothing found"
    assert game.search("house") == "b: B\nc: C"
    # Titles count, but articles do not: neither "the" nor the title "A".
    lengths = {"a": 3, "b": 3, "c": 7}
    mean, idf = sum(lengths.values()) / 3, math.log(1 + 1.5 / 2.5)
    for name, count in (("a", 2), ("b", 1)):
        right = idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * lengths[name] / mean))
        assert game._score(["red"], game._words[name]) == pytest.approx(right)
    assert game._score(["red"], game._words["c"]) == 0


def test_numbers_are_ids_too():
    game = Search(str(COLLECTION))
    game._articles["7"] = {"text": "seven"}
    assert game.read(7) == "seven"
    with pytest.raises(ValueError, match="no article 'x'; search shows the ids"):
        game.read("x")


@pytest.mark.covers("G2")
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Calculator(digits=0, terms=True, operations="+/"), "digits.*terms.*operations"),
        (lambda: Calculator(operations=""), "operations is '', expected some of"),
        (lambda: Guess(high=1, turns=0), "high is 1, expected an integer from 2.*turns is 0"),
        (lambda: Search(str(COLLECTION), results=0), "results is 0"),
    ],
)
def test_wrong_arguments_are_named_together(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


@pytest.mark.covers("G3")
def test_broken_collections(tmp_path):
    with pytest.raises(DataError, match="articles.jsonl"):
        Search(str(tmp_path))
    path = tmp_path / "articles.jsonl"
    for text, named in (
        ("\n", "has no rows"),
        ('{"id": 1, "title": "x"}', ":1: expected id, title, text, got"),
        ('{"id": 1, "title": "x", "text": "y"}\n{', ":2 is not valid JSON"),
        (2 * '{"id": 1, "title": "x", "text": "y"}\n', "two articles have one id"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=named):
            Search(str(tmp_path))
    shutil.copy(COLLECTION / "articles.jsonl", path)
    with pytest.raises(DataError, match="questions.jsonl"):
        Search(str(tmp_path)).examples(1, 0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 3))
def test_examples_come_evenly(have, size, seed):
    rows = [{"n": n} for n in range(have)]
    dealt = deal(rows, size, seed)
    counts = [dealt.count(row) for row in rows]
    assert sum(counts) == size and max(counts) - min(counts) <= 1
    assert dealt == deal(rows, size, seed)
    with pytest.raises(DataError, match="no examples"):
        deal([], size, seed)


@pytest.mark.covers("G4")
@pytest.mark.parametrize(
    ("game", "row"),
    [
        (Calculator(), {"question": "1 + 1?"}),
        (Calculator(), {"question": "1 + 1?", "answer": "two"}),
        (Calculator(), {"answer": "2"}),
        (Guess(), {}),
        (Guess(), {"secret": 9}),
        (Guess(), {"secret": True}),
        (Search(str(COLLECTION)), {"question": "Who?"}),
        (Search(str(COLLECTION)), {"question": "Who?", "answer": []}),
        (Search(str(COLLECTION)), {"question": "Who?", "answer": ["x", "?"]}),
        (Search(str(COLLECTION)), {"question": 1, "answer": "x"}),
    ],
)
def test_rows_of_another_task_are_refused(game, row):
    with pytest.raises(DataError, match="expected"):
        game.reset(row)
