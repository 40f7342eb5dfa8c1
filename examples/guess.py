"""Recipe: from random weights to a number-guessing game that is played well, by GRPO over turns.

    python examples/guess.py

A tiny Llama with a tokenizer of 16 tokens plays `guess`: it says a number from 1 to 8 and is
answered "higher" or "lower", three times at most. First it learns the form from games of a player
who forgets half of the time what he was told. GRPO has only a reward, 1 for the number and 0
otherwise; whoever halves what is left finds seven numbers of eight. Prints how many games are won
before and after GRPO.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import jax
import tokenizers
from tokenizers import models as tokenizer_models

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from anywhere

from examples.arithmetic import MODEL
from models.llama.model import LLaMa, for_decoding, init_params
from models.llama.tokenizer import Tokenizer, load_tokenizer
from trainers.data import DataConfig, load_dataset
from trainers.environments.episodes import EpisodeConfig
from trainers.environments.player import Player
from trainers.environments.games import Guess
from trainers.environments.process import EnvironmentServer, load_environment
from trainers.environments.rollouts import EpisodeData
from trainers.grpo_trainer import GRPOConfig, GRPOTrainer
from trainers.loop import fit
from trainers.report.rollouts import recorder
from trainers.rewards.accuracy import EvaluationConfig, evaluate_task
from trainers.rewards.tasks import PromptEncoder, load_episodes
from trainers.rollout import RolloutConfig
from trainers.runs.metrics import MetricsLog
from trainers.sft_trainer import SFTConfig, SFTTrainer

HIGH, TURNS = 8, 3
CARE = 0.5  # how often the player of the examples thinks of what it was told
# A turn is a number and a stop token; between two turns stand four tokens of the game.
LENGTH = TURNS * 2 + (TURNS - 1) * 4
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<model>' }}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)


def make_tokenizer(folder: Path) -> Tokenizer:
    """A token for each number and for each thing that the game says."""
    control = ["<s>", "</s>", "<user>", "<model>"]
    said = [f"guess 1 to {HIGH}", "higher", "lower", "say a number"]
    numbers = {str(n): len(control) + n - 1 for n in range(1, HIGH + 1)}
    made = tokenizers.Tokenizer(tokenizer_models.BPE(dict(zip(control, range(4))) | numbers, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(control)
    made.add_tokens(said)
    made.save(str(folder / "tokenizer.json"))
    names = dict(bos_token="<s>", eos_token="</s>", add_bos_token=False, chat_template=TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return load_tokenizer(folder)


def write_games(path: Path, seed: int) -> None:
    """Games of a careless player, as conversations."""
    draw, game = random.Random(seed), Guess(HIGH, TURNS)
    with open(path, "w") as file:
        for example in game.examples(4000, seed):
            messages, done, low, high = list(game.reset(example)), False, 1, HIGH
            while not done:
                listens = draw.random() < CARE
                guess = draw.randint(low, high) if listens else draw.randint(1, HIGH)
                messages.append({"role": "assistant", "content": str(guess)})
                answers, _, done = game.step(messages[-1])
                if not done and answers[0]["content"] == "higher":
                    low = max(low, guess + 1)
                elif not done:
                    high = min(high, guess - 1)
                messages += answers
            file.write(json.dumps({"messages": messages}) + "\n")


def run(
    folder: Path, *, seed: int = 0, sft_steps: int = 200, steps: int = 50
) -> tuple[float, float]:
    """Shares of games that are won (before, after); the folder keeps metrics and episodes."""
    tokenizer, llama = make_tokenizer(folder), LLaMa(MODEL)
    write_games(folder / "games.jsonl", seed)
    data = DataConfig(seq_len=24, batch_size=256, seed=seed)
    dataset = load_dataset(folder / "games.jsonl", tokenizer, data)
    muon = dict(optimizer="muon", learning_rate=1e-2, beta2=0.99, warmup_steps=0)
    sft = SFTTrainer(llama, SFTConfig(micro_batch_size=None, max_steps=sft_steps, **muon))
    state, _ = sft.init(init_params(MODEL, jax.random.key(seed)), jax.random.key(seed))
    state, _ = fit(sft, state, {}, dataset)
    params = state.params

    trainer = GRPOTrainer(
        llama,
        GRPOConfig(
            learning_rate=3e-3, max_steps=steps, max_completion_len=LENGTH, micro_batch_size=None
        ),
        vocab_limit=tokenizer.vocab_size,
    )
    server = EnvironmentServer(load_environment("guess", dict(high=HIGH, turns=TURNS)), timeout=20)
    task = load_episodes(server, PromptEncoder(tokenizer), size=256, seed=seed)
    games = load_episodes(server, PromptEncoder(tokenizer), size=256, seed=seed + 1)
    measured = EvaluationConfig(max_completion_len=LENGTH, batch_size=256)
    player = Player(task, EpisodeConfig(max_turns=TURNS, max_turn_len=2))
    with player, MetricsLog(folder) as log, MetricsLog(folder, name="rollouts.jsonl") as rollouts:

        def won(params) -> float:
            found = evaluate_task(llama, for_decoding(params), tokenizer, games, player, measured)
            return found["total"]["mean"]["value"]

        config = RolloutConfig(prompts_per_step=16, group_size=16, seed=seed)
        write = recorder(rollouts.write, tokenizer)
        data = EpisodeData(trainer, config, task.prompts, tokenizer.answers, player, write)
        before = won(params)
        state, frozen = trainer.init(params, jax.random.key(seed))
        state, _ = fit(trainer, state, frozen, data, log=log)
        return before, won(state.params)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        start = time.monotonic()
        before, after = run(Path(temporary))
        print(f"won {before:.0%} before, {after:.0%} after, {time.monotonic() - start:.0f} s")
