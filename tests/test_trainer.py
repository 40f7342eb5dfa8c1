"""The Trainer on losses small enough to reason about: what is skipped, summed, kept and given away."""

import dataclasses
import doctest
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers import grpo_trainer
from trainers import trainer as trainer_module
from trainers.optimizer import OPTIMIZERS
from trainers.trainer import Loss, TrainConfig, Trainer, Work
from utils.errors import ConfigError

STEPS = dict(learning_rate=0.1, schedule="linear", max_steps=50, weight_decay=0.1)


@dataclasses.dataclass(frozen=True)
class Toy(Trainer):
    """Weighted squares of x·embed + norm - y; `root` has an infinite gradient at 0, `noise` is random."""

    def loss(self, params, batch, key):
        found = batch["x"] @ params["embed"] + params["norm"]
        found += jnp.sqrt(jnp.abs(params["root"])) * batch["root"]
        found += params["noise"] * batch["noise"] * jax.random.normal(key)
        error = found - batch["y"]
        return Loss(
            total=jnp.sum(error**2 * batch["weight"]),
            weight=jnp.sum(batch["weight"]),
            sums={"error": jnp.sum(error * batch["weight"])},
            maxima={"largest": jnp.max(jnp.where(batch["weight"] > 0, error, -jnp.inf))},
        )

    def work(self, batch):
        return Work(targets=len(batch["x"]), tokens=len(batch["x"]), mean_context=1.0)


def toy(**config):
    return Toy(None, TrainConfig(**STEPS | config))


def start(trainer):
    w = np.random.default_rng(7).normal(size=4)
    params = {"embed": jnp.asarray(w, jnp.float32), "norm": jnp.ones(())}
    params |= {"root": jnp.ones(()), "noise": jnp.ones(())}
    return trainer.init(params, jax.random.key(3))[0]


def batch(seed=0, rows=8, **changes):
    rng = np.random.default_rng(seed)
    out = {"x": rng.normal(size=(rows, 4)), "y": rng.normal(size=rows)}
    out |= {"weight": rng.integers(0, 5, rows), "root": np.zeros(rows), "noise": np.zeros(rows)}
    return {key: np.asarray(value, np.float32) for key, value in (out | changes).items()}


def bits(tree):
    """The leaves' bytes; keys of randomness are left out."""
    numbers = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return [np.asarray(x).tobytes() for x in numbers]


def poisoned(kind):
    """A batch whose update must not be done."""
    good = batch(1)
    if kind == "nan_loss":
        good["y"][3] = np.nan
    elif kind == "inf_loss":
        good["y"][3] = 1e30  # its square is not a float32
    elif kind == "infinite_input":
        good["x"][0, 2] = np.inf
    return good


@pytest.mark.covers("D1", "D2", "D4")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_leaves_every_bit_as_it_was(optimizer):
    trainer = toy(optimizer=optimizer, state_dtype="bfloat16" if optimizer == "muon" else "float32")
    state, _ = trainer.train_step(start(trainer), {}, batch())
    for bad in (
        poisoned("nan_loss"),
        poisoned("inf_loss"),
        poisoned("infinite_input"),
        batch(weight=np.zeros(8)),
    ):
        before, key = bits(state), jax.random.key_data(state.key)
        state, metrics = trainer.train_step(state, {}, bad)
        assert bits(state) == before and int(state.step) == 1
        assert not np.array_equal(jax.random.key_data(state.key), key)
        assert not metrics["updated"]
        # Only what is not finite is a fault; nothing to learn from is none.
        assert metrics["finite"] == (metrics["weight"] == 0)
    state, metrics = trainer.train_step(state, {}, batch(2))
    twin, _ = trainer.train_step(start(trainer), {}, batch())
    twin, _ = trainer.train_step(twin, {}, batch(2))
    assert metrics["updated"] and bits(state) == bits(twin) and int(state.step) == 2


@pytest.mark.covers("D2")
def test_one_infinite_gradient_under_a_finite_loss_is_enough():
    trainer = toy()
    state = start(trainer)
    state = state.replace(params=state.params | {"root": jnp.zeros(())})
    before = bits(state)
    state, metrics = trainer.train_step(state, {}, batch(root=np.ones(8)))
    assert math.isfinite(metrics["loss"]) and not math.isfinite(metrics["grad_norm"])
    assert bits(state) == before and not metrics["updated"] and not metrics["finite"]


@pytest.mark.covers("D2")
def test_gradients_whose_norm_overflows_are_skipped():
    trainer = toy()
    # Errors of about 1, gradients of about 1e25, whose squares are no float32.
    huge = batch(x=np.zeros((8, 4)), noise=np.full(8, 1e25))
    state = start(trainer)
    state = state.replace(params=state.params | {"noise": jnp.zeros(())})
    before = bits(state)
    grads, _ = trainer.gradients(state.params, {}, huge, jax.random.key(0))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    state, metrics = trainer.train_step(state, {}, huge)
    assert math.isfinite(metrics["loss"]) and not math.isfinite(metrics["grad_norm"])
    assert bits(state) == before and not metrics["updated"] and not metrics["finite"]


