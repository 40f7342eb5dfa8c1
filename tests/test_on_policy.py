"""Rollouts: what is sampled, what it is worth, what is kept of it, and that a run can be resumed."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama.decoding import Completions
from models.llama.lora import LoRAConfig
from tests import small_runs, tiny
from tests.grpo_rewards import even, failing, ones, same, sometimes, wrong_type
from tests.small_grpo import LENGTH, REWARDS, sampler, start, task, tokenizer, trainer
from tests.small_runs import curve, digest
from trainers.runs.checkpoint import Checkpointer, CheckpointReader
from trainers.grpo_trainer import SCALES, group_advantages
from trainers.loop import Progress, Session, fit
from trainers.runs.metrics import MetricsLog
from trainers.on_policy import RolloutData, decoding_params
from trainers.report.replay import SavedRun, read_run, replay_step, verdict
from trainers import on_policy
from trainers.rewards import accuracy
from trainers.rewards.accuracy import EvaluationConfig, TaskEvaluation
from trainers.rewards.functions import Reward
from trainers.rewards.pool import RewardPool
from trainers.report.rollouts import from_record, recorder, to_record
from trainers.rollout import Layout, Rollout, RolloutConfig, parts
from utils.clock import PhaseClock
from utils.errors import ArtifactError, ConfigError, DataError, TrainError
from utils.files import flatten


def lines(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def run(of, folder, *, state=None, checkpointer=None, progress=Progress(), stop=None, **config):
    """Trains; `stop`: rollouts after which it is asked to."""
    made = start(of) if state is None else (state, start(of)[1])
    calls = []

    def should_stop():
        calls.append(None)
        return stop is not None and len(calls) > stop

    first = int(made[0].step) + 1
    with (
        MetricsLog(folder, start_step=first) as log,
        MetricsLog(folder, name="rollouts.jsonl", start_step=first) as rollouts,
        sampler(of, write=recorder(rollouts.write, tokenizer()), **config) as data,
    ):
        return fit(
            of,
            *made,
            data,
            log=log,
            checkpointer=checkpointer,
            session=Session(progress=progress, should_stop=should_stop),
        )


def made(prompts, rewards):
    """A Rollout with these rewards [B, G], of tokens that tell their place."""
    shape = B, G, C = *np.shape(rewards), LENGTH
    lengths = 1 + np.arange(B * G).reshape(B, G) % C
    inside = np.arange(C) < lengths[..., None]
    return Rollout(
        prompts=list(prompts),
        texts=[["1"] * G] * B,
        functions=("told",),
        tokens=np.where(inside, 1 + np.arange(B * G * C).reshape(shape) % 9, 0).astype(np.int32),
        lengths=lengths,
        stopped=lengths % 2 == 1,
        logprobs=np.where(inside, -0.5, 0).astype(np.float32),
        scores=np.asarray(rewards, float)[..., None],
        rewards=np.asarray(rewards, float),
        advantages=np.zeros((B, G), np.float32),
    )


def told(prompt):
    """A group's four rewards: all equal but for four of the ten prompts, whose spreads differ."""
    answer = prompt.columns["answer"]
    return [answer * answer * (answer in (1, 4, 6, 9)) * j for j in (0.0, 0.5, 1.0, 3.0)]


class Told(RolloutData):
    """Samples nothing: it gives rollouts with the rewards `told`, and notes what it was asked for."""

    def __init__(self, of, **config):
        config = RolloutConfig(**dict(prompts_per_step=4, group_size=4) | config)
        super().__init__(of, config, task().prompts, tokenizer(), SimpleNamespace(report=dict))
        self.answers, self.keys = [], []

    def sample(self, policy, prompts, keys, clock):
        self.answers += [prompt.columns["answer"] for prompt in prompts]
        self.keys += map(tuple, jax.random.key_data(keys).tolist())
        return made(prompts, [*map(told, prompts)]).with_advantages(self.config.scale)


# What is sampled --------------------------------------------------------------------------------


