"""Prompts with rewards: what a model reads and rewards see, nothing shared with what is held out."""

import json
import os
import subprocess
import sys

import pytest
import reasoning_gym

from models.llama.tokenizer import load_tokenizer
from tests import cli
from trainers.rewards.functions import Reward, load_reward
from trainers.rewards.pool import reward_rows
from trainers.rewards.flags import TaskFlags
from trainers.rewards.tasks import PromptEncoder, Task, load_prompts, load_task
from trainers.rewards.tasks import task_names
from trainers.rollout import Prompt
from utils.errors import ArtifactError, ConfigError, DataError

SUM = "reasoning_gym:chain_sum"
# Two terms of one digit have 200 items; of six digits, practically no two are equal.
ONE_DIGIT = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
SIX_DIGITS = dict(min_terms=2, max_terms=2, min_digits=6, max_digits=6)
REWARDS = [Reward(name="exact", function=len)]


@pytest.fixture
def tokenizer():
    return load_tokenizer(cli.checkpoint())


@pytest.fixture
def plain():
    """A tokenizer without chat template."""
    tokenizer = load_tokenizer(cli.checkpoint())
    tokenizer.chat_templates.clear()
    return tokenizer


def write(folder, *rows) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*messages: tuple[str, str]) -> str:
    """The text that cli.TEMPLATE makes, written by hand."""
    said = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return f"<s>{said}<|im_start|>assistant\n"


def ids_of(text: str, tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, allow_special=True))


# Tasks of reasoning_gym -------------------------------------------------------------------------


def test_a_task_has_the_items_of_reasoning_gym(tokenizer):
    task = load_task(SUM, PromptEncoder(tokenizer), args=ONE_DIGIT, size=7, seed=3)
    theirs = reasoning_gym.create_dataset("chain_sum", size=7, seed=3 << 20, **ONE_DIGIT)
    assert len(task.prompts) == 7
    for prompt, entry in zip(task.prompts, theirs):
        assert prompt.text == entry["question"]
        assert prompt.ids == ids_of(chat(("user", entry["question"])), tokenizer)
        assert prompt.columns == {"answer": entry["answer"], "entry": entry}
    assert task.longest == max(len(prompt.ids) for prompt in task.prompts)
    assert (
        task.digest
        == load_task(SUM, PromptEncoder(tokenizer), args=ONE_DIGIT, size=7, seed=3).digest
    )
    assert (
        task.digest
        != load_task(SUM, PromptEncoder(tokenizer), args=ONE_DIGIT, size=7, seed=4).digest
    )


def test_an_item_is_scored_by_its_task_strictly_and_leniently(tokenizer):
    task = load_task(SUM, PromptEncoder(tokenizer), size=3)
    rewards = {reward.name: reward for reward in task.rewards}
    assert {name: reward.weight for name, reward in rewards.items()} == dict(
        strict=0.5, lenient=0.5
    )
    for prompt in task.prompts:
        _, columns = reward_rows([prompt], 3)
        right = prompt.columns["answer"]
        said = [right, f"It is {right}.", "nothing"]
        scores = {
            name: reward.function(completions=said, **columns) for name, reward in rewards.items()
        }
        assert scores["lenient"] == [1, 1, 0]
        assert scores["strict"][0] == 1 and scores["strict"][1] < 1 and scores["strict"][2] == 0
    task = load_task(SUM, PromptEncoder(tokenizer), size=3, weights={"lenient": 2.0})
    assert [(reward.name, reward.weight) for reward in task.rewards] == [("lenient", 2.0)]


def test_an_item_is_scored_as_if_it_had_never_left_its_data_set(tokenizer):
    # JSON would make lists of its tuples, and this task compares with those.
    task = load_task("reasoning_gym:rearc", PromptEncoder(tokenizer), size=2)
    strict = next(reward.function for reward in task.rewards if reward.name == "strict")
    _, columns = reward_rows(task.prompts, 1)
    assert strict(completions=columns["answer"], **columns) == [1, 1]


def test_seeds_share_no_items(tokenizer):
    # reasoning_gym's own seeds do: item 1 of seed 0 is item 0 of seed 1.
    first, second = (
        {
            prompt.text
            for prompt in load_task(SUM, PromptEncoder(tokenizer), args=SIX_DIGITS, seed=s).prompts
        }
        for s in (0, 1)
    )
    assert len(first) == len(second) == 1000 and not first & second


