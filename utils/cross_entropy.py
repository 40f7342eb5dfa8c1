"""Cross-entropy and log-probs of an output head without the logits of all tokens at once.

On a mesh each device holds a part of the vocabulary and of the tokens. A chunk's tokens are gathered
from those that share a model, multiplied with each part of the head where it lies, and only sums over
the vocabulary travel: no device needs the whole head, nor its gradient (Megatron-LM, 1909.08053).
Dimension key: N tokens (of one axis, or of rows and their tokens: [B, T]), C tokens of a chunk, D model
dim, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from utils import detours, sharding
from utils.ops import matmul

Array = jax.Array

# Logits held at once: 128 MiB in float32, whatever the vocabulary.
_CHUNK_LOGITS = 1 << 25
_LARGEST_CHUNK = 1 << 13  # where many devices share the vocabulary, the chunk's tokens take more


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


def token_logprobs(
    x_ND: Array, head_VD: Array, targets_N: Array, wanted_N: Array, temperature: float
) -> tuple[Array, Array]:
    """log softmax(logits / temperature) at each token's target, computed a chunk of tokens at a time.

    What each log-prob's gradient is worth is known only in the backward pass, which computes a
    chunk's logits again. Tokens that are not wanted cost nothing.

    Args:
        x_ND: [N, D] what the head multiplies.
        head_VD: [V, D], cast to x's dtype.
        targets_N: [N] int32.
        wanted_N: [N] bool.
        temperature: divides the logits, as it did in sampling.

    Returns:
        (log-probs [N] float32, the predicted distributions' entropies [N] float32 in nats), 0 where
        not wanted. Only log-probs have a gradient.
    """
    return _token_logprobs(float(temperature), x_ND, head_VD, targets_N, wanted_N)


def chunk_size(n_tokens: int, vocab_size: int) -> int:
    """Tokens of a chunk."""
    fit = max(_CHUNK_LOGITS // vocab_size, 32)
    return min(1 << (fit.bit_length() - 1), _LARGEST_CHUNK, n_tokens)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """How tokens and vocabulary lie on the mesh; all empty without one.

    Attributes:
        lead: mesh axes that share each of the tokens' axes.
        vocab: mesh axes that share the vocabulary.
    """

    lead: tuple[tuple[str, ...], ...]
    vocab: tuple[str, ...]

    @classmethod
    def of(cls, targets_N: Array, head_VD: Array) -> "_Parts":
        if sharding.current_mesh() is None:
            return cls(((),) * targets_N.ndim, ())
        axes = zip((sharding.TRAINING.batch, sharding.TRAINING.tokens), targets_N.shape)
        vocab = sharding.fitting(sharding.DECODING.vocab, len(head_VD))
        return cls(tuple(sharding.fitting(*axis) for axis in axes), vocab)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Axes that share the tokens."""
        return sum(self.lead, ())

    @property
    def gathered(self) -> tuple[str, ...]:
        """Axes that share both: each device has other tokens, and all need all of its vocabulary."""
        return tuple(axis for axis in self.tokens if axis in self.vocab)

    def run(self, function: Callable, arguments: tuple, out_names: tuple) -> tuple:
        """function(x, head, …) on each device's part, whose tokens are one axis.

        `out_names` say where results lie: "tokens", "head" or "all".
        """
        spec = {"tokens": PartitionSpec(*(axes or None for axes in self.lead))}
        spec |= {"all": PartitionSpec(), "head": PartitionSpec(self.vocab or None)}
        names = ("tokens", "head", *["tokens"] * (len(arguments) - 2))

        def local(x, head, *others):
            lead = others[0].shape
            flat = lambda array: array.reshape(-1, *array.shape[len(lead) :])
            results = function(flat(x), head, *map(flat, others))
            apart = lambda array: array.reshape(*lead, *array.shape[1:])
            return tuple(
                apart(result) if name == "tokens" and result is not None else result
                for name, result in zip(out_names, results, strict=True)
            )

        run = sharding.per_device(
            local, tuple(map(spec.get, names)), tuple(map(spec.get, out_names))
        )
        return run(*arguments)

    def gather(self, x_C: Array) -> Array:
        """A chunk's rows of all devices that share it."""
        if not self.gathered:
            return x_C
        return jax.lax.all_gather(x_C, self.gathered, axis=0, tiled=True)

    def own(self, x_C: Array, size: int) -> Array:
        """This device's rows of a gathered chunk."""
        if not self.gathered:
            return x_C
        at = jax.lax.axis_index(self.gathered) * size
        return jax.lax.dynamic_slice_in_dim(x_C, at, size)

    def sum_own(self, x_C: Array) -> Array:
        """Adds up what each part of the vocabulary gives to gathered rows; this device's rows of it."""
        if self.gathered:
            x_C = jax.lax.psum_scatter(x_C, self.gathered, scatter_dimension=0, tiled=True)
        return _over(jax.lax.psum, x_C, set(self.vocab) - set(self.gathered))

    def over_vocab(self, reduce: Callable, x: Array) -> Array:
        """psum or pmax over the parts of the vocabulary."""
        return _over(reduce, x, self.vocab)

    def over_copies(self, x: Array) -> Array:
        """The sum over devices with other tokens and the same vocabulary."""
        return _over(jax.lax.psum, x, set(self.tokens) - set(self.gathered))


def _over(reduce: Callable, x: Array, axes) -> Array:
    axes = tuple(axis for axis in sharding.MESH_AXES if axis in axes)
    return reduce(x, axes) if axes else x


class _Chunks:
    """The tokens that count, a chunk at a time; the loop ends with the last of them."""

    def __init__(self, counts_N: Array, head_VD: Array, parts: _Parts):
        n_tokens, sharers = counts_N.shape[0], 1
        if parts.gathered:
            sharers = jax.lax.axis_size(parts.gathered)
        self.size = chunk_size(n_tokens * sharers, len(head_VD)) // sharers or 1
        order_N = jnp.argsort(~counts_N, stable=True)
        self._order_N = jnp.pad(order_N, (0, -n_tokens % self.size), constant_values=n_tokens)
        # As many on each device as the one with most of them needs: they exchange rows.
        self._number = _over(jax.lax.pmax, -(-jnp.sum(counts_N) // self.size), parts.gathered)

    def loop(self, body, start):
        """body(take, put, carry) -> carry; `take` reads a chunk's rows of an array, `put` writes."""

        def chunk(i, carry):
            at_C = jax.lax.dynamic_slice(self._order_N, (i * self.size,), (self.size,))
            take = lambda array: jnp.asarray(array).at[at_C].get(mode="fill", fill_value=0)
            put = lambda array, rows: array.at[at_C].set(
                rows.astype(array.dtype), mode="drop", unique_indices=True
            )
            return body(take, put, carry)

        return jax.lax.fori_loop(0, self._number, chunk, start)


class _Softmax:
    """Of a chunk's logits [C, V]: all that the losses need, in float32."""

    def __init__(
        self, x_CD: Array, head_VD: Array, targets_C: Array, parts: _Parts, scale: float = 1.0
    ):
        logits_CV = matmul(x_CD, head_VD, 1, 1) * np.float32(scale)
        total = lambda x: parts.over_vocab(jax.lax.psum, x)
        self.top_C = parts.over_vocab(jax.lax.pmax, jnp.max(logits_CV, axis=-1))
        self._exp_CV = jnp.exp(logits_CV - self.top_C[:, None])
        self._total_C = total(jnp.sum(self._exp_CV, axis=-1))
        mean_logit_C = total(jnp.sum(self._exp_CV * logits_CV, axis=-1)) / self._total_C
        lse_C = self.top_C + jnp.log(self._total_C)
        if parts.vocab:  # ids of this part; those of others are out of its bounds
            targets_C = targets_C - jax.lax.axis_index(parts.vocab) * len(head_VD)
        inside_C = (targets_C >= 0) & (targets_C < len(head_VD))
        at_C1 = jnp.where(inside_C, targets_C, 0)[:, None]
        logit_C = jnp.take_along_axis(logits_CV, at_C1, axis=1)[:, 0]
        self.target_logit_C = total(jnp.where(inside_C, logit_C, 0))
        self._targets_C, self._scale = targets_C, np.float32(scale)
        self.nll_C, self.entropy_C = lse_C - self.target_logit_C, lse_C - mean_logit_C

    def dlogits(self, weights_C: Array) -> Array:
        """The gradient of Σ weight · nll by the head's products [C, V]."""
        hit_CV = self._targets_C[:, None] == jnp.arange(self._exp_CV.shape[1])
        weights_C1 = (weights_C * self._scale)[:, None]
        return (self._exp_CV / self._total_C[:, None] - hit_CV) * weights_C1


@jax.custom_vjp
def _cross_entropy(x_ND, head_VD, targets_N, weights_N):
    return _sums(x_ND, head_VD, targets_N, weights_N, False, False)[0]


def _forward(x_ND, head_VD, targets_N, weights_N):
    wanted = x_ND.perturbed, head_VD.perturbed  # a frozen head needs no gradient
    values = (x.value for x in (x_ND, head_VD, targets_N, weights_N))
    return _sums(*values, *wanted)


def _backward(gradients, cotangents):
    nll = cotangents.nll
    scale = lambda g: None if g is None else (g * nll.astype(g.dtype))
    return (*map(scale, gradients), None, None)


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _sums(x_ND, head_VD, targets_N, weights_N, want_dx: bool, want_dhead: bool):
    """(TokenSums, (gradient by x, gradient by head)); a gradient is None where it is not wanted."""
    parts = _Parts.of(targets_N, head_VD)
    local = functools.partial(_local_sums, parts, want_dx, want_dhead)
    values = (x_ND, head_VD, targets_N, weights_N)
    sums, *gradients = parts.run(local, values, ("all", "tokens", "head"))
    return sums, gradients


def _local_sums(parts, want_dx, want_dhead, x_ND, head_VD, targets_N, weights_N):
    head = head_VD.astype(x_ND.dtype)
    chunks = _Chunks(weights_N != 0, head, parts)

    def chunk(take, put, carry):
        sums, gradients = carry
        x_CD, weights_C = parts.gather(take(x_ND)), parts.gather(take(weights_N))
        softmax = _Softmax(x_CD, head, parts.gather(take(targets_N)), parts)
        values = TokenSums(
            nll=softmax.nll_C,
            entropy=softmax.entropy_C,
            correct=softmax.target_logit_C >= softmax.top_C,
        )
        sums = jax.tree.map(lambda total, x: total + jnp.sum(x * weights_C), sums, values)
        put_own = lambda array, rows: put(array, parts.sum_own(rows))
        return sums, _add_gradients(gradients, softmax, weights_C, x_CD, head, put_own)

    zero = jnp.zeros((), jnp.float32)
    start = TokenSums(zero, zero, zero), _no_gradients(x_ND, head_VD, want_dx, want_dhead)
    sums, gradients = chunks.loop(chunk, start)
    sums = jax.tree.map(parts.over_copies, sums)
    return sums, *_whole_gradients(gradients, head_VD, parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(temperature, x_ND, head_VD, targets_N, wanted_N):
    parts = _Parts.of(targets_N, head_VD)
    local = functools.partial(_local_logprobs, parts, temperature)
    return parts.run(local, (x_ND, head_VD, targets_N, wanted_N), ("tokens", "tokens"))


def _local_logprobs(parts, temperature, x_ND, head_VD, targets_N, wanted_N):
    head = head_VD.astype(x_ND.dtype)
    chunks = _Chunks(wanted_N, head, parts)

    def chunk(take, put, carry):
        logprobs_N, entropy_N = carry
        x_CD, targets_C = parts.gather(take(x_ND)), parts.gather(take(targets_N))
        softmax = _Softmax(x_CD, head, targets_C, parts, 1 / temperature)
        own = lambda values_C: parts.own(values_C, chunks.size)
        return put(logprobs_N, own(-softmax.nll_C)), put(entropy_N, own(softmax.entropy_C))

    zeros_N = jnp.zeros(targets_N.shape, jnp.float32)
    logprobs_N, entropy_N = chunks.loop(chunk, (zeros_N, zeros_N))
    # The last chunk may be filled up with tokens that are not wanted.
    only = lambda values_N: jnp.where(wanted_N, values_N, 0)
    return only(logprobs_N), only(entropy_N)


def _logprobs_forward(temperature, x_ND, head_VD, targets_N, wanted_N):
    perturbed = x_ND.perturbed, head_VD.perturbed
    values = tuple(x.value for x in (x_ND, head_VD, targets_N, wanted_N))
    # Flags as shapes: what is saved for the backward pass has to be arrays.
    flags = tuple(jnp.zeros((int(flag), 0)) for flag in perturbed)
    return _token_logprobs(temperature, *values), (values, flags)


def _logprobs_backward(temperature, saved, cotangents):
    (x_ND, head_VD, targets_N, wanted_N), flags = saved
    if isinstance(cotangents[0], jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    weights_N = jnp.where(wanted_N, -cotangents[0], 0)
    parts = _Parts.of(targets_N, head_VD)
    wanted = tuple(len(flag) > 0 for flag in flags)
    local = functools.partial(_local_logprob_gradients, parts, temperature, wanted)
    gradients = parts.run(local, (x_ND, head_VD, targets_N, weights_N), ("tokens", "head"))
    return *gradients, None, None


def _local_logprob_gradients(parts, temperature, wanted, x_ND, head_VD, targets_N, weights_N):
    head = head_VD.astype(x_ND.dtype)

    def chunk(take, put, gradients):
        x_CD, weights_C = parts.gather(take(x_ND)), parts.gather(take(weights_N))
        targets_C = parts.gather(take(targets_N))
        softmax = _Softmax(x_CD, head, targets_C, parts, 1 / temperature)
        put_own = lambda array, rows: put(array, parts.sum_own(rows))
        return _add_gradients(gradients, softmax, weights_C, x_CD, head, put_own)

    start = _no_gradients(x_ND, head_VD, *wanted)
    gradients = _Chunks(weights_N != 0, head, parts).loop(chunk, start)
    return _whole_gradients(gradients, head_VD, parts)


_token_logprobs.defvjp(_logprobs_forward, _logprobs_backward, symbolic_zeros=True)


def _no_gradients(x_ND, head_VD, want_dx: bool, want_dhead: bool):
    dx_ND = jnp.zeros_like(x_ND) if want_dx else None
    return dx_ND, jnp.zeros(head_VD.shape, jnp.float32) if want_dhead else None


def _add_gradients(gradients, softmax: _Softmax, weights_C, x_CD, head, put):
    """Adds a chunk's to (gradient by x, gradient by head)."""
    dx_ND, dhead_VD = gradients
    if dx_ND is None and dhead_VD is None:
        return gradients
    dlogits_CV = softmax.dlogits(weights_C).astype(x_CD.dtype)
    if dx_ND is not None:
        dx_ND = put(dx_ND, matmul(dlogits_CV, head, 1, 0))
    if dhead_VD is not None:
        dhead_VD = dhead_VD + matmul(dlogits_CV, x_CD, 0, 0)
    return dx_ND, dhead_VD


def _whole_gradients(gradients, head_VD, parts: _Parts):
    """Both, that of the head summed over all tokens and of the head's dtype."""
    dx_ND, dhead_VD = gradients
    if dhead_VD is not None:
        dhead_VD = parts.over_copies(dhead_VD).astype(head_VD.dtype)
        if dx_ND is not None and dhead_VD.dtype != jnp.float32:
            dx_ND, dhead_VD = detours.ready_together(dx_ND, dhead_VD)
    return dx_ND, dhead_VD