def test_prompts_and_keys_follow_from_the_seed_the_state_and_the_position():
    of = trainer()
    state, frozen = start(of)

    def asked(rounds=5, seed=0, state=state, position=0):
        by = Told(of, seed=seed)
        batches = by.batches()
        batches.set_state({"prompts": position})
        for _ in range(rounds):
            batches.sample(state, frozen, PhaseClock())
            next(batches)
        assert batches.get_state() == {"prompts": position + 4 * rounds}
        return by.answers, by.keys

    answers, keys = asked()
    epochs = answers[:10], answers[10:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(10)] and epochs[0] != epochs[1]
    # A prompt that comes again has another key, while the state has the same.
    assert len(set(keys)) == 20
    assert asked() == (answers, keys)
    assert asked(rounds=3, position=8) == (answers[8:], keys[8:])
    assert asked(seed=1)[0][:10] != epochs[0]
    other_answers, other_keys = asked(state=state.replace(key=jax.random.key(7)))
    assert other_answers == answers and not set(other_keys) & set(keys)


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_after_refills_are_those_of_the_groups_that_are_kept(scale):
    of = trainer()
    by = Told(of, scale=scale, refills=2)
    batches = by.batches()
    batches.sample(*start(of), PhaseClock())
    batch, prompts = next(batches), by.prompts
    by_ids = {prompt.ids: prompt for prompt in prompts}
    assert len(by_ids) == 10
    kept = [
        by_ids[tuple(ids[:n].tolist())] for ids, n in zip(batch["prompts"], batch["prompt_lengths"])
    ]
    # In the order of their sampling those with something to learn, and of the others the first.
    varied = [answer for answer in by.answers if answer in (1, 4, 6, 9)]
    assert 4 < len(by.answers) == batches.get_state()["prompts"]
    found = [prompt.columns["answer"] for prompt in kept]
    assert [answer for answer in found if answer in varied] == varied[:4]
    rewards = np.float32([*map(told, kept)])
    expected = group_advantages(rewards, np.ones_like(rewards, bool), scale)
    np.testing.assert_array_equal(batch["advantages"], expected)


def test_a_completion_without_a_reward_has_no_part_in_a_batch():
    rewards = np.array([[1, np.nan, 2, 3], [np.nan] * 4, [0.5, 0.5, np.nan, 1]])
    rollout = made(task().prompts[:3], rewards).with_advantages("group")
    valid, known = ~np.isnan(rewards), np.isfinite(rewards)
    for branches in (4, 2):
        batch = rollout.batch(Layout(prompt_width=16, width=LENGTH, branches=branches))
        whole = {
            name: x.reshape(3, 4, *x.shape[2:])
            for name, x in batch.items()
            if x.ndim > 1 and name != "prompts"
        }
        assert (whole["counts"] == valid).all()
        inside = np.arange(LENGTH) < rollout.lengths[..., None]
        assert (whole["target_mask"] == inside).all()
        assert not whole["advantages"][~valid].any() and np.isfinite(whole["advantages"]).all()
        for row in (0, 2):
            of_row = rewards[row][known[row]]
            np.testing.assert_allclose(
                whole["advantages"][row][known[row]],
                (of_row - of_row.mean()) / (of_row.std(ddof=1) + 1e-4),
                rtol=1e-5,
            )
    masked = rollout.batch(Layout(prompt_width=16, width=LENGTH, branches=4), mask_truncated=True)
    assert (masked["target_mask"].any(-1) == rollout.stopped).all()
    assert (masked["counts"] == valid).all()
    said = rollout.metrics()
    assert said["unscorable"] == 6 / 12 and said["zero_std"] == 1 / 3
    assert said["reward"] == pytest.approx(np.nanmean(rewards))


def test_without_a_reward_lengths_alone_are_measured():
    prompts = task().prompts[:3]
    with RewardPool(()) as pool:
        scores, rewards = pool.score(prompts, ["1"] * 6, [[1]] * 6, 2)
    assert scores.shape == (6, 0) and np.isnan(rewards).all() and pool.report() == {}
    rollout = dataclasses.replace(made(prompts, rewards.reshape(3, 2)), functions=())
    assert rollout.metrics().keys() == {"length_mean", "length_max", "truncated"}
    assert not rollout.with_advantages("none").advantages.any()


