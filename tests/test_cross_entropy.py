"""The chunked cross-entropy against float64 numpy, and what it must never hold or compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils import cross_entropy as module
from utils.cross_entropy import chunk_size, cross_entropy

N, D, V = 75, 16, 50


def reference(x, head, targets, weights):
    """(nll, entropy, correct, d nll / d x, d nll / d head) in float64."""
    x, head, weights = (a.astype(np.float64) for a in (x, head, weights))
    logits = x @ head.T
    shifted = logits - logits.max(1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    probs = np.exp(logprobs)
    rows = np.arange(len(x))
    nll = -(logprobs[rows, targets] * weights).sum()
    entropy = -((probs * logprobs).sum(1) * weights).sum()
    correct = ((logits.argmax(1) == targets) * weights).sum()
    dlogits = probs.copy()
    dlogits[rows, targets] -= 1
    dlogits *= weights[:, None]
    return nll, entropy, correct, dlogits @ head, dlogits.T @ x


def inputs(weights="zero_or_one", n=N, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    x, head = rng.normal(size=(n, D)) * scale, rng.normal(size=(V, D))
    targets = rng.integers(0, V, n)
    targets[::3] = (x @ head.T).argmax(1)[::3]
    given = {
        "ones": np.ones(n),
        "zero_or_one": rng.random(n) < 0.4,
        "any": np.where(rng.random(n) < 0.7, rng.normal(size=n), 0),
        "zeros": np.zeros(n),
    }[weights]
    return (
        x.astype(np.float32),
        head.astype(np.float32),
        targets.astype(np.int32),
        given.astype(np.float32),
    )


# Compiled once for all tests, all of which have chunks of 32 tokens.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def ours(x, head, targets, weights, factor=1.0):
    """(TokenSums, gradients of factor · nll by x and by head)."""

    def scaled(x, head):
        sums = cross_entropy(x, head, targets, weights)
        return factor * sums.nll, sums

    (_, sums), grads = jax.value_and_grad(scaled, (0, 1), has_aux=True)(x, head)
    return sums, grads


def close(found, wanted, tolerance=2e-6):
    wanted = np.asarray(wanted)
    room = tolerance * max(np.abs(wanted).max(), 1e-30)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=room)


@pytest.fixture
def chunks_of_32(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 1)


@pytest.mark.parametrize("weights", ["ones", "zero_or_one", "any"])
@pytest.mark.parametrize("n", [N, 64])
def test_sums_and_gradients_are_those_of_float64(chunks_of_32, weights, n):
    given = inputs(weights, n)
    nll, entropy, correct, dx, dhead = reference(*given)
    sums, grads = ours(*given)
    for found, wanted in ((sums.nll, nll), (sums.entropy, entropy), (sums.correct, correct)):
        assert abs(found - wanted) <= 5e-6 * np.abs(given[3]).sum() * np.log(V)
    close(grads[0], dx)
    close(grads[1], dhead)


def test_a_gradient_is_scaled_by_what_comes_after(chunks_of_32):
    x, head, targets, weights = inputs()
    _, _, _, dx, dhead = reference(x, head, targets, weights)
    sums, grads = ours(x, head, targets, weights, -2.5)
    plain = cross_entropy(*map(jnp.asarray, (x, head, targets, weights)))
    close(plain.nll, sums.nll)  # what is computed without gradients is the same
    close(grads[0], -2.5 * dx)
    close(grads[1], -2.5 * dhead)


@pytest.mark.parametrize("below, correct", [(0, 1), (0.005, 0), (-0.005, 1)])
def test_a_target_is_correct_where_no_logit_is_larger(chunks_of_32, below, correct):
    logits = np.linspace(-1, 2, V, dtype=np.float32)
    logits[7] = 2 - below  # next to id V - 1, which has 2
    x, head = np.ones((1, 1), np.float32), logits[:, None]
    sums = cross_entropy(*map(jnp.asarray, (x, head, np.int32([7]), np.float32([3]))))
    assert sums.correct == 3 * correct


@pytest.mark.covers("D4")
def test_without_a_weight_all_is_zero(chunks_of_32):
    sums, grads = ours(*inputs("zeros"))
    assert [float(x) for x in jax.tree.leaves(sums)] == [0, 0, 0]
    assert not np.asarray(grads[0]).any() and not np.asarray(grads[1]).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_logits_stay_finite_and_right(chunks_of_32, sign):
    x, head, targets, weights = inputs("any", scale=2000.0)
    x *= sign
    assert np.abs(x @ head.T).max() > 1e4
    nll, entropy, _, dx, dhead = reference(x, head, targets, weights)
    sums, grads = ours(x, head, targets, weights)
    assert abs(sums.nll - nll) <= 1e-5 * abs(nll)
    # An entropy is a difference of two logits of 1e4: nats are right to their last float32 bits.
    assert abs(sums.entropy - entropy) <= 1e-6 * np.abs(x @ head.T).max() * np.abs(weights).sum()
    close(grads[0], dx, 1e-3)
    close(grads[1], dhead, 1e-3)


def test_only_chunks_with_a_weight_are_computed(chunks_of_32):
    x, head, targets, _ = inputs()
    weights = np.zeros(N, np.float32)
    weights[np.random.default_rng(1).permutation(N)[:32]] = 1
    nll, _, _, dx, dhead = reference(x, head, targets, weights)
    x[weights == 0] = np.nan
    sums, grads = ours(x, head, targets, weights)
    assert abs(sums.nll - nll) < 1e-4
    close(grads[0], dx)
    close(grads[1], dhead)


def test_bfloat16_products_are_accumulated_in_float32(chunks_of_32):
    x, head, targets, weights = inputs("any")
    x = jnp.asarray(x, jnp.bfloat16)
    rounded = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    nll, _, _, dx, dhead = reference(np.asarray(x, np.float32), rounded, targets, weights)
    sums, grads = ours(x, head, targets, weights)
    assert (grads[0].dtype, grads[1].dtype, sums.nll.dtype) == (jnp.bfloat16, "float32", "float32")
    assert abs(sums.nll - nll) <= 1e-6 * np.abs(weights).sum() * np.log(V)
    close(grads[0], dx, 1e-2)
    close(grads[1], dhead, 1e-2)


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(by, n=1024, vocab=512):
    """The equations of the gradient by some of (x, head)."""
    x, head = jnp.ones((n, D)), jnp.ones((vocab, D))
    targets, weights = jnp.zeros(n, jnp.int32), jnp.ones(n)
    nll = lambda x, head: cross_entropy(x, head, targets, weights).nll
    function = jax.grad(nll, by) if by else nll
    return list(equations(jax.make_jaxpr(function)(x, head).jaxpr))


def test_the_logits_of_all_tokens_never_exist(chunks_of_32):
    n, vocab = 1024, 512
    sizes = [v.aval.size for e in traced((0, 1), n, vocab) for v in (*e.invars, *e.outvars)]
    assert max(sizes) == max(n * D, 32 * vocab) < n * vocab / 16


@pytest.mark.parametrize("by, products", [((), 1), ((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_a_gradient_that_nobody_wants_costs_no_product(by, products):
    found = traced(by)
    assert sum(e.primitive.name == "dot_general" for e in found) == products


def test_chunks_hold_a_bounded_number_of_logits():
    for vocab in (160, 32_000, 128_256, 1 << 20):
        size = chunk_size(1 << 20, vocab)
        assert size * vocab <= max(module._CHUNK_LOGITS, 32 * vocab)
        assert size >= 32 and size & (size - 1) == 0
    assert chunk_size(7, 160) == 7
