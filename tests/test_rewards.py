"""Rewards: what counts as one, how several add up, and the ready-made ones."""

import dataclasses
import math
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import cloudpickle
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reward_faults import lengths
from trainers.rewards.functions import (
    READY_MADE,
    THINK_FORMAT,
    FormatMatch,
    NumberMatch,
    ReasoningGym,
    Reward,
    SoftOverlong,
    ThinkFormat,
    answer_text,
    exact_match,
    extract_number,
    load_reward,
)
from trainers.rewards.pool import RewardPool, Scores
from trainers.rewards.worker import check
from utils.errors import ConfigError, DataError, TrainError

NAN = math.nan


# What a function may return


@pytest.mark.covers("D12")
@pytest.mark.parametrize(
    "value, expected",
    [
        (1, 1.0),
        (-0.25, -0.25),
        (1e38, 1e38),
        (-1.7e308, -1.7e308),
        (None, None),
        (NAN, None),
        (np.float32("nan"), None),
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.int8(-3), -3.0),
        (np.array(2.5), 2.5),
        (np.array(NAN), None),
        (torch.tensor(2.5, dtype=torch.bfloat16), 2.5),
        (jnp.float32(2.5), 2.5),
        (Fraction(1, 4), 0.25),
    ],
)
def test_numbers_and_unscorable_rows(value, expected):
    assert check([7, value], 2) == {"values": [7.0, expected]}


@pytest.mark.covers("D12")
@pytest.mark.parametrize(
    "value, shown",
    [
        ("1.0", "'1.0' (str), which is not a real number"),
        (b"1", "b'1' (bytes), which is not a real number"),
        (True, "True (bool), which is not a real number"),
        (np.bool_(True), "True (bool), which is not a real number"),
        (1j, "1j (complex), which is not a real number"),
        (np.complex64(1), "(complex64), which is not a real number"),
        (Decimal(1), "Decimal('1') (Decimal), which is not a real number"),
        ([1.0], "[1.0] (list), which is not a real number"),
        (np.array([1.0]), "array([1.]) (ndarray), which is not a real number"),
        (np.array("1.0"), "(ndarray), which is not a real number"),
        (torch.tensor([1.0]), "tensor([1.]) (Tensor), which is not a real number"),
        (math.inf, "inf (float), which is infinite"),
        (-math.inf, "-inf (float), which is infinite"),
        (np.float32("inf"), "(float32), which is infinite"),
        (np.array(-math.inf), "(ndarray), which is infinite"),
        (10**400, "(int), which float64 cannot hold"),
    ],
)
def test_what_is_no_reward(value, shown):
    answer = check([0.0, value], 2)
    assert answer.keys() == {"invalid", "row"} and answer["row"] == 1
    assert shown in answer["invalid"].replace("np.True_ (bool", "True (bool")


@pytest.mark.covers("D12")
@pytest.mark.parametrize("result", [[], [1.0], [1.0] * 3, np.zeros(3)])
def test_wrong_length(result):
    text = f"returned {len(result)} values for 2 completions"
    assert check(result, 2) == {"invalid": text, "row": None}


@pytest.mark.covers("D12")
@pytest.mark.parametrize(
    "result", [None, 1.0, "ab", {0: 1.0, 1: 2.0}, {1.0, 2.0}, np.zeros((2, 1)), iter([1.0, 2.0])]
)
def test_no_list_at_all(result):
    answer = check(result, 2)
    assert answer["row"] is None and "not a list of 2 numbers" in answer["invalid"]


@pytest.mark.parametrize("result", [(1.0, 2.0), np.array([1, 2]), torch.tensor([1.0, 2.0])])
def test_tuples_and_vectors_are_lists(result):
    assert check(result, 2) == {"values": [1.0, 2.0]}


@pytest.mark.covers("D12")
@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(
        st.none() | st.floats() | st.integers() | st.booleans() | st.text() | st.complex_numbers()
    )
)
def test_either_all_rows_count_or_the_first_wrong_one_is_named(values):
    def wrong(x):
        if isinstance(x, (str, bool, complex)):
            return True
        return x is not None and (math.isinf(x) if isinstance(x, float) else abs(x) >= 2**1024)

    answer = check(values, len(values))
    bad = [row for row, value in enumerate(values) if wrong(value)]
    if bad:
        assert answer["row"] == bad[0]
    else:
        missing = [x is None or x != x for x in values]
        assert [x is None for x in answer["values"]] == missing
        assert all(a == float(x) for a, x, no in zip(answer["values"], values, missing) if not no)


