"""Cross-entropy of an output head without the logits of all tokens at once.

Dimension key: N tokens, C tokens of a chunk, D model dim, V vocab.
"""

import flax.struct
import jax
import jax.numpy as jnp

from utils.ops import matmul

Array = jax.Array

# Logits held at once: 128 MiB in float32, whatever the vocabulary.
_CHUNK_LOGITS = 1 << 25


@flax.struct.dataclass
class TokenSums:
    """Sums over tokens, each times its weight; float32 scalars.

    Attributes:
        nll: negative log-likelihood of the targets, nats. The only one with a gradient.
        entropy: of the predicted distributions, nats.
        correct: how many targets are the most probable token.
    """

    nll: Array
    entropy: Array
    correct: Array


def cross_entropy(x_ND: Array, head_VD: Array, targets_N: Array, weights_N: Array) -> TokenSums:
    """Sums of the tokens' losses, computed a chunk of tokens at a time.

    A chunk's logits give its gradients too while they are there: they are neither kept nor computed
    twice, as weights are known before the backward pass. Tokens of weight 0 cost nothing.

    Args:
        x_ND: [N, D] what the head multiplies.
        head_VD: [V, D], cast to x's dtype.
        targets_N: [N] int32.
        weights_N: [N] float32.
    """
    return _cross_entropy(x_ND, head_VD, targets_N, weights_N)


def chunk_size(n_tokens: int, vocab_size: int) -> int:
    """Tokens of a chunk."""
    fit = max(_CHUNK_LOGITS // vocab_size, 32)
    return min(1 << (fit.bit_length() - 1), n_tokens)


@jax.custom_vjp
def _cross_entropy(x_ND, head_VD, targets_N, weights_N):
    return _chunks(x_ND, head_VD, targets_N, weights_N, False, False)[0]


def _forward(x_ND, head_VD, targets_N, weights_N):
    wanted = x_ND.perturbed, head_VD.perturbed  # a frozen head needs no gradient
    values = (x.value for x in (x_ND, head_VD, targets_N, weights_N))
    return _chunks(*values, *wanted)


def _backward(gradients, cotangents):
    nll = cotangents.nll
    scale = lambda g: None if g is None else (g * nll.astype(g.dtype))
    return (*map(scale, gradients), None, None)


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunks(x_ND, head_VD, targets_N, weights_N, want_dx: bool, want_dhead: bool):
    """(TokenSums, (gradient by x, gradient by head)); a gradient is None where it is not wanted."""
    n_tokens = x_ND.shape[0]
    size = chunk_size(n_tokens, head_VD.shape[0])
    head = head_VD.astype(x_ND.dtype)
    # Tokens that count come first, so that the loop can end with the last of them.
    order_N = jnp.argsort(weights_N == 0, stable=True)
    order_N = jnp.pad(order_N, (0, -n_tokens % size), constant_values=n_tokens)
    count = jnp.sum(weights_N != 0)

    def chunk(i, carry):
        sums, dx_ND, dhead_VD = carry
        at_C = jax.lax.dynamic_slice(order_N, (i * size,), (size,))
        take = lambda array: array.at[at_C].get(mode="fill", fill_value=0)
        x_CD, targets_C, weights_C = take(x_ND), take(targets_N), take(weights_N)
        logits_CV = matmul(x_CD, head, 1, 1)
        top_C = jnp.max(logits_CV, axis=-1)
        exp_CV = jnp.exp(logits_CV - top_C[:, None])
        total_C = jnp.sum(exp_CV, axis=-1)
        mean_logit_C = jnp.sum(exp_CV * logits_CV, axis=-1) / total_C
        lse_C = top_C + jnp.log(total_C)
        target_logit_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1)[:, 0]
        values = TokenSums(
            nll=lse_C - target_logit_C,
            entropy=lse_C - mean_logit_C,
            correct=target_logit_C >= top_C,
        )
        sums = jax.tree.map(lambda total, x: total + jnp.sum(x * weights_C), sums, values)
        if dx_ND is not None or dhead_VD is not None:
            hit_CV = targets_C[:, None] == jnp.arange(head.shape[0])
            dlogits_CV = (exp_CV / total_C[:, None] - hit_CV) * weights_C[:, None]
            dlogits_CV = dlogits_CV.astype(x_ND.dtype)
        if dx_ND is not None:
            dx_CD = matmul(dlogits_CV, head, 1, 0).astype(dx_ND.dtype)
            dx_ND = dx_ND.at[at_C].set(dx_CD, mode="drop", unique_indices=True)
        if dhead_VD is not None:
            dhead_VD = dhead_VD + matmul(dlogits_CV, x_CD, 0, 0)
        return sums, dx_ND, dhead_VD

    zero = jnp.zeros((), jnp.float32)
    start = (
        TokenSums(zero, zero, zero),
        jnp.zeros_like(x_ND) if want_dx else None,
        jnp.zeros(head_VD.shape, jnp.float32) if want_dhead else None,
    )
    sums, dx_ND, dhead_VD = jax.lax.fori_loop(0, -(-count // size), chunk, start)
    if dhead_VD is not None:
        dhead_VD = dhead_VD.astype(head_VD.dtype)
    return sums, (dx_ND, dhead_VD)