@pytest.mark.covers("N4")
def test_the_samplers_log_probs_are_the_trainers_and_the_ratio_is_one(tmp_path):
    run(trainer(temperature=0.6, loss="grpo"), tmp_path)
    for record in curve(tmp_path):
        assert record["gap_max"] < 1e-5 and record["gap_mean"] <= record["gap_max"]
        assert record["ratio_max"] == 1 and record["clip_low"] == record["clip_high"] == 0
        assert abs(record["loss"]) < 1e-6 < record["grad_norm"]
        assert "kl" not in record  # beta is 0: nothing is measured, and no chart drawn


@pytest.mark.slow
def test_each_rollout_has_new_keys_and_the_order_of_the_prompts_is_the_seeds():
    of = trainer()
    state, frozen = start(of)
    with sampler(of, task(4)) as by:
        batches = by.batches()
        seen = []
        for _ in range(3):  # the same four prompts each time, in another order
            batches.sample(state, frozen, PhaseClock())
            seen.append(next(batches))
        assert batches.get_state() == {"prompts": 12}
    rows = [
        {tuple(p): t for p, t in zip(batch["prompts"].tolist(), batch["tokens"].tolist())}
        for batch in seen
    ]
    assert rows[0].keys() == rows[1].keys() == rows[2].keys()
    for prompt in rows[0]:  # one state, one key: only the place in the order differs
        assert rows[0][prompt] != rows[1][prompt] != rows[2][prompt] != rows[0][prompt]
    orders = [batch["prompts"].tolist() for batch in seen]
    assert orders[0] != orders[1] or orders[1] != orders[2]


def test_a_prompt_with_its_completions_is_the_same_whoever_else_is_in_the_batch():
    of = trainer()
    state, frozen = start(of)
    policy = decoding_params(of, state, frozen)
    keys = jax.vmap(jax.random.key)(np.arange(4))
    with sampler(of) as by:
        prompts = task().prompts[:4]
        whole = by.sample(policy, prompts, keys, PhaseClock())
        turned = by.sample(policy, prompts[::-1], keys[::-1], PhaseClock())
    assert (whole.tokens == turned.tokens[::-1]).all() and whole.texts == turned.texts[::-1]
    np.testing.assert_array_equal(whole.logprobs, turned.logprobs[::-1])
    np.testing.assert_array_equal(whole.advantages, turned.advantages[::-1])


def test_scores_are_what_each_function_says_of_each_completion():
    of, prompts = trainer(), task().prompts[4:8]  # prompt 7 has no second reward
    keys = jax.vmap(jax.random.key)(np.arange(4))
    with sampler(of) as by:
        rollout = by.sample(decoding_params(of, *start(of)), prompts, keys, PhaseClock())
    ids = [
        [tokens[:n].tolist() for tokens, n in zip(*group)]
        for group in zip(rollout.tokens, rollout.lengths)
    ]
    answers = [[prompt.columns["answer"]] * 4 for prompt in prompts]
    expected = np.array(
        [
            [ones(texts), even(texts, completion_ids, answer)]
            for texts, completion_ids, answer in zip(rollout.texts, ids, answers)
        ],
        float,
    ).swapaxes(1, 2)
    assert rollout.functions == ("ones", "even") and len(np.unique(expected[..., 0])) > 4
    np.testing.assert_array_equal(rollout.scores, expected)
    weighted = expected[..., 0] + 0.5 * np.nan_to_num(expected[..., 1])
    np.testing.assert_allclose(rollout.rewards, weighted)