def call(pool, texts, group_size=2, **columns):
    return pool(["p"] * len(texts), texts, [[1]] * len(texts), columns, group_size)


@pytest.mark.covers("D12")
@pytest.mark.parametrize(
    "bad, message",
    [
        (
            "x",
            "reward 'f', row 3: returned 'x' (str), which is not a real number; expected a finite",
        ),
        (math.inf, "reward 'f', row 3: returned inf (float), which is infinite; expected a finite"),
        ([], "reward 'f': returned 5 values for 6 completions"),
    ],
)
def test_a_wrong_value_stops_whatever_the_policy(bad, message):
    # In the batch, or where prompts are asked one by one: the row is the batch's.
    def returns_bad(completions, **_):
        if alone and len(completions) > 2:
            raise ValueError
        values = [bad if text == "bad" else 1.0 for text in completions]
        return [value for value in values if value != []]

    for alone in (False, True):
        with RewardPool([Reward(name="f", function=returns_bad)]) as pool:
            with pytest.raises(TrainError) as error:
                call(pool, ["a", "b", "c", "bad", "e", "f"])
        expected = message.replace("5 values for 6", "1 values for 2") if alone else message
        assert str(error.value).startswith(expected)


@pytest.mark.covers("D12")
def test_none_and_nan_come_through_and_are_no_failure():
    def some(completions, **_):
        return [None, NAN, 1e38, np.float32(0.1)]

    with RewardPool([Reward(name="f", function=some)], on_failure="stop") as pool:
        scores = call(pool, ["text"] * 4)
    np.testing.assert_array_equal(scores.values, [[NAN, NAN, 1e38, float(np.float32(0.1))]])
    assert not scores.failed.any() and pool.failures == []


# Totals


def scores_of(values, failed=()):
    values = np.array(values, np.float64)
    marks = np.zeros(values.shape, bool)
    for place in failed:
        marks[place] = True
    return Scores(values=values, failed=marks)


@pytest.mark.covers("D12")
def test_a_missing_part_is_left_out_and_never_zero():
    scores = scores_of([[1, NAN, 3, NAN], [10, 20, NAN, NAN]])
    np.testing.assert_array_equal(scores.total([2, 0.5]), [7, 10, 6, NAN])
    np.testing.assert_array_equal(scores.total([2, 0]), [2, NAN, 6, NAN])
    np.testing.assert_array_equal(scores.total([0, 0]), [NAN] * 4)
    np.testing.assert_array_equal(scores.total([-1, 0]), [-1, NAN, -3, NAN])


@pytest.mark.covers("D11")
def test_a_group_that_a_function_failed_on_has_no_total():
    scores = scores_of([[NAN, NAN, 3, 4], [1, 2, 3, 4]], [(0, 0), (0, 1)])
    np.testing.assert_array_equal(scores.total([1, 1]), [NAN, NAN, 6, 8])
    np.testing.assert_array_equal(scores.total([0, 1]), [1, 2, 3, 4])


@pytest.mark.covers("D12")
@pytest.mark.parametrize("values", [[[1e308], [1e308]], [[1e308], [-1e308]]])
def test_a_total_that_overflows_is_an_error(values):
    with pytest.raises(TrainError, match="the rewards of row 0 add up to (inf|nan); scale them"):
        scores_of(values).total([10, 10])


# The pool's arguments


def test_all_that_is_wrong_with_a_pool_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        RewardPool([], timeout=0, on_failure="ignore")
    for part in ("timeout is 0", "on_failure is 'ignore'"):
        assert part in str(error.value)
    for timeout in (-1.0, NAN, math.inf, "60", True):
        with pytest.raises(ConfigError, match="timeout is"):
            RewardPool([load_reward("number")], timeout=timeout)
    with pytest.raises(ConfigError, match="'number' is given twice"):
        RewardPool([load_reward("number"), load_reward("number=2")])