def test_what_is_held_out_is_left_out_of_the_training(tokenizer):
    held_out = load_task(SUM, PromptEncoder(tokenizer), args=ONE_DIGIT, size=40, seed=1)
    options = dict(args=ONE_DIGIT, size=200, seed=0)
    either = load_task(SUM, PromptEncoder(tokenizer), **options)
    train = load_task(SUM, PromptEncoder(tokenizer), **options, exclude=held_out)
    seen = {prompt.ids for prompt in held_out.prompts}
    assert any(
        prompt.ids in seen for prompt in either.prompts
    )  # so there is something to leave out
    assert len(train.prompts) == 200
    assert not any(prompt.ids in seen for prompt in train.prompts)
    kept = [prompt for prompt in either.prompts if prompt.ids not in seen]
    assert list(train.prompts[: len(kept)]) == kept
    assert (
        train.digest == load_task(SUM, PromptEncoder(tokenizer), **options, exclude=held_out).digest
    )


def test_too_few_prompts_are_left(tokenizer):
    held_out = load_task(SUM, PromptEncoder(tokenizer), args=ONE_DIGIT, size=3000, seed=1)
    with pytest.raises(
        ConfigError, match=r"only 0 of 100 items .* of reasoning_gym:chain_sum, and 5"
    ):
        load_task(SUM, PromptEncoder(tokenizer), args=ONE_DIGIT, size=5, exclude=held_out)


@pytest.mark.parametrize(
    "spec, options, pattern",
    [
        ("reasoning_gym:chain_summ", {}, "no task 'chain_summ'; did you mean chain_sum"),
        ("reasoning_gym:", {}, "tasks are reasoning_gym:NAME"),
        ("chain_sum", {}, "tasks are reasoning_gym:NAME"),
        ("gsm8k:chain_sum", {}, "tasks are reasoning_gym:NAME"),
        (
            SUM,
            dict(args=dict(min_term=2)),
            "chain_sum has no argument 'min_term'; it has min_terms, max_terms, ",
        ),
        (SUM, dict(args=dict(min_terms=0)), "cannot make chain_sum.*min_terms must be positive"),
        (SUM, dict(args=dict(min_terms="two")), "cannot make chain_sum"),
        (SUM, dict(args=dict(seed=1)), "seed has a flag of its own"),
        (SUM, dict(args=[1], size=0, seed=-1), "size is 0.*seed is -1.*task_args is .1."),
        (SUM, dict(size=True, weights=dict(exact=1)), "size is True.*weights of .'exact'."),
    ],
)
def test_a_task_that_cannot_be_is_one_line(tokenizer, spec, options, pattern):
    with pytest.raises(ConfigError, match=pattern) as caught:
        load_task(spec, PromptEncoder(tokenizer), **options)
    assert "\n" not in str(caught.value)


def test_a_system_message_needs_a_chat(tokenizer):
    with pytest.raises(ConfigError, match="^system and chat_format need a chat, and chat is off$"):
        PromptEncoder(tokenizer, chat=False, system="Be brief.")