def test_masks_end_with_the_first_stop_and_texts_leave_it_out():
    of = trainer()
    with sampler(of) as by:
        batches = by.batches()
        batches.sample(*start(of), PhaseClock())
        rollout = by.sample(
            decoding_params(of, *start(of)),
            task().prompts[:4],
            jax.vmap(jax.random.key)(np.arange(4)),
            PhaseClock(),
        )
        batch = rollout.batch(by.layout(rollout))
    stops = tokenizer().stop_ids
    assert rollout.stopped.any() and not rollout.stopped.all()
    for tokens, mask, stopped, text in zip(
        rollout.tokens.reshape(-1, LENGTH),
        batch["target_mask"].reshape(-1, LENGTH),
        rollout.stopped.reshape(-1),
        sum(rollout.texts, []),
    ):
        n = mask.sum()
        assert mask[:n].all() and (tokens[n:] == 0).all()
        assert (tokens[n - 1] in stops) == stopped and (stopped or n == LENGTH)
        assert not stops & set(tokens[: n - 1].tolist())
        assert text == tokenizer().decode(tokens[: n - stopped], skip_special=True)
    masked = rollout.batch(by.layout(rollout), mask_truncated=True)
    assert (masked["target_mask"].any(-1) == rollout.stopped).all()
    assert (masked["counts"] == 1).all()  # they count as completions all the same


@pytest.mark.covers("R29")
def test_one_long_prompt_widens_the_steps_that_have_it_and_no_other():
    short = task(63).prompts
    long = dataclasses.replace(short[0], ids=(*short[0].ids, *[short[0].ids[-1]] * 15))
    asked = dataclasses.replace(task(1), prompts=(*short, long))
    with sampler(trainer(), asked) as by:
        plain = made(short[:4], np.ones((4, 4)))
        assert by.layout(plain).prompt_width == 16
        assert by.layout(made((*short[:3], long), np.ones((4, 4)))).prompt_width == 32
        shapes = [
            batch["prompts"].shape + batch["tokens"].shape for batch in by.preflight_batches()
        ]
    # One long prompt costs one compilation more.
    assert len(set(shapes)) == len(shapes) == 2 and shapes[0] == max(shapes)
    with sampler(trainer(), task(63)) as by:
        assert len(by.preflight_batches()) == 1


@pytest.mark.covers("R32")
def test_evaluation_scores_the_text_that_training_scores(monkeypatch):
    """Of completions that a plain token stops: it is in neither text."""
    of, asked, known = trainer(), task(2), tokenizer()
    ids = np.array([known.encode(text) for text in ("127", "347", "12=", "347")], np.int32)
    done = Completions(
        tokens=ids,
        lengths=np.full(4, 3, np.int32),
        logprobs=np.zeros((4, 3), np.float32),
        finish_reason=["stop", "stop", "length", "length"],
        stop_text=[None] * 4,
        after=[prompt.ids[-1] for prompt in asked.prompts for _ in range(2)],
    )
    seen = []

    class Pool(SimpleNamespace):
        def __call__(self, prompts, texts, *_):
            return None

        def score(self, prompts, texts, ids, group_size):
            seen.append(list(texts))
            return np.zeros((4, 1)), np.zeros(4)

    pool = Pool(names=("seen",), failures=[], report=dict)
    for module in (on_policy, accuracy):
        monkeypatch.setattr(module, "generate", lambda *_, **__: done)
    config = RolloutConfig(prompts_per_step=2, group_size=2)
    data = RolloutData(of, config, asked.prompts, asked.reader(known), pool)
    data.sample(None, asked.prompts, None, PhaseClock())
    measured = EvaluationConfig(samples=2, max_completion_len=LENGTH, batch_size=2)
    params = start(of)[0].params
    accuracy.evaluate_task(of.model, params, known, asked, pool, measured)
    assert seen[0] == seen[1] == ["12", "34", "12=", "347"]


@pytest.mark.slow
def test_what_cannot_be_scored_is_left_out():
    of = trainer()
    with sampler(of, task(8), prompts_per_step=8) as by:
        batches = by.batches()
        batches.sample(*start(of), PhaseClock())
        report = batches.report()
        assert report["unscorable"] == 0 and report["rewards"].keys() == {"ones", "even"}
    only = task(8, REWARDS[1:])  # prompt 7 has no reward at all
    with sampler(of, only, prompts_per_step=8) as by:
        batches = by.batches()
        batches.sample(*start(of), PhaseClock())
        batch = next(batches)
        assert batches.report()["unscorable"] == 1 / 8
    (row,) = np.flatnonzero((batch["counts"] == 0).all(1))
    assert tuple(batch["prompts"][row][: batch["prompt_lengths"][row]]) == only.prompts[7].ids
    assert not batch["advantages"][row].any() and np.delete(batch["counts"], row, 0).all()