def test_a_column_that_a_function_misses_or_refuses_is_told_before_it_runs():
    def only_text(completions):
        return lengths(completions)

    with RewardPool([load_reward("number")]) as pool:
        with pytest.raises(ConfigError, match="reward 'number' is called with .*'answer'"):
            call(pool, ["1", "2"], solution=["1", "2"])
    with RewardPool([Reward(name="f", function=only_text)]) as pool:
        with pytest.raises(ConfigError, match="'f' is called with .*what it does not use as"):
            call(pool, ["1", "2"])


def test_lists_that_do_not_fit_together():
    with RewardPool([Reward(name="f", function=lengths)]) as pool:
        with pytest.raises(DataError, match="lengths that fit.*'answer': 1"):
            call(pool, ["1", "2"], answer=["1"])
        with pytest.raises(DataError, match="names"):
            call(pool, ["1", "2"], prompts=["1", "2"])
        with pytest.raises(DataError, match="3 rows, expected a multiple of group_size=2"):
            call(pool, ["1", "2", "3"])
        assert call(pool, []).values.shape == (1, 0)


def test_a_function_that_cannot_be_sent():
    lock = threading.Lock()
    with pytest.raises(ConfigError, match="'f' cannot be sent to a process of its own"):
        RewardPool([Reward(name="f", function=lambda **_: lock)])


def test_functions_see_prompts_texts_tokens_and_columns():
    def look(prompts, completions, completion_ids, level, **rest):
        assert rest == {"answer": ["x", "y"]}
        assert (prompts, completions, completion_ids) == (["p", "q"], ["a", "b"], [[1, 2], [3]])
        return level

    with RewardPool([Reward(name="f", function=look)], on_failure="stop") as pool:
        columns = {"level": [1, 2], "answer": ["x", "y"]}
        assert pool(["p", "q"], ["a", "b"], [[1, 2], [3]], columns, 1).values.tolist() == [[1, 2]]