def test_reasoning_gym_is_optional(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'altiplano\[rl\]'"):
        load_task(SUM, PromptEncoder(tokenizer))


# Prompts of a file ------------------------------------------------------------------------------


def test_a_text_is_a_users_message_and_a_conversation_is_written_as_it_is(tokenizer, tmp_path):
    talk = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [dict(role=role, content=content) for role, content in talk]
    own = [dict(role="system", content="own"), dict(role="user", content="d")]
    tool = [dict(role="user", content="e"), dict(role="tool", content="f")]
    rows = [{"prompt": prompt} for prompt in ("1+1", messages, own, tool, tool[1:])]
    path = write(tmp_path, *rows)
    task = load_prompts(path, PromptEncoder(tokenizer), REWARDS)
    assert [prompt.text for prompt in task.prompts] == ["1+1", "c", "d", "e", "f"]
    expected = [chat(("user", "1+1")), chat(*talk), chat(("system", "own"), ("user", "d"))]
    expected += [chat(("user", "e"), ("tool", "f")), chat(("tool", "f"))]
    assert [prompt.ids for prompt in task.prompts] == [ids_of(t, tokenizer) for t in expected]
    task = load_prompts(write(tmp_path, *rows[:3]), PromptEncoder(tokenizer, system="new"), REWARDS)
    first = ("system", "new")
    expected = [chat(first, ("user", "1+1")), chat(first, *talk), expected[2]]
    assert [prompt.ids for prompt in task.prompts] == [ids_of(t, tokenizer) for t in expected]


def test_a_text_is_plain_where_there_is_no_chat(tokenizer, plain, tmp_path):
    path = write(tmp_path, {"prompt": "1+<|im_end|>"})
    for given, options in ((plain, {}), (tokenizer, dict(chat=False))):
        (prompt,) = load_prompts(path, PromptEncoder(given, **options), REWARDS).prompts
        # One BOS, and what a user types is no control token.
        assert prompt.ids == (0, *tokenizer.encode("1+<|im_end|>")) and 1 not in prompt.ids
        assert prompt.text == "1+<|im_end|>"
    for options in (dict(chat=True), dict(system="Be brief.")):
        with pytest.raises(ArtifactError, match="no default chat template"):
            load_prompts(path, PromptEncoder(plain, **options), REWARDS)
    with pytest.raises(ArtifactError, match="no '<.begin_of_text.>'"):
        load_prompts(path, PromptEncoder(plain, chat_format="llama3"), REWARDS)
    path = write(tmp_path, {"prompt": [dict(role="user", content="?")]})
    with pytest.raises(ArtifactError, match="no default chat template"):
        load_prompts(path, PromptEncoder(plain), REWARDS)
    plain.adds_bos = False
    path = write(tmp_path, {"prompt": "?"}, {"prompt": ""})
    with pytest.raises(DataError, match=r"prompts.jsonl:2: the prompt is empty"):
        load_prompts(path, PromptEncoder(plain), REWARDS)


@pytest.mark.covers("R15")
def test_a_template_that_opens_the_thoughts_is_seen_by_think_format(tokenizer, tmp_path):
    path = write(tmp_path, {"prompt": "2 + 2"})
    done = ["a\n</think>\n<answer>4</answer>"]
    for opening, expected in (("", 0.0), ("<think>\n", 1.0)):
        tokenizer.chat_templates["default"] = cli.TEMPLATE + opening
        rewards = [load_reward("think_format=0.5")]
        task = load_prompts(path, PromptEncoder(tokenizer), rewards)
        assert task.rewards[0].function(prompts=["2 + 2"], completions=done) == [expected]
        assert (task.rewards[0].name, task.rewards[0].weight) == ("think_format", 0.5)


@pytest.mark.covers("R29")
def test_prompts_that_are_too_long_are_left_out_and_counted(tokenizer, tmp_path):
    path = write(tmp_path, *({"prompt": "a" * n} for n in (1, 40, 2, 3)))
    flags = dict(data=path, reward="think_format", chat=False)
    whole = TaskFlags(**flags).load(tokenizer, size=1, seed=0)
    limit = sorted(len(prompt.ids) for prompt in whole.prompts)[-2]
    task = TaskFlags(**flags, max_prompt_len=limit).load(tokenizer, size=1, seed=0)
    assert [prompt.text for prompt in task.prompts] == ["a", "aa", "aaa"]
    assert (task.dropped, task.longest) == (1, limit) and task.digest != whole.digest
    assert task.counted == f"3 prompts, the longest of {limit} tokens; 1 longer ones left out"
    assert whole.within(whole.longest).dropped == 0
    with pytest.raises(DataError, match="all 4 prompts have more than 1 tokens, the shortest"):
        whole.within(1)


def test_all_tasks_are_named():
    names = task_names()
    assert SUM in names and len(names) == len(set(names)) > 50


def test_other_fields_are_columns_in_every_row(tokenizer, tmp_path):
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "hint": ["x"], "answer": None}]
    task = load_prompts(write(tmp_path, *rows), PromptEncoder(tokenizer), REWARDS)
    assert [prompt.columns for prompt in task.prompts] == [
        {"answer": 1, "hint": None},
        {"answer": None, "hint": ["x"]},
    ]
    assert reward_rows(task.prompts, 2) == (
        ["a", "a", "b", "b"],
        {"answer": [1, 1, None, None], "hint": [None, None, ["x"], ["x"]]},
    )
    assert task.name.endswith("prompts.jsonl") and task.rewards == tuple(REWARDS)