@pytest.mark.covers("D13")
def test_equal_rewards_have_no_gradient_and_are_counted(tmp_path):
    of, asked = trainer(), task(rewards=[Reward(name="same", function=same)])
    before = digest(start(of)[0].params)
    state, _ = run(of, tmp_path, asked=asked)
    assert all(r["zero_std"] == 1 and r["grad_norm"] == 0 for r in curve(tmp_path))
    assert digest(state.params) == before


@pytest.mark.slow
def test_dynamic_sampling_replaces_groups_with_nothing_to_learn_and_ends():
    of, asked = trainer(), task(rewards=[Reward(name="sometimes", function=sometimes)])
    for refills, groups in ((0, 4), (2, 12), (9, None)):
        with sampler(of, asked, prompts_per_step=4, refills=refills) as by:
            batches = by.batches()
            batches.sample(*start(of), PhaseClock())
            varied = (next(batches)["advantages"] != 0).any(1)
            taken = batches.get_state()["prompts"]
            assert groups is None or taken <= groups
            assert taken == 4 or refills
        if refills == 9:  # ten prompts, two of which vary: after 20 all four places do
            assert varied.all() and taken <= 24
    with pytest.raises(ConfigError, match="refills=-1"):
        RolloutConfig(refills=-1)


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(ConfigError, match=r"max_completion_len=30: 37 exceed .* context of 32"):
        with sampler(trainer(max_completion_len=30)):
            pass


def test_sampling_from_less_than_everything_warns():
    with pytest.warns(UserWarning, match="importance ratios are biased"):
        RolloutConfig(top_p=0.9)