# From a flag to a function


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "from trainers.rewards.functions import FormatMatch\n"
        "def short(completions, **_):\n    return [-float(len(x)) for x in completions]\n"
        "polite = FormatMatch(r'.*please.*')\n"
        "class Group:\n    short = staticmethod(short)\n"
        "limit = 3\n"
    )
    (tmp_path / "my_broken.py").write_text("raise ValueError('two\\nlines')")
    (tmp_path / "my_exit.py").write_text("raise SystemExit(3)")
    (tmp_path / "my_syntax.py").write_text("def (")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def test_load_reward(module):
    specs = [
        "my_rewards:short",
        "my_rewards:polite=0.5",
        "my_rewards:Group.short=-1",
        "exact_match",
    ]
    rewards = [load_reward(spec) for spec in specs]
    names = ["my_rewards.short", "my_rewards.polite", "my_rewards.Group.short", "exact_match"]
    assert [reward.name for reward in rewards] == names
    assert [reward.weight for reward in rewards] == [1.0, 0.5, -1.0, 1.0]
    with RewardPool(rewards, on_failure="stop") as pool:
        scores = call(pool, ["a\nplease b", "no"], answer=["x", "no"])
    assert scores.values.tolist() == [[-10, -2], [1, 0], [-10, -2], [0, 1]]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("numbr", "expected module:function, or one of exact_match, number"),
        ("my_rewards:", "expected module:function"),
        (":short", "expected module:function"),
        ("", "expected module:function"),
        (True, "'True': expected module:function"),
        ("my_missing:f", "importing my_missing fails: ModuleNotFoundError: .*on PYTHONPATH"),
        ("my_rewards:nothing", "my_rewards has no nothing"),
        ("my_rewards:limit", "3 is int, not callable"),
        ("my_rewards:short=much", "the weight is 'much', expected a number, for .*short=0.5"),
        ("my_rewards:short=nan", "weight is nan, expected a finite number"),
        ("number=inf", "weight is inf, expected a finite number"),
        ("my_broken:f", "importing my_broken fails: ValueError: two lines$"),
        ("my_exit:f", "importing my_exit fails: SystemExit: 3$"),
        ("my_syntax:f", "importing my_syntax fails: SyntaxError"),
        ("..relative:f", "importing ..relative fails"),
    ],
)
def test_load_reward_says_what_is_wrong(module, spec, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_reward(spec)
    assert "\n" not in str(error.value)


def test_reward_lists_all_that_is_wrong():
    with pytest.raises(ConfigError) as error:
        Reward(name="", function=3, weight=True)
    for part in ("name is ''", "3 is int, not callable", "weight is True"):
        assert part in str(error.value)


# Ready-made ones


@pytest.mark.parametrize(
    "text, lenient, strict",
    [
        ("42", "42", "42"),
        ("  42\n", "42", "42"),
        ("-3", "-3", "-3"),
        ("−3", "-3", "-3"),
        ("+3", "3", "3"),
        ("1,234.50", "1234.5", "1234.5"),
        ("1,234,567", "1234567", "1234567"),
        (".5", "1/2", "1/2"),
        ("3/4", "3/4", "3/4"),
        ("-6/8", "-3/4", "-3/4"),
        ("1e3", "1000", "1000"),
        ("-2.5E-1", "-1/4", "-1/4"),
        ("$5", "5", "5"),
        ("-$5", "-5", "-5"),
        ("$-5", "-5", None),
        ("5.", "5", None),
        ("The answer is -4.", "-4", None),
        ("So 3 + 4 = 7, I think.", "7", None),
        ("10-3", "3", None),
        ("(2)-3", "3", None),
        ("4 - 3", "3", None),
        ("x=-3", "-3", None),
        ("**-12**", "-12", None),
        (r"\boxed{-7}", "-7", None),
        ("1,2,3", "3", None),
        ("1,2345", "2345", None),
        ("1.2.3", "3", None),
        ("1.5/2", "2", None),
        ("7/0", "0", None),
        ("on 1/2/2024", "2024", None),
        ("50%", "50", None),
        ("12 apples and 5kg", "5", None),
        ("1e9999", "9999", None),
        ("", None, None),
        ("none", None, None),
        ("-", None, None),
        ("$", None, None),
        ("٣", None, None),
        ("9" * 1000, "9" * 1000, "9" * 1000),
        ("9" * 1001, None, None),
        ("<answer>5</answer>", "5", "5"),
        ("<think>1 + 1\n= 2</think>\n<answer>\n 2\n</answer> or 3", "2", "2"),
        ("<answer>1</answer> no: <answer>2</answer>", "2", "2"),
        ("<answer>x <answer>3</answer>", "3", "3"),
        ("<answer>it is 3</answer>", "3", None),
        ("4 <answer></answer>", None, None),
        ("<answer>5", "5", None),
        ("5</answer>", "5", None),
    ],
)
def test_extract_number(text, lenient, strict):
    exact = lambda x: None if x is None else Fraction(Decimal(x)) if "/" not in x else Fraction(x)
    assert extract_number(text, strict=False) == exact(lenient)
    assert extract_number(text, strict=True) == exact(strict)


@pytest.mark.covers("R35")
@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{1} or \boxed{\left(\dfrac{2}{3}\right)} for 7", "2/3"),
        (r"<answer>it is \boxed{\frac{1}{3}}</answer> 5", "1/3"),
        (r"\frac34", "3/4"),
        (r"-\frac{1}{2}", "-1/2"),
        (r"\frac{-1}{2}", "-1/2"),
        (r"\frac{1,000}{3}", "1000/3"),
        (r"3\frac{1}{2}", "7/2"),
        ("it is 3 1/2.", "7/2"),
        ("-3 1/2", "-7/2"),
        ("1/2 3/4", "3/4"),
        ("4 3/2", "3/2"),  # two numbers
        ("on 3 1/2/2024", "2024"),
        ("1 234", "1234"),
        ("$1\u202f234\u00a0567.5", "2469135/2"),
        ("12 7 100", "100"),  # a list
        ("2019 500", "500"),
        ("1.000.000", "1000000"),
        ("It is -1.234.567.", "-1234567"),
        ("1.000", "1"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{1,\!234}", "1234"),
        (r"\boxed{12\text{ cm}^2}", "12"),
        (r"\boxed{\$5}", "5"),
        (r"\boxed{5", "5"),
        (r"5 \boxed{}", None),
        # What the docstring lists as no numbers: the last part counts.
        ("2,5", "5"),
        (r"\frac{1.5}{2}", "2"),
        ("10^3", "3"),
        ("1'000", "0"),
        ("seven", None),
    ],
)
def test_fractions_groups_and_boxes(text, expected):
    expected = None if expected is None else Fraction(expected)
    assert extract_number(text, strict=False) == expected
    (score,) = READY_MADE["number"](completions=[text], answer=[str(expected)])
    assert score == (None if expected is None else 1.0)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9
    )
)
def test_every_decimal_is_read_exactly(number):
    for text in (f"{number:f}", f"{number:,f}"):
        assert extract_number(text, strict=True) == Fraction(number)
        assert extract_number(f"1 + 1 is {text}.", strict=False) == Fraction(number)
        assert extract_number(f"It is {text}, in m²", strict=False) == Fraction(number)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.text("0123456789,.-+−/eE$ \n<>answer٣²", max_size=60) | st.text())
