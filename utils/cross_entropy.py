"""Cross-entropy and log-probs of an output head without the logits of all tokens at once.

On a mesh each device holds a part of the vocabulary and of the tokens. A chunk's tokens are gathered
from the devices that share a model and multiplied with each part of the head where it is stored. Only
sums over the vocabulary travel: no device needs the whole head, nor its gradient (Megatron-LM,
1909.08053).
Dimension key: T tokens (one axis, or rows and their tokens: [B, T]), C tokens of a chunk, D model dim,
V vocab.
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
        correct: number of targets that are the most probable token.
    """

    nll: Array
    entropy: Array
    correct: Array


def cross_entropy(x_TD: Array, head_VD: Array, targets_T: Array, weights_T: Array) -> TokenSums:
    """Sums of the tokens' losses, computed a chunk of tokens at a time.

    >>> x_TD, head_VD = jnp.eye(3, 4), jnp.eye(5, 4)
    >>> sums = cross_entropy(x_TD, head_VD, jnp.arange(3), jnp.asarray([1.0, 1.0, 0.0]))
    >>> round(float(sums.nll), 4), int(sums.correct)
    (1.8097, 2)

    A chunk's gradients are computed together with its loss, since weights are known before the
    backward pass: logits are neither kept nor computed twice. Tokens of weight 0 cost nothing.

    Args:
        x_TD: [T, D] the head's input.
        head_VD: [V, D], cast to x's dtype.
        targets_T: [T] int32.
        weights_T: [T] float32.
    """
    return _cross_entropy(x_TD, head_VD, targets_T, weights_T)


def token_logprobs(
    x_TD: Array, head_VD: Array, targets_T: Array, wanted_T: Array, temperature: float
) -> tuple[Array, Array]:
    """log softmax(logits / temperature) at each token's target, computed a chunk of tokens at a time.

    The weight of each log-prob's gradient is known only in the backward pass, which computes a
    chunk's logits again. Tokens that are not wanted cost nothing.

    Args:
        x_TD: [T, D] the head's input.
        head_VD: [V, D], cast to x's dtype.
        targets_T: [T] int32.
        wanted_T: [T] bool.
        temperature: divides the logits, as it did in sampling.

    Returns:
        (log-probs [T] float32, entropies of the predicted distributions [T] float32 in nats), 0 where
        not wanted. Only log-probs have a gradient.
    """
    return _token_logprobs(float(temperature), x_TD, head_VD, targets_T, wanted_T)


