"""Ops and attention against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import attention as oracle
from utils import ops
from utils.attention import SMALLEST_BLOCK, attention, heads_first
from models.llama.config import inv_frequencies

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def close(ours, exact, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(ours), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_rms_norm(eps):
    x, weight = normal(3, 7, 64) * 0.05, normal(64)
    close(ops.rms_norm(f32(x), f32(weight), eps), oracle.rms_norm(x, weight, eps))


def test_rms_norm_takes_the_mean_square_in_float32():
    # In bfloat16 the squares of 1 + 2^-7 and their sum lose all of their small part.
    x = jnp.full((4096,), 1 + 2**-7, jnp.bfloat16)
    assert ops.rms_norm(x, jnp.ones(4096, jnp.bfloat16), 1e-6)[0] == 1


def test_rms_norm_casts_before_the_weight():
    # 1 + 2^-9 rounds to 1 in bfloat16 before the product with the weight, as Hugging Face does.
    x = jnp.asarray([1.0 + 2**-7, 1.0], jnp.bfloat16)
    weight = jnp.asarray([1.0078125, 1.0078125], jnp.bfloat16)
    normed = np.asarray(x, np.float64) / np.sqrt(np.mean(np.asarray(x, np.float64) ** 2))
    expected = jnp.asarray(normed, jnp.bfloat16) * weight
    assert ops.rms_norm(x, weight, 0.0).tolist() == expected.tolist()


def test_rope_rotates_half_split_pairs_at_far_positions():
    positions = np.asarray([[0, 1, 64, 8191], [5, 5, 131071, 3]])
    inv_freq = inv_frequencies(32, 500000.0, None)
    x = normal(2, 4, 3, 32)
    turned = ops.apply_rope(f32(x), ops.rope_angles(jnp.asarray(positions), jnp.asarray(inv_freq)))
    # float32 angles of 131071 radians are right to 131071 · 2^-24 = 0.008.
    close(turned[:1], oracle.rope(x, positions, inv_freq)[:1], 2e-3)
    close(turned[1:, :2], oracle.rope(x, positions, inv_freq)[1:, :2])


def test_rope_angles_are_float32_for_bfloat16_inputs():
    positions = jnp.full((1, 1), 1001)
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    turned = ops.apply_rope(x, ops.rope_angles(positions, jnp.ones(1)))
    expected = [np.cos(1001) - np.sin(1001), np.cos(1001) + np.sin(1001)]
    close(turned[0, 0, 0].astype(jnp.float32), expected, 1e-2)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_feed_forward(name):
    torch = pytest.importorskip("torch")
    gate, up = normal(5, 16) * 3, normal(5, 16)
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.nn.functional.relu,
    }
    exact = functions[name](torch.from_numpy(gate)).numpy() * up
    close(ops.feed_forward(f32(gate), f32(gate), f32(up), name), exact)


@pytest.mark.parametrize("rows", [1, 2, 300])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_accumulates_in_float32(rows, dtype):
    x, weight, bias = (jnp.asarray(normal(*s), dtype) for s in ((1, rows, 600), (7, 600), (7,)))
    as64 = lambda a: np.asarray(a, np.float64)
    exact = as64(x) @ as64(weight).T
    close(jax.jit(ops.project)(x, weight), exact, 2e-4)
    close(
        ops.linear(x, weight, bias).astype(jnp.float32),
        exact + as64(bias),
        2e-4 if dtype == jnp.float32 else 1e-1,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embed_and_its_gradient(dtype):
    table, tokens = jnp.asarray(normal(9, 4), dtype), jnp.asarray([[3, 0, 3]])
    rows, pull = jax.vjp(lambda table: ops.embed(table, tokens), table)
    assert rows.dtype == dtype and (rows == table[tokens]).all()
    (gradient,) = pull(jnp.ones_like(rows))
    assert gradient[:, 0].tolist() == [1, 0, 0, 2, 0, 0, 0, 0, 0]


def heads(T, S, K=2, G=3, H=16, B=2):
    return normal(B, T, K * G, H), normal(B, S, K, H), normal(B, S, K, H)


def run(q, k, v, **masks):
    return jax.jit(attention)(f32(q), *heads_first(f32(k), f32(v)), **masks)


@pytest.mark.parametrize("K,G", [(1, 4), (4, 1), (2, 3)])
def test_causal_attention(K, G):
    q, k, v = heads(9, 9, K, G)
    seen = np.broadcast_to(np.tri(9, dtype=bool), (2, 9, 9))
    close(run(q, k, v), oracle.attention(q, k, v, seen))


def test_attention_over_several_query_blocks():
    T = 2 * SMALLEST_BLOCK + 3
    q, k, v = heads(T, T, K=1, G=1, H=4, B=1)
    exact = oracle.attention(q, k, v, np.tri(T, dtype=bool)[None])
    close(run(q, k, v), exact)
    slots = jnp.arange(T)[None]
    close(run(q, k, v, slots_BT=slots), exact)


def test_cached_attention_sees_slots_up_to_its_own():
    q, k, v = heads(3, 20)
    slots = np.asarray([[4, 5, 6], [0, 1, 19]])
    seen = slots[:, :, None] >= np.arange(20)
    close(run(q, k, v, slots_BT=jnp.asarray(slots)), oracle.attention(q, k, v, seen))


def test_masks_of_keys_and_segments():
    q, k, v = heads(8, 8)
    key_mask = np.asarray([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 1]], bool)
    segments = np.asarray([[0, 0, 1, 1, 1, 2, 2, 2], [3] * 8])
    seen = np.tri(8, dtype=bool) & key_mask[:, None]
    seen = seen & (segments[:, :, None] == segments[:, None])
    out = run(q, k, v, key_mask_BS=jnp.asarray(key_mask), segment_ids_BT=jnp.asarray(segments))
    close(out, oracle.attention(q, k, v, seen))
    assert (np.asarray(out)[0, :2] == 0).all()  # these two see no key


def test_a_fully_masked_row_has_zero_output_and_finite_gradients():
    q, k, v = (f32(x) for x in heads(4, 4))
    mask = jnp.zeros((2, 4), bool)

    def loss(q, k, v):
        return jnp.sum(attention(q, *heads_first(k, v), key_mask_BS=mask) ** 2)

    value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
    assert value == 0 and all((g == 0).all() for g in grads)


def test_attention_softmax_is_float32_for_bfloat16():
    # 300 equal keys: a bfloat16 sum of the weights would stop at 256.
    q = jnp.zeros((1, 1, 1, 8), jnp.bfloat16)
    k, v = jnp.zeros((1, 8, 300), jnp.bfloat16), jnp.ones((1, 300, 8), jnp.bfloat16)
    out = attention(q, k, v, slots_BT=jnp.full((1, 1), 299))
    assert (out == 1).all()


@pytest.mark.parametrize("slots", [None, jnp.asarray([[0, 1]])], ids=["uncached", "cached"])
def test_attention_scores_are_float32_for_bfloat16(slots):
    # Scores of 32 and 32 + 1/16, which bfloat16 would round to 32: the weights are 0.484 and 0.516.
    q = jnp.full((1, 2, 1, 16), 4, jnp.bfloat16)
    k = jnp.zeros((1, 16, 2), jnp.bfloat16).at[0, 0].set(32).at[0, 1, 1].set(1 / 16)
    v = jnp.zeros((1, 2, 16), jnp.bfloat16).at[0, 1].set(1)
    out = attention(q, k, v, slots_BT=slots)[0, 1, 0].astype(jnp.float32)
    close(out, 1 / (1 + np.exp(-1 / 16)), 2e-3)


def test_gradients_of_several_products_are_added_up_before_they_are_rounded():
    # 1 + 2^-8 is rounded to 1 in bfloat16, and 1 + 2^-7 is a number of it.
    weights = [jnp.full((1, 1), value, jnp.bfloat16) for value in (1, 2**-8, 2**-8)]
    total = lambda x: sum(jnp.sum(y) for y in ops.linear_all(x, [(w, None, None) for w in weights]))
    dx = jax.grad(total)(jnp.ones((2, 1), jnp.bfloat16))
    assert dx.dtype == jnp.bfloat16 and (dx == 1 + 2**-7).all()