def gradients(trainer, params, given):
    """Compiled in less time."""
    options = {"xla_backend_optimization_level": 0}
    compute = functools.partial(trainer.gradients, key=jax.random.key(0))
    return jax.jit(compute, compiler_options=options)(params, {}, given)


@pytest.mark.covers("D4")
def test_without_weights_gradients_are_zero():
    trainer = toy()
    params = start(trainer).params
    for size in (8, 3):
        trainer = toy(micro_batch_size=size)
        grads, loss = gradients(trainer, params, batch(weight=np.zeros(8)))
        assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))
        assert float(loss.total) == float(loss.weight) == 0
        assert float(loss.means()["loss"]) == float(loss.means()["error"]) == 0


@pytest.mark.covers("D4", "D9")
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
def test_micro_batches_share_one_denominator(size):
    given = batch(weight=[3, 0, 1, 0, 0, 0, 2, 5])  # with rows and whole micro-batches of 0
    params = jax.tree.map(np.float64, start(toy()).params)
    error = given["x"] @ params["embed"] + params["norm"] - given["y"]
    total = given["weight"].sum()
    wanted = 2 * (given["x"] * (error * given["weight"])[:, None]).sum(0) / total
    grads, loss = gradients(toy(micro_batch_size=size), start(toy()).params, given)
    np.testing.assert_allclose(grads["embed"], wanted, rtol=1e-5, atol=1e-6)
    means = loss.means()
    np.testing.assert_allclose(means["loss"], (error**2 * given["weight"]).sum() / total, rtol=1e-5)
    np.testing.assert_allclose(means["error"], (error * given["weight"]).sum() / total, rtol=1e-5)
    np.testing.assert_allclose(means["largest"], error[given["weight"] > 0].max(), rtol=1e-5)
    assert float(loss.weight) == total


def test_a_loop_of_ones_own_is_train_step():
    """`gradients` and `apply` in two calls; a batch of nothing changes nothing."""
    of = toy(clip_norm=0.1)
    state, frozen = start(of), {}
    key = jax.random.split(state.key)[1]
    grads, loss = of.gradients(state.params, frozen, batch(), key)
    own, metrics = of.apply(start(of), grads, loss)
    stepped, wanted = of.train_step(state, frozen, batch())
    assert int(own.step) == 1 and bool(metrics["updated"])
    for name in wanted:
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-6, err_msg=name)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(same, own.params, stepped.params)
    before = bits(own.params)
    own, metrics = of.apply(own, grads, loss.replace(weight=jnp.zeros(())))
    assert not metrics["updated"] and bits(own.params) == before


@pytest.mark.covers("D9")
def test_a_trajectory_does_not_depend_on_the_micro_batches():
    runs = []
    for size in (None, 1, 3):
        trainer = toy(micro_batch_size=size)
        state, losses = start(trainer), []
        for i in range(6):
            state, metrics = trainer.train_step(state, {}, batch(i))
            losses.append(float(metrics["loss"]))
        runs.append((losses, state.params["embed"]))
    for losses, w in runs[1:]:
        np.testing.assert_allclose(losses, runs[0][0], rtol=1e-4)
        np.testing.assert_allclose(w, runs[0][1], rtol=1e-4)


def test_randomness_is_new_each_step_and_in_each_micro_batch_and_repeats_with_the_seed():
    given = batch(x=np.zeros((8, 4)), y=np.zeros(8), noise=np.ones(8), weight=np.ones(8))
    trainer = toy(learning_rate=1e-30, micro_batch_size=4)
    runs = []
    for _ in range(2):
        state, losses = start(trainer), []
        for _ in range(3):
            state, metrics = trainer.train_step(state, {}, given)
            losses.append(float(metrics["loss"]))
        runs.append(losses)
    assert runs[0] == runs[1] and len(set(runs[0])) == 3
    _, loss = gradients(trainer, start(trainer).params, given)
    # Two micro-batches, two values: the mean of the squares is not the square of the mean.
    means = loss.means()
    assert abs(means["loss"] - means["error"] ** 2) > 1e-3


def test_metrics_say_what_was_done():
    trainer = toy(clip_norm=0.01, schedule="linear", warmup_steps=2)
    state = start(trainer)
    grads, _ = gradients(trainer, state.params, batch())
    squares = [np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)]
    state, first = trainer.train_step(state, {}, batch())
    state, second = trainer.train_step(state, {}, batch())
    np.testing.assert_allclose(first["grad_norm"], math.sqrt(sum(squares)), rtol=1e-5)
    np.testing.assert_allclose([first["lr"], second["lr"]], [0.05, 0.1], rtol=1e-6)
    assert set(first) == {
        *("loss", "error", "largest", "weight", "grad_norm", "lr", "updated", "finite")
    }
    assert all(np.shape(value) == () for value in first.values())


