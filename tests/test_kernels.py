"""The accelerators' kernels, interpreted on the CPU, against attention in plain XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils import kernels
from utils.attention import attention, heads_first


def arrays(T, S, K, G, H=16, B=2, dtype=jnp.float32):
    rng = np.random.default_rng(T + S + G)
    shapes = [(B, T, K * G, H), (B, S, K, H), (B, S, K, H), (B, T, K * G, H)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def segments(B, S, documents=4):
    """Rows of packed documents, of lengths of their own, and padding (-1) on the right."""
    rng = np.random.default_rng(S)
    ids = np.sort(rng.integers(0, documents, (B, S)), axis=1)
    ids[:, S - S // 8 :] = -1
    return jnp.asarray(ids, jnp.int32)


def dense(q, k, v, ids=None):
    """The formula, with all scores at once."""
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    seen = jnp.tri(T, S, S - T, dtype=bool)[None]
    if ids is not None:
        seen = seen & (ids[:, S - T :, None] == ids[:, None, :])
    q, k, v = q.astype(jnp.float32), jnp.repeat(k, G, axis=2), jnp.repeat(v, G, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
    return jnp.einsum("bnts,bsnh->btnh", weights, v).astype(v.dtype)


def with_gradients(function, q, k, v, do, ids):
    out, vjp = jax.vjp(lambda q, k, v: function(q, k, v, ids), q, k, v)
    return out, *vjp(do)


def check(function, arguments, ids=None, tolerance=2e-5, reference=dense):
    ours, exact = (
        jax.jit(with_gradients, static_argnums=0)(f, *arguments, ids) for f in (function, reference)
    )
    for name, a, b in zip(["out", "dq", "dk", "dv"], ours, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = a.astype(np.float32), b.astype(np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)


def flash(q, k, v, ids):
    return kernels.flash_attention(q, k, v, ids, interpret=True)


def cudnn(q, k, v, ids):
    return kernels.cudnn_attention(q, k, v, ids, implementation="xla")


@pytest.mark.parametrize("K, G", [(2, 1), (2, 3)])
def test_flash_attention_of_grouped_heads(K, G):
    # 130 tokens are two registers, with 126 tokens filled in.
    check(flash, arrays(130, 130, K, G), segments(2, 130))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_attention_over_several_blocks(head_dim):
    T = kernels.LARGEST_BLOCK + 100
    check(flash, arrays(T, T, 1, 2, head_dim, B=1))


def test_flash_attention_of_the_last_tokens():
    check(flash, arrays(70, 600, 1, 2, B=1), segments(1, 600, 2))


def test_flash_attention_multiplies_float32_as_float32_in_both_passes():
    q, k, v, do = arrays(128, 128, 1, 1, B=1)
    text = str(jax.make_jaxpr(lambda *x: with_gradients(flash, *x, None))(q, k, v, do))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST") > 0


def test_flash_attention_in_bfloat16():
    arguments = arrays(140, 140, 1, 2, dtype=jnp.bfloat16)
    # Queries are rounded once more when they are scaled, and gradients of 8 have steps of 1/16.
    check(flash, arguments, segments(2, 140), tolerance=6e-2)


def test_flash_attention_of_float32_queries_on_a_bfloat16_cache():
    q, k, v, do = arrays(128, 128, 1, 1, B=1)
    k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    out, exact = flash(q, k, v, None), dense(q, k, v)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact.astype(np.float32), rtol=0, atol=2e-2)


def test_flash_attention_takes_its_softmax_in_float32():
    # 300 equal keys: bfloat16 sums would stop at 256.
    q, k = jnp.zeros((1, 300, 1, 16), jnp.bfloat16), jnp.zeros((1, 300, 1, 16), jnp.bfloat16)
    v = jnp.ones_like(k)
    assert jnp.all(flash(q, k, v, None) == 1)


@pytest.mark.parametrize("T", [1, 127, 128, 129, 512, 513, 700, 1536, 2100, 65536])
def test_blocks_are_whole_registers_and_few(T):
    block = kernels._block(T)
    assert block % kernels.LANES == 0 and block <= kernels.LARGEST_BLOCK
    count = -(-T // block)
    assert count == -(-T // kernels.LARGEST_BLOCK)
    assert count * block - T < count * kernels.LANES


@pytest.mark.parametrize("bq, bkv", [(128, 128), (128, 256)])
@pytest.mark.parametrize("offset", [0, 1, 126, 127, 300])
def test_the_mask_tells_what_a_block_holds(offset, bq, bkv):
    T, S = 256, 768
    ours = kernels._CausalMask((T, S), offset=offset)
    full = np.tri(T, S, offset, dtype=bool)
    for i in range(0, T, bq):
        for j in range(0, S, bkv):
            block = (slice(i, i + bq), slice(j, j + bkv))
            assert ours[block].any() == full[block].any()
            assert ours[block].all() == full[block].all()


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
@pytest.mark.parametrize("T, S", [(40, 40), (30, 50)])
def test_the_arguments_for_cudnn(T, S, packed):
    check(cudnn, arrays(T, S, 2, 3), segments(2, S, 2) if packed else None)


def test_what_cudnn_takes():
    def takes(T=4, S=4, H=64, dtype=jnp.bfloat16):
        q, k, *_ = arrays(T, S, 1, 1, H, dtype=dtype)
        return kernels._cudnn_takes(q, k)

    assert takes() and takes(H=128) and takes(T=3, S=3) and takes(T=3, S=4)
    assert not takes(dtype=jnp.float32) and not takes(H=60) and not takes(H=256)


def as_on_tpu(plain, q, k, v, ids):
    return flash(q, k, v, ids)


def check_on_tpu(monkeypatch, function, *arrays):
    """The same values and gradients with the TPU's kernel as in plain XLA."""
    exact = jax.jit(with_gradients, static_argnums=0)(function, *arrays, None)
    monkeypatch.setattr(kernels, "causal_attention", as_on_tpu)
    again = lambda *args: function(*args)  # another one, or jit would not look again
    ours = jax.jit(with_gradients, static_argnums=0)(again, *arrays, None)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_attention_hands_its_masks_to_the_kernel(monkeypatch):
    q, k, v, do = arrays(130, 130, 1, 2)
    ids, hidden = segments(2, 130), jnp.arange(130) < 9
    run = lambda q, k, v, _: attention(
        q, *heads_first(k, v), segment_ids_BT=ids, key_mask_BS=jnp.stack([hidden, ~hidden])
    )
    # What a hidden token's own query gives is nobody's, so nothing flows back from there.
    shown = jnp.stack([hidden, ~hidden])[..., None, None]
    masked = lambda *args: jnp.where(shown, run(*args), 0)
    check_on_tpu(monkeypatch, masked, q, k, v, do)


