"""Optimizers and schedules against formulas written out in float64, and what a config refuses."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.llama.lora import LoRAConfig
from trainers.optimizer import OPTIMIZERS, OptimizerConfig, learning_rate, make_optimizer
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils.errors import ConfigError

PLAIN = dict(schedule="constant", clip_norm=None, learning_rate=0.01)


def tree(seed, scale=1.0):
    """Of every kind of parameter, with matrices large enough for Adafactor to factor one."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: (rng.normal(size=shape) * scale).astype(np.float32)
    attn = {"wq": normal(2, 6, 8), "bq": normal(2, 6)}
    layers = {"attn": attn, "mlp": {"w_up": normal(2, 130, 128)}, "attn_norm": normal(2, 8)}
    return {
        "embed": normal(9, 8),
        "lm_head": normal(9, 8),
        "layers": layers,
        "final_norm": normal(8),
    }


def is_matrix(path):
    return path[-1].key in ("embed", "lm_head", "wq", "w_up")


def updates_of(config, params, grads):
    """The updates of some steps, from fixed parameters."""
    optimizer = make_optimizer(config)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def update(grads, params):
        state, out = optimizer.init(params), []
        for g in grads:
            update, state = optimizer.update(g, state, params)
            out.append(update)
        return out

    return update(grads, params)


def compare(found, wanted, tolerance=1e-5):
    def leaf(path, a, b):
        assert a.dtype == np.float32
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=str(path)
        )

    jax.tree.map_with_path(leaf, found, wanted)


def test_adamw_is_its_formula_with_warm_up_and_decay():
    settings = dict(learning_rate=0.02, warmup_steps=4, weight_decay=0.3)
    config = OptimizerConfig(beta1=0.8, beta2=0.9, eps=1e-4, schedule="constant", **settings)
    params, grads = tree(0), [tree(1), tree(2, 1e-5), tree(3)]
    m = v = jax.tree.map(lambda x: np.zeros_like(x, np.float64), params)
    wanted = []
    for t, g in enumerate(grads, start=1):
        g = jax.tree.map(np.float64, g)
        m = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, v, g)

        def update(path, p, m, v):
            step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-4)
            return -0.02 * t / 4 * (step + 0.3 * p * is_matrix(path))

        wanted.append(jax.tree.map_with_path(update, params, m, v))
    for found, right in zip(updates_of(config, params, grads), wanted, strict=True):
        compare(found, right)


def test_lion_is_its_formula():
    config = OptimizerConfig(optimizer="lion", beta1=0.8, beta2=0.95, weight_decay=0.3, **PLAIN)
    params, grads = tree(0), [tree(1), tree(2)]
    m = jax.tree.map(lambda x: np.zeros_like(x, np.float64), params)
    for found, g in zip(updates_of(config, params, grads), grads, strict=True):

        def update(path, p, m, g):
            return -0.01 * (np.sign(0.8 * m + 0.2 * g) + 0.3 * p * is_matrix(path))

        compare(found, jax.tree.map_with_path(update, params, m, g))
        m = jax.tree.map(lambda m, g: 0.95 * m + 0.05 * g, m, g)


def test_adafactor_is_its_formula():
    config = OptimizerConfig(optimizer="adafactor", weight_decay=0.3, **PLAIN)
    params, grads = tree(0), [tree(1), tree(2, 3.0)]
    rows = columns = v = 0.0
    for t, (found, g) in enumerate(
        zip(updates_of(config, params, grads), grads, strict=True), start=1
    ):
        beta = 1 - t**-0.8
        mix = lambda old, new: beta * old + (1 - beta) * new
        square = jax.tree.map(lambda x: np.float64(x) ** 2, g)
        v = jax.tree.map(lambda s: mix(0, s), square) if t == 1 else jax.tree.map(mix, v, square)
        factored = square["layers"]["mlp"]["w_up"]  # [2, 130, 128]
        rows, columns = mix(rows, factored.mean(2)), mix(columns, factored.mean(1))
        scale = rows[:, :, None] * columns[:, None] / rows.mean(1)[:, None, None]

        def update(path, p, g, v):
            step = g / np.sqrt(scale if path[-1].key == "w_up" else v)
            step /= max(1, np.sqrt((step**2).mean()))
            return -0.01 * (step + 0.3 * p * is_matrix(path))

        compare(found, jax.tree.map_with_path(update, params, g, v), 2e-5)


def test_muon_orthogonalises_matrices_of_layers_and_is_adamw_elsewhere():
    settings = dict(weight_decay=0.3, beta1=0.8, beta2=0.9) | PLAIN
    params, grads = tree(0), [tree(1)]
    (found,) = updates_of(OptimizerConfig(optimizer="muon", **settings), params, grads)
    (adamw,) = updates_of(OptimizerConfig(**settings), params, grads)
    for part, name in (("attn", "wq"), ("mlp", "w_up")):
        w, g = params["layers"][part][name], grads[0]["layers"][part][name]
        update = np.asarray(found["layers"][part].pop(name), np.float64)
        adamw["layers"][part].pop(name)
        step = update / -0.01 - 0.3 * w
        step /= 0.2 * math.sqrt(max(w.shape[1:]))  # AdamW's root mean square
        for layer in range(2):
            u, singular, vt = np.linalg.svd(g[layer], full_matrices=False)
            rotated = u.T @ step[layer] @ vt.T
            # Newton and Schulz's five steps bring singular values near 1, and keep the vectors.
            large = singular > 0.1 * singular.max()
            assert np.all(np.abs(np.diag(rotated)[large] - 1) < 0.35)
            assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 0.02
    compare(found, adamw)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_the_learning_rate_times_the_matrices_and_nothing_else(name):
    config = OptimizerConfig(optimizer=name, weight_decay=0.3, **PLAIN)
    params = tree(0)
    nothing = jax.tree.map(np.zeros_like, params)
    (found,) = updates_of(config, params, [nothing])
    decay = lambda path, p: -0.01 * 0.3 * p * is_matrix(path)
    compare(found, jax.tree.map_with_path(decay, params))