@pytest.mark.parametrize("ratio, factor", [(2, 1), (1.01, 1), (0.5, 0.5), (None, 1)])
def test_gradients_are_scaled_down_to_the_clip_norm_and_never_up(ratio, factor):
    grads, _ = gradients(toy(), start(toy()).params, batch())
    norm = math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
    trainer = toy(clip_norm=None if ratio is None else ratio * norm, optimizer="adamw")
    state, metrics = trainer.train_step(start(trainer), {}, batch())
    # The first moments after one step are a tenth of the gradients that the optimizer saw.
    (mu,) = [m for path, m in jax.tree_util.tree_leaves_with_path(state.opt_state) if _is_mu(path)]
    np.testing.assert_allclose(mu, 0.1 * factor * grads["embed"], rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def _is_mu(path) -> bool:
    """Whether it is the first moment of `embed`."""
    names = jax.tree_util.keystr(path)
    return ".mu" in names and "embed" in names


@dataclasses.dataclass(frozen=True)
class Counting(Toy):
    """A loss whose gradient is 1 a row."""

    def loss(self, params, batch, key):
        rows = jnp.sum(batch["x"])
        return Loss(total=rows * params["embed"][0].astype(jnp.float32), weight=rows)


@pytest.mark.parametrize("size", [1, 100, None])
def test_gradients_of_bfloat16_parameters_are_added_up_in_float32(size):
    trainer = Counting(None, TrainConfig(**STEPS, micro_batch_size=size, param_dtype="bfloat16"))
    params = {"embed": jnp.ones(1, jnp.bfloat16)}
    # A sum in bfloat16 would stop at 256.
    grads, _ = gradients(trainer, params, {"x": np.ones(300, np.float32)})
    assert grads["embed"].dtype == jnp.float32 and grads["embed"][0] == 1


def test_evaluation_has_one_denominator_and_no_use_for_the_micro_batch():
    batches = [batch(0, rows=8), batch(1, rows=3), batch(2, rows=3, weight=np.zeros(3))]
    params = jax.tree.map(np.float64, start(toy()).params)
    whole = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    error = whole["x"] @ params["embed"] + params["norm"] - whole["y"]
    wanted = (error**2 * whole["weight"]).sum() / whole["weight"].sum()
    for size in (None, 2):
        trainer = toy(micro_batch_size=size)
        found = trainer.evaluate(start(trainer).params, {}, iter(batches))
        np.testing.assert_allclose(found["loss"], wanted, rtol=1e-5)
        np.testing.assert_allclose(found["largest"], error[whole["weight"] > 0].max(), rtol=1e-5)
        assert found["weight"] == whole["weight"].sum()
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        trainer.evaluate(start(trainer).params, {}, [])


def test_the_callers_parameters_outlive_the_run_unless_given_away():
    trainer = toy()
    mine = jax.tree.map(jnp.copy, start(trainer).params)
    before = bits(mine)
    state, _ = trainer.init(mine, jax.random.key(0))
    state, _ = trainer.train_step(state, {}, batch())
    assert bits(mine) == before and bits(state.params) != before
    given, _ = trainer.init(mine, jax.random.key(0), donate=True)
    assert bits(given.params) == before
    assert all(x.is_deleted() for x in jax.tree.leaves(mine))
    stale = given
    given, _ = trainer.train_step(given, {}, batch())
    assert stale.params["embed"].is_deleted(), "the old state is memory for the new one"
    assert bits(given.params) == bits(state.params)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_keeps_every_dtype_and_shape(optimizer):
    """Or the next step would compile again."""
    layers = {"attn": {"wq": jnp.ones((2, 128, 130)), "bq": jnp.ones((2, 6))}}
    layers |= {"mlp": {"w_up_a": jnp.ones((2, 4, 8))}, "attn_norm": jnp.ones((2, 8))}
    params = start(toy()).params | {"layers": layers}
    for param_dtype in ("float32", "bfloat16"):
        for state_dtype in ("float32", "bfloat16"):
            dtypes = dict(param_dtype=param_dtype, state_dtype=state_dtype)
            trainer = toy(optimizer=optimizer, micro_batch_size=2, **dtypes)
            state, frozen = jax.eval_shape(trainer.init, params, jax.random.key(0))
            after, metrics = jax.eval_shape(trainer.train_step, state, frozen, batch())
            assert after == state and metrics["loss"].dtype == jnp.float32
            assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(param_dtype)}
            large = {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim and x.size > 20}
            first = set() if optimizer == "adafactor" else {jnp.dtype(state_dtype)}
            # The toy's layers are all Muon's, which has no second moment.
            second = set() if optimizer in ("lion", "muon") else {jnp.dtype("float32")}
            assert large == first | second


@pytest.mark.parametrize("module", [trainer_module, grpo_trainer])
def test_the_examples_in_docstrings_are_right(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed
