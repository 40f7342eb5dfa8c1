"""The examples run, and do what they promise."""

import os
from pathlib import Path

import jax
import nbformat
import pytest
from jax.experimental.compilation_cache import compilation_cache
from nbclient import NotebookClient

from examples import arithmetic, custom_loss, grpo_step, guess, sft_json
from tests import compiling

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The next seed's trainers are new, their programs are not: XLA reads them from files."""

    def keep(folder: str | None, seconds: float) -> None:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        compilation_cache.reset_cache()

    keep(str(tmp_path_factory.mktemp("xla")), 0)
    yield
    keep(None, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_the_notebook_runs(tmp_path, name):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    first = f"import sys; sys.path.insert(0, {str(EXAMPLES.parent)!r})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})
    client.execute(env=os.environ | compiling.environment(optimized=False))


@pytest.mark.slow
def test_the_default_model_learns_a_json_shape(tmp_path):
    fewer = dict(n_train=160, n_held_out=8, max_steps=14)
    before, after = sft_json.run(tmp_path, **fewer, learning_rate=1e-3, warmup_steps=2)
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