def chunk_size(n_tokens: int, vocab_size: int) -> int:
    """Tokens per chunk."""
    fit = max(_CHUNK_LOGITS // vocab_size, 32)
    return min(1 << (fit.bit_length() - 1), _LARGEST_CHUNK, n_tokens)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Mesh axes over which tokens and vocabulary are sharded; all empty without a mesh.

    Attributes:
        lead: mesh axes of each of the tokens' axes.
        vocab: mesh axes of the vocabulary.
    """

    lead: tuple[tuple[str, ...], ...]
    vocab: tuple[str, ...]

    @classmethod
    def of(cls, targets_T: Array, head_VD: Array) -> "Parts":
        if sharding.current_mesh() is None:
            return cls(((),) * targets_T.ndim, ())
        axes = zip((sharding.TRAINING.batch, sharding.TRAINING.tokens), targets_T.shape)
        vocab = sharding.fitting(sharding.DECODING.vocab, len(head_VD))
        return cls(tuple(sharding.fitting(*axis) for axis in axes), vocab)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Mesh axes over which tokens are sharded."""
        return sum(self.lead, ())

    @property
    def gathered(self) -> tuple[str, ...]:
        """Mesh axes over which both are sharded: a device's tokens need other devices' vocabulary."""
        return tuple(axis for axis in self.tokens if axis in self.vocab)

    def run(self, function: Callable, arguments: tuple, names: tuple, out_names: tuple) -> tuple:
        """The function on each device's part of the arguments, whose tokens are one axis.

        Names say how each argument and result is sharded: like "tokens", like "head", or whole on
        "all". The last argument has one number per token.
        """
        spec = {"tokens": PartitionSpec(*(axes or None for axes in self.lead))}
        spec |= {"all": PartitionSpec(), "head": PartitionSpec(self.vocab or None)}

        def local(*parts):
            lead = parts[-1].shape
            flat = (
                y.reshape(-1, *y.shape[len(lead) :]) if name == "tokens" else y
                for name, y in zip(names, parts, strict=True)
            )
            results = function(*flat)
            return tuple(
                y.reshape(*lead, *y.shape[1:]) if name == "tokens" else y
                for name, y in zip(out_names, results, strict=True)
            )

        run = sharding.per_device(
            local, tuple(map(spec.get, names)), tuple(map(spec.get, out_names))
        )
        return run(*arguments)

    def gather(self, x_C: Array) -> Array:
        """A chunk's rows from all devices that share it."""
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
        """Sums a gathered chunk over the parts of the vocabulary; returns this device's rows."""
        if self.gathered:
            x_C = jax.lax.psum_scatter(x_C, self.gathered, scatter_dimension=0, tiled=True)
        return _over(jax.lax.psum, x_C, set(self.vocab) - set(self.gathered))

    def over_vocab(self, reduce: Callable, x: Array) -> Array:
        """psum or pmax over the parts of the vocabulary."""
        return _over(reduce, x, self.vocab)

    def over_copies(self, x: Array) -> Array:
        """Sums over devices with other tokens and the same vocabulary."""
        return _over(jax.lax.psum, x, set(self.tokens) - set(self.gathered))


def _over(reduce: Callable, x: Array, axes) -> Array:
    axes = tuple(axis for axis in sharding.MESH_AXES if axis in axes)
    return reduce(x, axes) if axes else x


class Chunks:
    """The tokens that count, a chunk at a time; the loop ends with the last of them."""

    def __init__(self, counts_T: Array, head_VD: Array, parts: Parts):
        n_tokens, sharers = counts_T.shape[0], 1
        if parts.gathered:
            sharers = jax.lax.axis_size(parts.gathered)
        self.size = chunk_size(n_tokens * sharers, len(head_VD)) // sharers or 1
        order_T = jnp.argsort(~counts_T, stable=True)
        self._order_T = jnp.pad(order_T, (0, -n_tokens % self.size), constant_values=n_tokens)
        # The same number on each device, since they exchange rows: that of the device with most.
        self._number = _over(jax.lax.pmax, -(-jnp.sum(counts_T) // self.size), parts.gathered)

    def loop(self, body, start):
        """body(take, put, carry) -> carry; `take` reads a chunk's rows of an array, `put` writes."""

        def chunk(i, carry):
            at_C = jax.lax.dynamic_slice(self._order_T, (i * self.size,), (self.size,))

            def take(array):
                return jnp.asarray(array).at[at_C].get(mode="fill", fill_value=0)

            def put(array, rows):
                rows = rows.astype(array.dtype)
                return array.at[at_C].set(rows, mode="drop", unique_indices=True)

            return body(take, put, carry)

        return jax.lax.fori_loop(0, self._number, chunk, start)


class _Softmax:
    """Softmax of a chunk's logits [C, V], with everything that the losses need, in float32."""

    def __init__(
        self, x_CD: Array, head_VD: Array, targets_C: Array, parts: Parts, scale: float = 1.0
    ):
        logits_CV = matmul(x_CD, head_VD, 1, 1) * np.float32(scale)
        total = functools.partial(parts.over_vocab, jax.lax.psum)
        self._top_C = parts.over_vocab(jax.lax.pmax, jnp.max(logits_CV, axis=-1))
        self._exp_CV = jnp.exp(logits_CV - self._top_C[:, None])
        self._total_C = total(jnp.sum(self._exp_CV, axis=-1))
        mean_logit_C = total(jnp.sum(self._exp_CV * logits_CV, axis=-1)) / self._total_C
        lse_C = self._top_C + jnp.log(self._total_C)
        if parts.vocab:  # ids of this part; those of others are out of its bounds
            targets_C = targets_C - jax.lax.axis_index(parts.vocab) * len(head_VD)
        inside_C = (targets_C >= 0) & (targets_C < len(head_VD))
        at_C1 = jnp.where(inside_C, targets_C, 0)[:, None]
        logit_C = jnp.take_along_axis(logits_CV, at_C1, axis=1)[:, 0]
        self._target_logit_C = total(jnp.where(inside_C, logit_C, 0))
        self._targets_C, self._scale = targets_C, np.float32(scale)
        self.nll_C, self.entropy_C = lse_C - self._target_logit_C, lse_C - mean_logit_C

    def add_sums(self, sums: TokenSums, weights_C: Array) -> TokenSums:
        """Adds the chunk's values, each times its weight."""
        correct_C = self._target_logit_C >= self._top_C
        values = TokenSums(nll=self.nll_C, entropy=self.entropy_C, correct=correct_C)
        return jax.tree.map(lambda total, x: total + jnp.sum(x * weights_C), sums, values)

    def dlogits(self, weights_C: Array) -> Array:
        """The gradient of Σ weight · nll by the head's products [C, V]."""
        hit_CV = self._targets_C[:, None] == jnp.arange(self._exp_CV.shape[1])
        weights_C1 = (weights_C * self._scale)[:, None]
        return (self._exp_CV / self._total_C[:, None] - hit_CV) * weights_C1


@jax.custom_vjp
def _cross_entropy(x_TD, head_VD, targets_T, weights_T):
    return _walk({"sums"}, 1.0, x_TD, head_VD, targets_T, weights_T)["sums"]


def _forward(x_TD, head_VD, targets_T, weights_T):
    values = (x.value for x in (x_TD, head_VD, targets_T, weights_T))
    gradients = _walk({"sums"} | _perturbed(x_TD, head_VD), 1.0, *values)
    return gradients.pop("sums"), gradients


def _backward(gradients, cotangents):
    nll = cotangents.nll
    gradients = {name: g * nll.astype(g.dtype) for name, g in gradients.items()}
    return gradients.get("dx"), gradients.get("dhead"), None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(temperature, x_TD, head_VD, targets_T, wanted_T):
    both = {"logprobs", "entropy"}
    found = _walk(both, 1 / temperature, x_TD, head_VD, targets_T, wanted_T)
    return found["logprobs"], found["entropy"]


def _logprobs_forward(temperature, x_TD, head_VD, targets_T, wanted_T):
    values = tuple(x.value for x in (x_TD, head_VD, targets_T, wanted_T))
    # Names as keys, since only arrays can be saved as values for the backward pass.
    return _token_logprobs(temperature, *values), (values, dict.fromkeys(_perturbed(x_TD, head_VD)))


def _logprobs_backward(temperature, saved, cotangents):
    (x_TD, head_VD, targets_T, wanted_T), names = saved
    if isinstance(cotangents[0], jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    weights_T = jnp.where(wanted_T, -cotangents[0], 0)
    gradients = _walk(set(names), 1 / temperature, x_TD, head_VD, targets_T, weights_T)
    return gradients.get("dx"), gradients.get("dhead"), None, None


_token_logprobs.defvjp(_logprobs_forward, _logprobs_backward, symbolic_zeros=True)


def _perturbed(x_TD, head_VD) -> set[str]:
    """The gradients that are wanted: a frozen head needs none."""
    return {name for name, x in (("dx", x_TD), ("dhead", head_VD)) if x.perturbed}


# How each result is sharded, see Parts.run.
_RESULTS = {
    "sums": "all",
    "logprobs": "tokens",
    "entropy": "tokens",
    "dx": "tokens",
    "dhead": "head",
}


def _walk(wanted: set[str], scale: float, x_TD, head_VD, targets_T, weights_T) -> dict[str, Array]:
    """The wanted ones of _RESULTS, by one walk over the tokens whose weight is not 0.

    "sums" are TokenSums, "dx" and "dhead" the gradients of Σ weight · nll; the logits of all are
    multiplied by `scale`.
    """
    parts = Parts.of(targets_T, head_VD)
    names = tuple(name for name in _RESULTS if name in wanted)
    local = functools.partial(_local_walk, parts, names, scale)
    values, given = (x_TD, head_VD, targets_T, weights_T), ("tokens", "head", "tokens", "tokens")
    results = parts.run(local, values, given, tuple(_RESULTS[name] for name in names))
    return dict(zip(names, results, strict=True))


def _local_walk(parts, names, scale, x_TD, head_VD, targets_T, weights_T):
    head, counts_T = head_VD.astype(x_TD.dtype), weights_T != 0
    chunks = Chunks(counts_T, head, parts)

    def chunk(take, put, found):
        x_CD, targets_C = parts.gather(take(x_TD)), parts.gather(take(targets_T))
        weights_C = parts.gather(take(weights_T))
        softmax = _Softmax(x_CD, head, targets_C, parts, scale)
        dlogits_CV = softmax.dlogits(weights_C).astype(x_CD.dtype)
        steps = {
            "sums": lambda total: softmax.add_sums(total, weights_C),
            "logprobs": lambda out: put(out, parts.own(-softmax.nll_C, chunks.size)),
            "entropy": lambda out: put(out, parts.own(softmax.entropy_C, chunks.size)),
            "dx": lambda out: put(out, parts.sum_own(matmul(dlogits_CV, head, 1, 0))),
            "dhead": lambda total: total + matmul(dlogits_CV, x_CD, 0, 0),
        }
        return {name: steps[name](value) for name, value in found.items()}

    zero, zeros_T = jnp.zeros((), jnp.float32), jnp.zeros(targets_T.shape, jnp.float32)
    start = {
        "sums": TokenSums(zero, zero, zero),
        "logprobs": zeros_T,
        "entropy": zeros_T,
        "dx": jnp.zeros_like(x_TD),
        "dhead": jnp.zeros(head_VD.shape, jnp.float32),
    }
    found = chunks.loop(chunk, {name: start[name] for name in names})
    for name in {"logprobs", "entropy"} & found.keys():
        # The last chunk may be filled up with tokens that do not count.
        found[name] = jnp.where(counts_T, found[name], 0)
    if "sums" in found:
        found["sums"] = jax.tree.map(parts.over_copies, found["sums"])
    if "dhead" in found:
        found["dhead"] = parts.over_copies(found["dhead"]).astype(head_VD.dtype)
        if "dx" in found and head_VD.dtype != jnp.float32:
            found["dx"], found["dhead"] = detours.ready_together(found["dx"], found["dhead"])
    return tuple(found[name] for name in names)
