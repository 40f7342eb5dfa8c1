"""What must not change a step: how rows are cut, padded, packed, ordered, recomputed or laid out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama.lora import LoRAConfig
from models.llama.model import LLaMa
from tests.test_lora import adapters
from tests.test_sft_trainer import LENGTHS, compare, dataset, fast, gradients, variant
from trainers.sft_trainer import SFTConfig, SFTTrainer
from utils import cross_entropy

RTOL = 2e-5
STEP = dict(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5, schedule="constant")


WHOLE = dict(micro_batch_size=None)


def padded():
    return dataset(LENGTHS, 48, packing=False)


def packed():
    return dataset(LENGTHS, 48, packing=True)


def trainer(remat="none", **config):
    return SFTTrainer(LLaMa(variant("biases")[1], remat=remat), SFTConfig(**WHOLE | config))


@functools.cache
def reference():
    """Gradients and sums of the whole padded batch at once."""
    return gradients(trainer(), variant("biases")[2], padded())


def same(found):
    """Loss, weight, further sums and every gradient."""
    (grads, loss), (wanted_grads, wanted) = found, reference()
    for name, value in wanted.means().items():
        np.testing.assert_allclose(loss.means()[name], value, rtol=RTOL, err_msg=name)
    assert float(loss.weight) == float(wanted.weight) == padded()["target_mask"].sum()
    compare(grads, wanted_grads, RTOL)


@pytest.mark.covers("D9")
@pytest.mark.parametrize("size, remat", [(1, "none"), (2, "dots"), (3, "block")])
def test_micro_batches_and_recomputation(size, remat):
    """8 × 1, 4 × 2, and 3 × 3 with a row of nothing; the reference is 1 × 8."""
    same(gradients(trainer(remat, micro_batch_size=size), variant("biases")[2], padded()))


@pytest.mark.covers("D8")
def test_packing():
    assert packed()["segment_ids"].max() > 1 and not packed()["segment_ids"][-1].any()
    same(gradients(trainer(), variant("biases")[2], packed()))


def test_padding_on_the_left_in_any_order():
    right = padded()
    left = {key: np.zeros((8, 48), value.dtype) for key, value in right.items()}
    left |= {"segment_ids": np.zeros((8, 48), np.int32), "positions": np.zeros((8, 48), np.int32)}
    for row, source in enumerate(np.random.default_rng(0).permutation(8)):
        at = row, slice(48 - LENGTHS[source], 48)
        for key, value in right.items():
            left[key][at] = value[source, : LENGTHS[source]]
        left["segment_ids"][at] = 1
        left["positions"][at] = np.arange(LENGTHS[source])
    left["tokens"][left["segment_ids"] == 0] = 7  # padding is not told by its value
    same(gradients(trainer(), variant("biases")[2], left))


def test_chunks_of_the_cross_entropy(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", 1)
    assert cross_entropy.chunk_size(8 * 48, 160) == 32 and padded()["target_mask"].sum() > 64
    compute = lambda params: trainer().gradients(params, {}, padded(), jax.random.key(0))
    same(fast(compute)(variant("biases")[2]))


def test_one_dict_a_layer_instead_of_a_stack():
    _, config, params = variant("biases")
    take = lambda i: jax.tree.map(lambda x: x[i], params["layers"])
    layers = tuple(take(i) for i in range(config.n_layers))
    grads, loss = gradients(trainer(), params | {"layers": layers}, padded())
    stack = jax.tree.map(lambda *x: jnp.stack(x), *grads["layers"])
    same((grads | {"layers": stack}, loss))


@pytest.mark.slow
@pytest.mark.covers("D8", "D9")
def test_an_update_of_adapters():
    """Steps, not gradients alone: unpacked in one piece, and packed in micro-batches."""
    _, config, params = variant("biases")
    lora = LoRAConfig(rank=3, alpha=4.5)
    states = []
    for batch, size in ((padded(), None), (packed(), 2)):
        model = LLaMa(config, remat="none" if size is None else "block")
        run = SFTTrainer(model, SFTConfig(micro_batch_size=size, **STEP), lora)
        state, frozen = run.init(params, jax.random.key(0))
        state = state.replace(params=adapters(lora))
        step = fast(lambda s, f, b: run.train_step(s, f, b))
        state, metrics = step(state, frozen, batch)
        states.append((state, metrics))
    (one, first), (other, second) = states
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=RTOL, err_msg=name)
    compare(other.params, one.params, RTOL)
    # Adam's first step is ±lr wherever a gradient is not 0 to rounding: moments tell more.
    moments = lambda state: state.opt_state[0]
    compare(moments(other).mu, moments(one).mu, RTOL)
    compare(moments(other).nu, moments(one).nu, RTOL)
