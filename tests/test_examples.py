"""The examples run, and do what they promise."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from examples import arithmetic, custom_loss, grpo_step, guess, sft_json

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_the_notebook_runs(tmp_path, name):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    first = f"import sys; sys.path.insert(0, {str(EXAMPLES.parent)!r})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.slow
def test_the_default_model_learns_a_json_shape(tmp_path):
    before, after = sft_json.run(tmp_path)
    assert before < 0.1 and after > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_grpo_makes_sums_right_from_random_weights_on(tmp_path, seed):
    before, after = arithmetic.run(tmp_path, seed=seed)
    assert before < 0.4 and after > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_guessing_game_is_learnt_over_turns(tmp_path, seed):
    before, after = guess.run(tmp_path, seed=seed)
    assert before < 0.6 and after > before + 0.15


@pytest.mark.slow
def test_grpo_steps_in_one_page_raise_the_reward():
    rewards = grpo_step.run(steps=12)
    assert rewards[0] < 0.5 and sum(rewards[-3:]) / 3 > rewards[0] + 0.2


@pytest.mark.slow
def test_a_loss_of_ones_own_falls():
    losses = custom_loss.run(steps=12)
    assert losses[-1] < losses[0] / 2
