"""Episodes: token in, token out; what a row samples; limits, rewards, failures."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama.decoding import GenerationConfig
from sampling import TopP
from tests.small_episodes import model, player, tokenizer
from tests.small_runs import digest
from tests.talkers import Chatter, Endless, Once, Raises, Shuffles, Silent, shares
from trainers.environments.rollouts import EpisodeData
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.on_policy import RolloutData, decoding_params
from trainers.report.rollouts import from_record, to_record
from trainers.rewards.functions import Reward
from trainers.rewards.pool import RewardPool
from trainers.rollout import RolloutConfig
from utils.clock import PhaseClock
from utils.errors import TrainError

LENGTH = 16
SAMPLER = TopP(temperature=1.0)
# Some numbers end a turn too: random weights seldom say the stop token.
STOPS = frozenset({1, 4, 5, 6, 7, 8, 9})


def play(make, n=2, key=0, length=LENGTH, stop=None, **options):
    """The episodes of a fresh Player."""
    asked, of = player(make, **options)
    llama, _, params = model()
    stops = tokenizer().stop_ids if stop is None else stop
    config = GenerationConfig(max_new_tokens=length, n=n, stop_ids=stops, vocab_limit=16)
    keys = jax.random.split(jax.random.key(key), len(asked.prompts))
    with of:
        return of.play(llama, params, asked.prompts, SAMPLER, config, keys)


def padded(rows):
    return np.asarray([row + [0] * (48 - len(row)) for row in rows])


def full_pass(params, rows):
    """Log-probs of all tokens, [R, T, 16]."""
    logits = model()[0].apply({"params": params}, jnp.asarray(rows))[0][..., :16]
    return jax.nn.log_softmax(logits, axis=-1)


@pytest.fixture(scope="module")
def played():
    return play(Chatter, stop=STOPS)


def test_what_is_sampled_is_what_a_full_pass_gives_and_the_mask_is_exact(played):
    _, params, _ = model()
    rows = padded([[*one.prompt.ids, *one.ids] for one in played])
    several = 0
    for one, row, expected in zip(played, rows, np.asarray(full_pass(params, rows))):
        at = [len(one.prompt.ids) + i for i, sampled in enumerate(one.sampled) if sampled]
        wanted = [expected[i - 1, row[i]] for i in at]
        found = [x for x, sampled in zip(one.logprobs, one.sampled) if sampled]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert all(x == 0 for x, sampled in zip(one.logprobs, one.sampled) if not sampled)
        spans = [range(turn.start, turn.end) for turn in one.turns]
        inside = sorted(i for span in spans for i in span)
        assert inside == [i for i, sampled in enumerate(one.sampled) if sampled]
        several += len(one.turns) > 1
    assert several > len(played) / 3


def test_ids_between_turns_are_what_the_template_writes(played):
    decode = tokenizer().decode
    for one in played:
        for turn, after in zip(one.turns, one.turns[1:]):
            said = decode(one.ids[turn.end : after.start])
            answers = "".join(f"<user>{m['content']}</s>" for m in turn.answers)
            assert said == answers + "<model>"
        if len(one.turns) > 1:  # the first one ended by a stop token
            text = decode(one.ids[: one.turns[0].end - 1], skip_special=True)
            assert one.turns[0].message["content"] == text


def test_an_episode_does_not_depend_on_time_or_batch_mates(played):
    slow = play(Chatter, stop=STOPS, slow=0.03)
    for one, other in zip(played, slow, strict=True):
        assert (one.ids, one.sampled, one.logprobs) == (other.ids, other.sampled, other.logprobs)
        assert one.record == other.record
    assert len({tuple(one.ids) for one in played}) > len(played) / 2


def test_a_single_turn_is_todays_rollout_to_the_bit():
    config = dict(learning_rate=0.01, max_steps=4, max_completion_len=8, micro_batch_size=None)
    of = GRPOTrainer(model()[0], GRPOConfig(**config), None, 16)
    state, frozen = of.init(model()[1], jax.random.key(1))
    asked, episodes = player(Once, max_turns=1, max_turn_len=None)
    rollouts = RolloutConfig(prompts_per_step=3, group_size=4)
    reader, clock = tokenizer().answers, PhaseClock()
    keys = jax.random.split(jax.random.key(0), 3)
    with episodes, RewardPool([Reward(name="episode", function=shares)]) as pool:
        ours = EpisodeData(of, rollouts, asked.prompts, reader, episodes)
        plain = RolloutData(of, rollouts, asked.prompts, reader, pool)
        found, expected = (
            data.sample(decoding_params(of, state, frozen), asked.prompts[:3], keys, clock)
            for data in (ours, plain)
        )
    assert (found.rewards != 0).any()
    layout = plain.layout(expected)
    after = []
    for rollout in (found, expected):
        batch = rollout.batch(layout)
        state, frozen = of.init(model()[1], jax.random.key(1))
        after.append((digest(batch), digest(of.train_step(state, frozen, batch)[0].params)))
    assert after[0] == after[1]


def test_the_gradient_is_that_of_the_sampled_tokens_alone():
    config = dict(max_completion_len=LENGTH, micro_batch_size=None)
    of = GRPOTrainer(model()[0], GRPOConfig(**config), None, 16)
    asked, episodes = player(Chatter)
    rollouts = RolloutConfig(prompts_per_step=3, group_size=4, scale="none")
    with episodes:
        data = EpisodeData(of, rollouts, asked.prompts, tokenizer().answers, episodes)
        data.tokenizer = dataclasses  # decoded by the Player alone
        data._generation = dataclasses.replace(data._generation, stop_ids=STOPS)
        keys = jax.random.split(jax.random.key(0), 3)
        found = data.sample(model()[2], asked.prompts[:3], keys, PhaseClock())
    assert 0 < found.sampled.sum() < found.lengths.sum()
    layout = data.layout(found)
    gradients, _ = of.gradients(model()[1], {}, found.batch(layout), jax.random.key(0))

    rows, weights = [], np.zeros((12, 48))  # every episode as a row of its own
    for i, (b, g) in enumerate(np.ndindex(3, 4)):
        ids = found.prompts[b].ids
        rows.append([*ids, *found.tokens[b, g, : found.lengths[b, g]].tolist()])
        weights[i, len(ids) + np.flatnonzero(found.sampled[b, g])] = found.advantages[b, g]
    rows = padded(rows)

    def loss(params):
        logprobs = full_pass(params, rows)[:, :-1]
        of_tokens = jnp.take_along_axis(logprobs, rows[:, 1:, None], axis=-1)[..., 0]
        return -(of_tokens * weights[:, 1:]).sum() / found.sampled.sum()

    expected = jax.grad(loss)(model()[1])
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, atol=2e-6)
    again, _ = from_record(to_record(1, found, layout, tokenizer()), "line 1")
    assert digest(again.batch(layout)) == digest(found.batch(layout))
    assert {"turns", "sampled_mean", "calls", "call_errors"} <= found.metrics().keys()


@pytest.mark.covers("V8")
def test_limits_and_rewards():
    for one in play(Endless, stop=STOPS, max_turns=2):
        assert len(one.turns) <= 2 and not one.stopped and one.reward == 0
        assert len(one.ids) <= LENGTH
    for one in play(Chatter, stop=STOPS, max_turns=9, turns=9, length=12):
        assert len(one.ids) <= 12 and (one.cut or one.done or len(one.turns) <= 4)
        assert one.reward == sum(turn.reward or 0 for turn in one.turns)
    for one in play(Silent, stop=STOPS):
        assert math.isnan(one.reward) and one.stopped != one.cut


def test_a_failure_costs_its_episode_and_is_told():
    with pytest.warns(UserWarning, match="KeyError: 'board' .*completions unscorable"):
        found = play(Raises, stop=STOPS)
    failed = [one for one in found if one.failed]
    assert failed and len(failed) < len(found)
    assert all(math.isnan(one.reward) for one in failed)
    with pytest.raises(TrainError, match="environment 'm:E' on .*KeyError: 'board'"):
        play(Raises, stop=STOPS, on_failure="stop")


@pytest.mark.covers("V6")
def test_the_first_messages_are_those_of_the_group():
    for one in play(Chatter, stop=STOPS, system="1"):  # which is not the environment's
        assert [m["role"] for m in one.prompt.messages] == ["system", "user"]
        assert not one.failed
    with pytest.raises(TrainError, match="reset gave other messages for the same example"):
        play(Shuffles, stop=STOPS)


@pytest.mark.covers("V7")
def test_a_template_without_a_stop_token_is_refused():
    asked, of = player(Chatter)
    form = asked.chat
    with of, pytest.raises(TrainError, match="writes no stop token"):
        form.template._template = form.template._template.environment.from_string(
            "{% for m in messages %}<user>{{ m.content }}{% endfor %}<model>"
        )
        of.play(
            *(model()[0], model()[2], asked.prompts, SAMPLER),
            GenerationConfig(max_new_tokens=LENGTH, n=2, stop_ids=STOPS, vocab_limit=16),
            jax.random.split(jax.random.key(0), len(asked.prompts)),
        )