def test_no_text_breaks_it_and_strict_agrees_with_lenient(text):
    number = extract_number(text, strict=True)
    assert number is None or isinstance(number, Fraction)
    assert number in (None, extract_number(text, strict=False))


def test_long_texts_take_no_time():
    for part in (
        "1,",
        "1,111,",
        "<answer>",
        "</answer>",
        "9",
        ".",
        "1/",
        "-$",
        "1e",
        "1 234 ",
        "\\boxed{",
        "\\frac{",
    ):
        start = time.process_time()
        extract_number(part * 100_000, strict=False)
        extract_number(part * 100_000, strict=True)
        assert time.process_time() - start < 10


def test_exact_match():
    texts, answers = ["yes", " yes\n", "Yes", "yes!", "", "3", "any"], ["yes"] * 4 + ["", 3, None]
    assert exact_match(completions=texts, answer=answers) == [1, 1, 0, 0, 1, 1, None]


def test_number_match_compares_exactly():
    texts = ["it is 0.50", "0.5", "1/2", "0.3", "no", "72", "0.1", "5", "5"]
    answers = ["0.5", "1/2", 0.5, 0.1 + 0.2, 1, "6*12 = 72\n#### 72", 0.1, None, "five"]
    lenient = NumberMatch(strict=False)(completions=texts, answer=answers)
    assert lenient == [1, 1, 1, 0, 0, 1, 1, None, None]
    strict = NumberMatch(strict=True)(completions=texts, answer=answers)
    assert strict == [0, 1, 1, 0, 0, 1, 1, None, None]


def test_format_match_is_of_the_whole_text_across_lines():
    texts = ["<a>\nx\ny\n</a>", "<a></a>", "so <a>x</a>", "<a>x</a>\n", "<a>"]
    assert FormatMatch(r"<a>.*</a>")(completions=texts) == [1, 1, 0, 0, 0]
    think = "<think>\nwell\n</think>\n<answer>4</answer>\n"
    texts = [think, "4", think + "!", think.replace("<answer>", "")]
    assert FormatMatch(THINK_FORMAT)(completions=texts) == [1, 0, 0, 0]
    assert READY_MADE["think_format"](completions=texts) == [1, 0, 0, 0]


@pytest.mark.covers("R14")
@pytest.mark.parametrize("template_opens", [False, True])
@pytest.mark.parametrize(
    "text, expected",
    [
        ("a\n</think>\n<answer>4\n5</answer>\n", 1),
        ("a < b</think><answer></answer>", 1),
        ("a</think>\n<think>b</think>\n<answer>1</answer>", 0),
        ("a</think><answer>1</answer></answer>", 0),
        ("a</think><answer>1</answer> x <answer>2</answer>", 0),
        ("a</think><answer>1</answer> x", 0),
        ("a</think> so <answer>1</answer>", 0),
        ("<think>a</think><answer>1</answer>", 0),
        ("<answer>a</answer></think><answer>1</answer>", 0),
        ("a</think><answer>1<think></answer>", 0),
        ("a</think><answer>1", 0),
    ],
)
def test_each_tag_is_there_once_and_in_order(text, expected, template_opens):
    score = ThinkFormat(opened=template_opens)
    whole = "<think>" + text
    assert score(completions=[text if template_opens else whole]) == [expected]
    assert score(completions=[whole if template_opens else text])[0] == 0 or text[0] == "<"
    assert score(completions=[text], prompts=["<think>\n"]) == [expected]
    for pattern in ("(", 3):
        with pytest.raises(ConfigError, match="is not a pattern"):
            FormatMatch(pattern)