# What it becomes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_groups_may_be_cut_and_batches_split_without_a_change():
    of = trainer(beta=0.1)
    state, frozen = start(of)
    found = []
    for branches, micro in ((4, None), (2, 3)):
        cut = dataclasses.replace(of, config=dataclasses.replace(of.config, micro_batch_size=micro))
        with sampler(cut, branches=branches) as by:
            batches = by.batches()
            batches.sample(state, frozen, PhaseClock())
            batch = next(batches)
        assert batch["tokens"].shape[:2] == (16 // branches, branches)
        found.append(cut.gradients(state.params, frozen, batch, state.key)[0])
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_several_updates_of_a_rollout_keep_its_log_probs(tmp_path):
    of = trainer(max_steps=8)
    run(of, tmp_path, iterations=2, mini_batches=2)
    records = curve(tmp_path)
    assert records[0]["ratio_max"] == pytest.approx(1, abs=1e-5)  # other rows, other rounding
    assert min(record["ratio_max"] for record in records[1:4]) > 1.0001
    assert len(lines(tmp_path)) == 2 and [line["step"] for line in lines(tmp_path)] == [1, 5]
    rewards = [record["reward"] for record in records]
    assert len(set(rewards[:4])) == len(set(rewards[4:])) == 1 != len(set(rewards))


@pytest.mark.slow
def test_with_lora_the_reference_is_the_base_model_and_takes_no_memory():
    of = trainer(lora=LoRAConfig(rank=2), beta=0.1)
    state, frozen = start(of)
    assert of.keeps_frozen and set(map(id, jax.tree.leaves(frozen))) == set(
        map(id, jax.tree.leaves(start(of)[1]))
    )
    with sampler(of) as by:
        batches = by.batches()
        batches.sample(state, frozen, PhaseClock())
        batch = next(batches)
    np.testing.assert_allclose(  # fresh adapters change nothing
        batch["ref_logprobs"] * batch["target_mask"],
        batch["sampler_logprobs"] * batch["target_mask"],
        atol=1e-5,
    )
    state, metrics = of.train_step(state, frozen, batch)
    assert abs(float(of.derive(metrics)["kl"])) < 1e-9


@pytest.mark.slow
def test_no_compilation_after_the_first_steps_whatever_the_lengths(tmp_path):
    of = trainer(max_steps=12, max_completion_len=16, learning_rate=0.02)
    run(of, tmp_path, prompts_per_step=1, group_size=2)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len({record["length_max"] for record in records}) > 1
    assert [r["step"] for r in records[2:] if r["compilations"]] == []


@pytest.mark.slow
@pytest.mark.covers("D14")
def test_when_all_completions_are_cut_and_masked_nothing_is_learnt():
    of = trainer(mask_truncated=True)
    state, frozen = start(of)
    policy, keys = decoding_params(of, state, frozen), jax.vmap(jax.random.key)(np.arange(4))
    with sampler(of) as by:
        rollout = by.sample(policy, task().prompts[:4], keys, PhaseClock())
        cut = dataclasses.replace(rollout, stopped=np.zeros_like(rollout.stopped))
        batch = cut.batch(by.layout(rollout), mask_truncated=True)
    assert cut.metrics()["truncated"] == 1 and batch["counts"].all()
    before = digest(state.params)
    state, metrics = of.train_step(state, frozen, batch)
    assert not metrics["updated"] and metrics["loss"] == 0 and digest(state.params) == before


# Going on ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("updates", [dict(), dict(iterations=2, mini_batches=2)])
def test_stopped_anywhere_and_gone_on_with_is_the_same_run(tmp_path, updates):
    of = trainer(max_steps=8, beta=0.1, save_every=1)
    state, progress = run(of, tmp_path / "whole", **updates)
    whole = digest(state), progress, curve(tmp_path / "whole"), lines(tmp_path / "whole")
    every = 4 if updates else 1
    for stop in range(1, 8 // every, 3):  # asked between rollouts alone
        folder = tmp_path / str(stop)
        with Checkpointer(folder / "c") as checkpointer:
            run(of, folder, checkpointer=checkpointer, stop=stop, **updates)
        with Checkpointer(folder / "c") as checkpointer:
            like = jax.eval_shape(lambda: start(of)[0])
            restored = checkpointer.restore(like)
            assert restored.step == stop * every
            more = dict(state=restored.state, checkpointer=checkpointer)
            progress = Progress(**restored.meta["progress"])
            state, progress = run(of, folder, progress=progress, **more, **updates)
        assert (digest(state), progress, curve(folder), lines(folder)) == whole


@pytest.mark.covers("N1")
def test_the_line_of_a_rollout_has_the_failures_of_rewards():
    rollout, written = made(task().prompts[:2], [[1.0, 2.0], [0.0, np.nan]]), []
    for failures in ([{"first": "reward 'f' on prompt 1: ValueError", "completions": 1}], []):
        layout = Layout(prompt_width=16, width=LENGTH, branches=2)
        recorder(written.append, tokenizer(), lambda: failures)(1, rollout, layout)
        assert written.pop().get("failures", []) == failures


def test_a_rollout_is_read_back_as_it_was(tmp_path):
    of = trainer(beta=0.1)
    state, frozen = start(of)
    with (
        MetricsLog(tmp_path, name="rollouts.jsonl") as log,
        sampler(of, write=recorder(log.write, tokenizer()), iterations=2) as by,
    ):
        batches = by.batches()
        batches.sample(state, frozen, PhaseClock())
        batch = next(batches)
    (line,) = lines(tmp_path)
    rollout, layout = from_record(line, "here")
    again = rollout.batch(layout)
    assert again.keys() == batch.keys()
    for name in batch:
        np.testing.assert_array_equal(again[name], batch[name], err_msg=name)
    assert to_record(1, rollout, layout, tokenizer()) == line
    for broken in ({}, line | {"width": "x"}, line | {"prompts": []}):
        with pytest.raises(DataError, match="here: not a rollout of this program"):
            from_record(broken, "here")


@pytest.mark.slow
def test_the_docs_list_the_keys_of_metrics(tmp_path):
    """Of GRPO and of SFT, as a run writes them; nothing else is listed but failures."""
    of, sft = trainer(max_steps=8, beta=0.1, save_every=1), small_runs.trainer(max_steps=1)
    run(of, tmp_path / "rl", stop=1)
    data = small_runs.dataset()
    with MetricsLog(tmp_path / "sft") as log:
        fit(sft, *small_runs.start(sft), data, eval_data=data, log=log)
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("rl", "sft")]
    written = {key for text in texts for line in text.splitlines() for key in json.loads(line)}
    written = {"eval_*" if key.startswith("eval_") else key for key in written}
    text = (Path(__file__).parents[1] / "docs/training.md").read_text()
    table = text.partition("### Keys of metrics.jsonl")[2].partition("\n## ")[0]
    firsts = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    assert {key for first in firsts for key in re.findall("`(.*?)`", first)} == written | {
        "failures"
    }


@pytest.mark.slow
@pytest.mark.covers("N12")
def test_a_step_is_computed_again_and_with_another_loss(tmp_path):
    of = trainer(max_steps=6, beta=0.1)
    run(of, tmp_path, iterations=2)
    logged = {record["step"]: record for record in curve(tmp_path)}
    records = {line["step"]: line for line in lines(tmp_path)}
    config = RolloutConfig(prompts_per_step=4, group_size=4, iterations=2)
    for step in (1, 4, 6):
        others = {"other": {"temperature": 0.5}, "same": {}}
        log = flatten(logged[step])
        found = replay_step(SavedRun(of, config, *start(of), records, log), step, others)
        for name in ("loss", "grad_norm", "kl", "entropy", "ratio_max"):
            assert found["run"][name] == pytest.approx(logged[step][name], rel=1e-5, abs=1e-7)
        # All but what the clock measures, the names of the step and its outcome.
        assert log.keys() - found["logged"].keys() == {"step", "updated", "skipped"}
        assert found["run"].keys() == found["logged"].keys()
        assert verdict(found, jnp.float32)[0]
        assert found["same"]["difference"] == 0 and found["same"]["cosine"] == pytest.approx(1)
        assert found["other"]["difference"] > 0.01
    with pytest.raises(
        ConfigError, match="no rollout for step 9 is saved; rollouts.jsonl has steps 1 to 5"
    ):
        replay_step(SavedRun(of, config, *start(of), records), 9)


@pytest.mark.covers("N12")
def test_a_step_without_rollouts_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    train = {"loss": "dapo", "iterations": 2}
    settings = {"train": train, "source": {"ckpt_dir": str(tmp_path / "nowhere")}}
    settings |= {"model": {}, "lora": {}}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "rollouts.jsonl").write_text('{"step": 1}\n{"step": 5}\n')
    for step, missing in ((99, 99), (7, 7), (5, 3)):  # 5 starts from what 3 and 4 made
        told = f"no rollout for step {missing} is saved; rollouts.jsonl has steps 1 to 5"
        with pytest.raises(ConfigError, match=told):
            read_run(tmp_path, step)
    with pytest.raises(ArtifactError, match="nowhere"):
        read_run(tmp_path, 2)