@pytest.mark.covers("D6", "B17")
def test_rows_that_are_no_prompts_are_named(tokenizer, tmp_path):
    good, user = {"prompt": "a"}, dict(role="user", content="?")
    for row, pattern in (
        ({"text": "a"}, r":2: the row has text; expected .*\{prompt\}"),
        ({"prompt": 3}, ":2: got prompt int"),
        (
            {"prompt": [user, dict(role="assistant", content="!")]},
            ":2: message 1 is the assistant's",
        ),
        ({"prompt": [user, dict(role="system", content="!")]}, ":2: message 1.*system"),
        ({"prompt": "b", "completions": 1}, ":2: the field 'completions'.*rename it"),
        ({"prompt": "b", "prompts": None}, ":2: the field 'prompts'.*rename it"),
        ({"prompt": "b", "completion_ids": [1]}, ":2: the field 'completion_ids'"),
    ):
        with pytest.raises(DataError, match="prompts.jsonl" + pattern):
            load_prompts(write(tmp_path, good, row), PromptEncoder(tokenizer), REWARDS)
    path = write(tmp_path, good, {"text": "a"}, {"prompt": "b"})
    assert len(load_prompts(path, PromptEncoder(tokenizer), REWARDS, skip_bad=1).prompts) == 2
    late = [user, dict(role="system", content="!")]
    with pytest.raises(DataError, match="2 bad rows, and skip_bad=1"):
        load_prompts(
            write(tmp_path, {"prompt": late}, {}, good),
            PromptEncoder(tokenizer),
            REWARDS,
            skip_bad=1,
        )
    with pytest.raises(DataError, match="has no prompts"):
        load_prompts(write(tmp_path), PromptEncoder(tokenizer), REWARDS)


def test_a_row_that_the_chat_format_refuses_is_named_and_may_be_skipped(tokenizer, tmp_path):
    users = [dict(role="user", content="?")] * 2
    tokenizer.special_tokens["</s>"] = 1  # Llama 2's format needs one
    rows = [{"prompt": "a"}, {"prompt": users}, {"prompt": users}]
    path = write(tmp_path, *rows[:2])
    with pytest.raises(DataError, match=":2: .*message 1 .*take turns"):
        load_prompts(path, PromptEncoder(tokenizer, chat_format="llama2"), REWARDS)
    task = load_prompts(path, PromptEncoder(tokenizer, chat_format="llama2"), REWARDS, skip_bad=1)
    assert [prompt.text for prompt in task.prompts] == ["a"]
    with pytest.raises(DataError, match="2 bad rows, and skip_bad=1; .*:2: .* message 1 "):
        load_prompts(
            write(tmp_path, *rows),
            PromptEncoder(tokenizer, chat_format="llama2"),
            REWARDS,
            skip_bad=1,
        )


# Task -------------------------------------------------------------------------------------------


def made(name="t", ids=(1, 2), columns=(("a", 1),), rewards=("r",)) -> Task:
    prompts = (Prompt(text="x", ids=ids, columns=dict(columns)),)
    return Task(
        name=name, prompts=prompts, rewards=tuple(Reward(name=n, function=len) for n in rewards)
    )


def test_the_digest_is_of_names_ids_and_columns():
    others = [
        made(name="u"),
        made(ids=(1, 3)),
        made(ids=(1,)),
        made(columns=[("a", 2)]),
        made(columns=[("b", 1)]),
        made(rewards=["s"]),
        made(rewards=["r", "s"]),
    ]
    assert len({task.digest for task in [made(), *others]}) == len(others) + 1
    columns = [("a", 1), ("b", 2)]
    assert made(columns=columns).digest == made(columns=columns[::-1]).digest


@pytest.mark.slow
def test_the_digest_is_the_same_in_every_process(tokenizer):
    code = "import sys\nfrom models.llama.tokenizer import load_tokenizer\n"
    code += "from trainers.rewards.tasks import PromptEncoder, load_task\n"
    code += "encode = PromptEncoder(load_tokenizer(sys.argv[1]))\n"
    code += "print(load_task(sys.argv[2], encode, size=5).digest)"
    found = {
        subprocess.run(
            [sys.executable, "-c", code, cli.checkpoint(), SUM],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=cli.ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {load_task(SUM, PromptEncoder(tokenizer), size=5).digest}


def test_a_task_without_prompts_or_with_rewards_that_clash_is_none():
    with pytest.raises(DataError, match="t has no prompts"):
        Task(name="t", prompts=(), rewards=tuple(REWARDS))
    with pytest.raises(ConfigError, match="expected each with another name"):
        made(rewards=("r", "r"))