def test_soft_overlong_is_equation_13():
    def equation(length, longest, cache):
        if length <= longest - cache:
            return 0.0
        return (longest - cache - length) / cache if length <= longest else -1.0

    for longest, cache in ((100, 20), (5, 5), (7, 0), (1, 1), (3, 2)):
        ids = [[0] * n for n in range(longest + 4)]
        expected = [equation(len(row), longest, cache) for row in ids]
        assert SoftOverlong(max_len=longest, cache=cache)(completion_ids=ids) == expected
    assert SoftOverlong(max_len=100, cache=20)(completion_ids=[[0] * 90]) == [-0.5]


@pytest.mark.parametrize("wrong", [(0, 0), (-1, 0), (8, 9), (8, -1), (8.0, 1), (8, True)])
def test_soft_overlong_refuses(wrong):
    with pytest.raises(ConfigError, match="SoftOverlong: (max_len|cache) is"):
        SoftOverlong(max_len=wrong[0], cache=wrong[1])


def test_reasoning_gym():
    entry = {"answer": "-4", "metadata": {"source_dataset": "chain_sum"}}
    texts = ["-4", "The answer is -4.", "<answer>-4</answer>", "5", "", "1,000 or -4.0 <answer>5"]
    make = lambda strict: ReasoningGym(task="chain_sum", args={"min_terms": 2}, strict=strict)
    strict = make(True)(completions=texts, entry=[entry] * 6)
    assert strict == [1, 0, 1, 0, 0, 0]
    lenient = make(False)(completions=texts, entry=[entry] * 6)
    assert lenient == [1, 1, 1, 0, 0, 0]
    partial = ReasoningGym(task="chain_sum", strict=True, partial=True)
    assert 0 < partial(completions=["The answer is -4."], entry=[entry])[0] < 1
    decimal = {"answer": "4.50", "metadata": {}}
    assert make(False)(completions=["= 4.5"], entry=[decimal]) == [1]
    # A task whose answer is text sees the answer's text.
    spell = ReasoningGym(task="spell_backward", strict=False)
    word = {"answer": "olleh", "metadata": {"word": "hello"}}
    assert spell(completions=["<answer>olleh</answer>"], entry=[word]) == [1]


def test_reasoning_gym_refuses(monkeypatch):
    entry = {"answer": "1", "metadata": {}}
    with pytest.raises(ConfigError, match="reasoning_gym:chain_summ with {}: .*chain_summ"):
        ReasoningGym(task="chain_summ", strict=True)(completions=["1"], entry=[entry])
    with pytest.raises(ConfigError, match='reasoning_gym:chain_sum with {"terms": 2}'):
        wrong = ReasoningGym(task="chain_sum", args={"terms": 2}, strict=True)
        wrong(completions=["1"], entry=[entry])
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match="pip install 'altiplano"):
        ReasoningGym(task="products", strict=True)(completions=["1"], entry=[entry])


@pytest.mark.parametrize("name", READY_MADE)
def test_ready_made_ones_run_in_a_pool(name):
    with RewardPool([load_reward(f"{name}=0.25")], on_failure="stop") as pool:
        scores = call(pool, ["7", "<think>\n</think><answer>8</answer>"], answer=["7", "7"])
    assert scores.values.tolist() == [[0, 1] if name == "think_format" else [1, 0]]


@pytest.mark.parametrize(
    "reward",
    [
        NumberMatch(strict=True),
        FormatMatch("x"),
        SoftOverlong(max_len=2, cache=1),
        ReasoningGym(task="chain_sum", strict=False),
    ],
)
def test_ready_made_ones_are_values(reward):
    assert cloudpickle.loads(cloudpickle.dumps(reward)) == reward == dataclasses.replace(reward)
    with pytest.raises(dataclasses.FrozenInstanceError):
        reward.strict = None


def test_answer_text():
    assert answer_text(" a ") == "a" and answer_text("x<answer> b </answer>y") == "b"