def closed_form(config, i):
    """The rate of step i, in plain arithmetic."""
    peak, warmup, total = config.learning_rate, config.warmup_steps, config.max_steps
    if i < warmup:
        return peak * (i + 1) / warmup
    rest, i = max(total - warmup, 1), i - warmup
    decay = max(int(rest / 5), 1)
    return (
        peak
        * {
            "constant": 1,
            "linear": 1 - i / rest,
            "cosine": (1 + math.cos(math.pi * i / rest)) / 2,
            "wsd": min(1, (rest - i) / decay),
        }[config.schedule]
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_schedules_at_every_step(schedule):
    for warmup, total in ((0, 1), (0, 10), (1, 10), (3, 23), (22, 23), (23, 23)):
        settings = dict(schedule=schedule, warmup_steps=warmup, max_steps=total)
        config = OptimizerConfig(learning_rate=0.3, **settings)
        found = jax.vmap(learning_rate(config))(jnp.arange(total))
        wanted = [closed_form(config, i) for i in range(total)]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert np.all(np.asarray(found) > 0), "a step that changes nothing"


WRONG = dict(
    optimizer=["sgd", "", None],
    learning_rate=[0, 0.0, -1e-3, math.nan, math.inf, 11, "1e-4", True],
    schedule=["step", None],
    warmup_steps=[-1, 101, 1.5, True],
    max_steps=[0, -1, 2.0, None, "9"],
    weight_decay=[-0.1, math.nan, math.inf, "0"],
    beta1=[1, 1.0, -0.1, math.nan, None],
    beta2=[1.0, 2, math.nan, "0.9"],
    eps=[0, -1e-8, math.nan, math.inf],
    clip_norm=[-1, math.nan, math.inf, "1"],
    state_dtype=["float16", None],
    micro_batch_size=[0, -1, 1.0, True],
    param_dtype=["float8", None],
    max_skipped=[-1, 1.5, None],
    save_every=[-1, None],
    eval_every=[-1, "2"],
)


@pytest.mark.covers("D10")
@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_value_is_named(name):
    for value in WRONG[name]:
        with pytest.raises(ConfigError) as error:
            SFTConfig(**{name: value})
        message = str(error.value)
        assert message.startswith("SFTConfig: ") and f"{name}={value!r}, expected" in message


@pytest.mark.covers("D10")
def test_all_problems_are_in_one_error():
    assert WRONG.keys() == {field.name for field in dataclasses.fields(SFTConfig)}
    with pytest.raises(ConfigError) as error:
        SFTConfig(**{name: values[0] for name, values in WRONG.items()})
    assert all(f"{name}=" in str(error.value) for name in WRONG)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


@pytest.mark.covers("D10")
def test_a_lora_config_names_all_that_is_wrong():
    wrong = dict(
        rank=[0, -1, 2.0, None, True],
        alpha=[0, -1, math.nan, math.inf, "16", True],
        targets=[(), ("wx",), ("wq", "embed"), "wq", None, 3, ("wq", 1)],
    )
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ConfigError, match=f"{name}="):
                LoRAConfig(**{name: value})
    with pytest.raises(ConfigError) as error:
        LoRAConfig(**{name: values[0] for name, values in wrong.items()})
    assert all(f"{name}=" in str(error.value) for name in wrong)
    assert hash(LoRAConfig(targets=["wq", "wv"])) == hash(LoRAConfig(targets=("wq", "wv")))


def test_a_config_that_is_right_is_hashable_and_takes_integers():
    config = SFTConfig(learning_rate=1, clip_norm=None, warmup_steps=100, weight_decay=0, beta1=0)
    assert hash(config) == hash(dataclasses.replace(config))


def test_defaults_that_depend_on_other_settings():
    for max_steps, warmup in ((200, 6), (9, 0)):
        config = SFTTrainer(None, SFTConfig(max_steps=max_steps)).config
        assert config.warmup_steps == warmup
    assert SFTConfig(clip_norm=0) == SFTConfig(clip_norm=None) != SFTConfig()
    for lora, rate in ((None, 2e-5), (LoRAConfig(), 2e-4)):
        assert SFTTrainer(None, SFTConfig(), lora).config.learning_rate == rate
        assert SFTTrainer(None, SFTConfig(learning_rate=0.1), lora).config.learning_rate == 0.1
    with pytest.raises(ConfigError, match="learning_rate=None"):
        OptimizerConfig(learning_rate=None)


def test_a_second_moment_falls_again():
    """In bfloat16 it would stay: at beta2 = 0.999 a step takes off less than half its last bit."""
    tx = make_optimizer(OptimizerConfig(state_dtype="bfloat16"))
    params = {"w": jnp.ones(4)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for grad in [1.0] + [0.0] * 700:
        _, state = update({"w": jnp.full(4, grad)}, state, params)
    second = optax.tree.get(state, "nu")["w"]
    np.testing.assert_allclose(second, 0.001 * 0.999**700, rtol=1e-3)