def test_branches_take_the_kernel(monkeypatch):
    P, G, C = 140, 2, 128
    q, k, v, do = arrays(P + G * C, P + G * C, 1, 2, B=1)
    prefix, branches = jnp.arange(P)[None] < 99, jnp.arange(C) < jnp.asarray([[[128], [50]]])
    shown = jnp.concatenate([prefix, branches.reshape(1, -1)], axis=1)[..., None, None]
    run = lambda q, k, v, _: jnp.where(
        shown, attention(q, *heads_first(k, v), branches=(prefix, branches)), 0
    )
    check_on_tpu(monkeypatch, run, q, k, v, do)


def lowered(function, *args, platform):
    """The StableHLO of a function and its gradient, lowered for a platform that is not here."""
    loss = lambda *args: jnp.sum(function(*args).astype(jnp.float32) ** 2)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_is_chosen_when_the_program_is_lowered(monkeypatch):
    q, k, v, _ = arrays(128, 128, 1, 2, 64, B=1, dtype=jnp.bfloat16)
    run = lambda q, k, v: attention(q, *heads_first(k, v))
    tpu, cuda, cpu = (lowered(run, q, k, v, platform=p) for p in ("tpu", "cuda", "cpu"))
    assert tpu.count("tpu_custom_call") == 3 and "stablehlo.exponential" not in tpu
    assert "custom_call" not in cpu and cpu.count("stablehlo.exponential") == 1
    # Without a GPU in this process there is no cuDNN to ask; with one it is used.
    assert "custom_call" not in cuda
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_compute_capability", lambda _: False
    )
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.is_cuda_compute_capability_equal", lambda _: False
    )
    cuda = lowered(run, q, k, v, platform="cuda")
    assert "__cudnn$fmhaSoftmax" in cuda and "__cudnn$fmhaSoftmaxBackward" in cuda
    assert "stablehlo.exponential" not in cuda
    assert "cudnn" not in lowered(run, q.astype(jnp.float32), k, v, platform="cuda")
    # Without a mask there is no bias; with one, tiles of keys are whole.
    q, k, v, _ = arrays(192, 192, 1, 2, 64, B=1, dtype=jnp.bfloat16)
    packed = lambda q, k, v: attention(q, *heads_first(k, v), segment_ids_BT=segments(1, 192))
    plain, masked = (lowered(f, q, k, v, platform="cuda") for f in (run, packed))
    calls = lambda text: [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    assert len(calls(plain)) == 2 and not any("Bias" in line for line in calls(plain))
    assert len(calls(masked)) == 2
    assert all("fmhaScaleBias" in x and "x256x256xbf16" in x for x in calls(masked))


def test_short_rows_stay_in_plain_xla():
    q, k, v, _ = arrays(100, 100, 1, 2, 64, B=1)
    run = lambda q, k, v: attention(q, *heads_first(k, v))
    assert "custom_call" not in lowered(run, q, k, v, platform="tpu")


@pytest.mark.parametrize(
    "axis, H, dtype",
    [(1, 128, jnp.bfloat16), (1, 128, jnp.float32), (2, 128, jnp.bfloat16), (2, 64, jnp.float32)],
)
def test_a_token_is_written_into_each_rows_slot(axis, H, dtype):
    X, S = 6, 384
    rng = np.random.default_rng(axis)
    array = lambda slots: jnp.asarray(
        rng.standard_normal((X, slots, H) if axis == 1 else (X, H, slots)), dtype
    )
    buffer, new = array(S), array(1)
    slots = np.asarray([0, 127, 128, 255, 300, 383], np.int32)  # both ends of tiles, and inside one
    expected = np.asarray(buffer).copy()
    for row, slot in enumerate(slots):
        np.moveaxis(expected[row], axis - 1, 0)[slot] = np.asarray(new[row]).reshape(H)
    assert kernels.writes_tokens(buffer, axis)
    write = jax.jit(functools.partial(kernels.write_token, axis=axis, interpret=True))
    out = write(buffer, new, slots)
    np.testing.assert_array_equal(np.asarray(out), expected)
    assert not kernels.writes_tokens(buffer[:, : 8 if dtype == jnp.bfloat16 else 4], axis)
    assert not kernels.writes_tokens(buffer[..., :64], axis)
    past = write(buffer, new, slots + (slots == S - 1))
    np.testing.assert_array_equal(np.asarray(past), expected)