@pytest.mark.covers("R13")
def test_replay_from_another_base_is_refused(tmp_path):
    settings = {"train": {"loss": "dapo", "iterations": 2}, "base_weights": "those of a run"}
    (tmp_path / "checkpoints").mkdir()
    settings |= {"source": {"ckpt_dir": str(tiny.hf_model("gqa")[0])}, "model": {}, "lora": {}}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "rollouts.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="gqa are not those that .* started from"):
        read_run(tmp_path, 1)


@pytest.mark.covers("N12")
@pytest.mark.parametrize(
    "again, dtype, wrong",
    [
        (dict(loss=0.5, gap_max=2e-5, reward=None), "float32", ""),
        (dict(loss=0.50001, gap_max=2.5e-5, reward=None), "float32", ""),
        (dict(loss=0.501, gap_max=2e-5, reward=None), "bfloat16", ""),
        (dict(loss=0.501, gap_max=2e-5, reward=None), "float32", "loss"),
        (dict(loss=0.5, gap_max=2e-3, reward=0.0), "float32", "gap_max, reward"),
        (dict(loss=math.nan, gap_max=2e-5, reward=None), "float32", "loss"),
    ],
)
def test_the_verdict_on_a_step_that_is_computed_again(again, dtype, wrong):
    found = dict(logged=dict(loss=0.5, gap_max=2e-5, reward=None), run=again)
    agrees, said = verdict(found, dtype)
    assert agrees == (not wrong)
    assert f"differs from metrics.jsonl: {wrong} (3 compared)" == said if wrong else "all 3" in said
    assert not verdict(found | {"logged": {}}, dtype)[0]


# Evaluations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward, score", [(0.25, -0.25), (-3.0, 3.0), (None, np.inf)])
def test_the_best_checkpoint_is_that_of_the_largest_reward(monkeypatch, reward, score):
    """Of scores the lowest is the best; where nothing was scored it is none."""
    mean = dict(value=reward, low=0.1, high=0.4)
    found = dict(total=dict(mean=mean), rewards=dict(ones=dict(mean=mean)), mean_length=5.0)
    monkeypatch.setattr(accuracy, "evaluate_task", lambda *_: found)
    of = trainer()
    pool = SimpleNamespace(report=dict)
    evaluation = TaskEvaluation(of, task(), tokenizer(), pool, EvaluationConfig())
    wanted = dict(reward=reward, reward_low=0.1, reward_high=0.4, ones=reward)
    assert evaluation.evaluate(*start(of)) == wanted | dict(length_mean=5.0, score=score)


@pytest.mark.slow
def test_an_evaluation_comes_before_the_first_step_and_decides_on_the_best(tmp_path):
    of = trainer(max_steps=4, eval_every=2, save_every=2)
    with (
        sampler(of) as by,
        MetricsLog(tmp_path) as log,
        Checkpointer(tmp_path / "c", keep=1) as checkpointer,
    ):
        config = EvaluationConfig(samples=2, max_completion_len=LENGTH)
        evaluation = TaskEvaluation(of, task(6), tokenizer(), by.scorer, config)
        options = dict(eval_data=evaluation, log=log, checkpointer=checkpointer)
        fit(of, *start(of), by, **options)
    rewards = {r["step"]: r["eval_reward"] for r in curve(tmp_path) if "eval_reward" in r}
    assert rewards.keys() == {0, 2, 4}
    kept = CheckpointReader(tmp_path / "c").steps
    assert kept == ([2, 4] if rewards[2] > rewards[4] else [4])


@pytest.mark.covers("D11", "D12", "N1")
def test_a_failing_reward_costs_its_prompts_and_a_wrong_one_the_run(tmp_path):
    of = trainer(max_skipped=0)
    rewards = [Reward(name="failing", function=failing), REWARDS[0]]
    failure = r"reward 'failing' on prompt 0 \('.*='\): RuntimeError: no score today"
    said = r"1 updates in a row were skipped: no completion could be scored: " + failure
    with pytest.warns(UserWarning, match=failure + r".*; 16 of 16 completions unscorable"):
        with pytest.raises(TrainError, match=said):
            run(of, tmp_path, asked=task(rewards=rewards))  # not one complete group
    (record,) = curve(tmp_path)
    assert record["unscorable"] == 1 and record["targets"] == 0 and not record["updated"]
    (failed,) = record["failures"]
    assert re.match(failure, failed["first"]) and failed["completions"] == 16
    with pytest.raises(TrainError, match="'wrong'.*'good'"):
        run(of, tmp_path / "b", asked=task(rewards=[Reward(name="wrong", function=wrong_type)]))
    assert parts({"x": np.arange(6)}, 3)[2]["x"].tolist() == [4, 5]
    assert Layout(prompt_width=1, width=1, branches=1)
