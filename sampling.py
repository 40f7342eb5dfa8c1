"""Samplers: from logits to one token per row, with its log-probability.

A sampler is a frozen dataclass whose numbers are traced: another temperature does not recompile.
Dimension key: R rows, V vocab.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from utils.errors import SamplingError
from utils.fields import field, field_problems, integer, number

Array = jax.Array

# Tokens per block: a draw first finds its block, then its token in the block.
_BLOCK = 256

_PENALTIES = number(above=0)


@flax.struct.dataclass
class Greedy:
    """The most probable token; the lowest id among equals. Log-probs are at temperature 1.

    Attributes:
        repetition_penalty: see `penalize`; None is off.
    """

    repetition_penalty: float | Array | None = field(None, allowed=_PENALTIES)

    def __call__(
        self, logits_RV: Array, keys_R: Array, seen_RV: Array | None = None
    ) -> tuple[Array, Array]:
        """[R, V] float32 logits -> tokens [R] int32 and their log-probs [R] float32.

        Args:
            logits_RV: [R, V] float32.
            keys_R: [R] PRNG keys, unused here.
            seen_RV: [R, V] bool, the tokens so far; needed with a repetition penalty.
        """
        logits_RV = penalize(logits_RV, seen_RV, self.repetition_penalty)
        tokens_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
        return tokens_R, token_logprobs(logits_RV, tokens_R)


@flax.struct.dataclass
class TopP:
    """Draws from the nucleus: temperature, then top-k, then top-p, then min-p, then renormalise.

    >>> logits_RV = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
    >>> draw = TopP(top_k=1)
    >>> tokens_R, logprobs_R = draw(logits_RV, jax.random.split(jax.random.key(0), 1))
    >>> tokens_R.tolist(), round(float(jnp.exp(logprobs_R[0])), 3)
    ([0], 0.5)

    Source: nucleus sampling, Holtzman et al. (1904.09751) section 3.1; min-p, 2407.01082.

    The nucleus is the fewest most probable tokens whose mass, of what top-k left, reaches top_p; the
    token that crosses it is kept. Among tokens of equal probability the lower id comes first, so ties
    fall the same way each run. Temperature 0 is argmax.
    """

    temperature: float | Array = field(
        1.0, "divides the logits; 0 takes the most probable token each time", number(0)
    )
    top_p: float | Array = field(
        1.0,
        "sample from the most probable tokens that have this mass; 1: off",
        number(above=0, most=1),
    )
    top_k: int | Array = field(0, "sample from this many most probable tokens; 0: off", integer(0))
    min_p: float | Array = field(
        0.0, "drop tokens below min_p times the largest probability; 0: off", number(0, 1)
    )
    repetition_penalty: float | Array | None = field(
        None, "above 1 makes tokens that were there less likely; 1: off", _PENALTIES
    )

    def __call__(
        self, logits_RV: Array, keys_R: Array, seen_RV: Array | None = None
    ) -> tuple[Array, Array]:
        """[R, V] float32 logits -> tokens [R] int32 and their log-probs [R] float32.

        Log-probs are of the distribution after penalty and temperature and before truncation, as
        RL's ratios need them (at temperature 0: of temperature 1).

        Args:
            logits_RV: [R, V] float32.
            keys_R: [R] PRNG keys, one per row, so that a row's draw does not depend on its mates.
            seen_RV: [R, V] bool, the tokens so far; needed with a repetition penalty.
        """
        logits_RV = penalize(logits_RV, seen_RV, self.repetition_penalty)
        greedy = jnp.asarray(self.temperature) == 0
        scaled_RV = scale(logits_RV, jnp.where(greedy, 1.0, self.temperature))
        tokens_R = jax.lax.cond(
            greedy,
            lambda: jnp.argmax(logits_RV, axis=-1).astype(jnp.int32),
            lambda: self._draw(scaled_RV, keys_R),
        )
        return tokens_R, token_logprobs(scaled_RV, tokens_R)

    def _draw(self, scaled_RV: Array, keys_R: Array) -> Array:
        weights_RV = jnp.exp(scaled_RV - jnp.max(scaled_RV, axis=-1, keepdims=True))
        truncated = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        weights_RV = jax.lax.cond(
            truncated,
            lambda: truncate(weights_RV, self.top_k, self.top_p, self.min_p),
            lambda: weights_RV,
        )
        uniform_R = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys_R)
        return _inverse_cdf(weights_RV, uniform_R)


Sampler = Greedy | TopP


def traced(sampler: Sampler) -> Sampler:
    """The sampler with its numbers as arrays of fixed types, so that 1 and 1.0 are one compilation."""
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), sampler)
    if isinstance(sampler, Greedy):
        return arrays
    return arrays.replace(top_k=jnp.asarray(sampler.top_k, jnp.int32))


def check_sampler(sampler: Sampler) -> None:
    """Raises SamplingError, on the host, that lists every number out of its range."""
    numbers = jax.tree.map(lambda x: x.item() if isinstance(x, jax.Array) else x, sampler)
    if problems := field_problems(numbers):
        raise SamplingError("; ".join(problems))


def penalize(logits_RV: Array, seen_RV: Array | None, penalty: float | Array | None) -> Array:
    """Makes tokens that were seen less likely: positive logits / penalty, negative ones · penalty.

    Source: CTRL (1909.05858) section 4.1, in the form every library uses.
    """
    if penalty is None:
        return logits_RV
    penalized_RV = jnp.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty)
    return jnp.where(seen_RV, penalized_RV, logits_RV)


def scale(logits_RV: Array, temperature: float | Array) -> Array:
    """Logits / temperature, shifted so that the largest is 0: finite for a tiny temperature too."""
    # A shift first: dividing 30 by 1e-38 would overflow, 0 stays 0 and the others fall to -inf.
    top_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
    tiny = jnp.finfo(jnp.float32).tiny
    return (logits_RV - top_R1) / jnp.maximum(temperature, tiny)


def token_logprobs(logits_RV: Array, tokens_R: Array) -> Array:
    """log softmax(logits) at one token per row: [R, V], [R] -> [R] float32."""
    chosen_R = jnp.take_along_axis(logits_RV, tokens_R[:, None], axis=-1)[:, 0]
    return chosen_R - jax.nn.logsumexp(logits_RV, axis=-1)


def truncate(weights_RV: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """Zeroes the weights that top-k, top-p and min-p drop, without a sort.

    Each filter keeps the tokens in front of a threshold. The threshold is found bit by bit, since
    non-negative floats order as their bits do: 31 masked sums instead of sorting the vocabulary.

    Args:
        weights_RV: [R, V] float32, unnormalised probabilities, the largest 1.
        top_k, top_p, min_p: scalars, off at 0, 1 and 0.

    Returns:
        [R, V] float32: the weights of the kept tokens, 0 for the others.
    """
    keep_k = jnp.where(top_k > 0, top_k, weights_RV.shape[-1]).astype(jnp.float32)
    keep_R = jnp.broadcast_to(keep_k, weights_RV.shape[:1])
    weights_RV = _keep_front(weights_RV, 1.0, keep_R)
    limit_R = jnp.where(top_p < 1, top_p * jnp.sum(weights_RV, axis=-1), jnp.inf)
    weights_RV = _keep_front(weights_RV, weights_RV, limit_R)
    return jnp.where(weights_RV >= min_p, weights_RV, 0)


def _keep_front(weights_RV: Array, sizes: Array | float, limit_R: Array) -> Array:
    """Keeps the tokens that have less than `limit` in front of them, in order of weight, then of id.

    Args:
        weights_RV: [R, V] float32, non-negative.
        sizes: how much each token adds towards the limit: 1, or its weight [R, V].
        limit_R: [R].

    Returns:
        [R, V]: the weights of the kept tokens, 0 for the others.
    """
    bits_RV = jax.lax.bitcast_convert_type(weights_RV, jnp.int32)

    def enough(mask_RV: Array) -> Array:
        return jnp.sum(jnp.where(mask_RV, sizes, 0), axis=-1) >= limit_R

    # The lowest weight that is kept: the largest t such that {w >= t} reaches the limit, else 0.
    lowest_R = _largest(lambda t_R: enough(bits_RV >= t_R[:, None]), limit_R.shape, bits=31)
    above_RV = bits_RV > lowest_R[:, None]
    equal_RV = bits_RV == lowest_R[:, None]
    # Among its equals, ids up to the first one with which the limit is reached.
    index_V = jnp.arange(weights_RV.shape[-1])
    last_R = _largest(
        lambda i_R: ~enough(above_RV | (equal_RV & (index_V < i_R[:, None]))),
        limit_R.shape,
        bits=weights_RV.shape[-1].bit_length(),
    )
    kept_RV = above_RV | (equal_RV & (index_V <= last_R[:, None]))
    return jnp.where(kept_RV, weights_RV, 0)


def _inverse_cdf(weights_RV: Array, uniform_R: Array) -> Array:
    """The first token at which the cumulated weight exceeds uniform · total: [R] int32.

    It finds the block, then the token in the block: two passes over few numbers each.
    """
    vocab = weights_RV.shape[-1]
    weights_RMC = jnp.pad(weights_RV, ((0, 0), (0, -vocab % _BLOCK)))
    weights_RMC = weights_RMC.reshape(len(weights_RV), -1, _BLOCK)
    masses_RM = jnp.sum(weights_RMC, axis=-1)
    target_R = uniform_R * jnp.sum(masses_RM, axis=-1)
    block_R, rest_R = _reach(masses_RM, target_R)
    weights_RC = jnp.take_along_axis(weights_RMC, block_R[:, None, None], axis=1)[:, 0]
    within_R, _ = _reach(weights_RC, rest_R)
    return (block_R * _BLOCK + within_R).astype(jnp.int32)


def _reach(masses_RM: Array, target_R: Array) -> tuple[Array, Array]:
    """(the first index up to which the masses exceed the target, the target minus the mass before it).

    Sums over a growing mask are exactly monotone in floating point, so that an index of mass 0 is
    never reached.
    """
    index_M = jnp.arange(masses_RM.shape[-1])

    def before(i_R: Array) -> Array:
        return jnp.sum(jnp.where(index_M < i_R[:, None], masses_RM, 0), axis=-1)

    bits = masses_RM.shape[-1].bit_length()
    found_R = _largest(lambda i_R: before(i_R) <= target_R, target_R.shape, bits)
    # A product with the total may round up to it, and the same sum may be rounded in another order.
    last_R = jnp.max(jnp.where(masses_RM > 0, index_M, 0), axis=-1)
    found_R = jnp.minimum(found_R, last_R)
    return found_R, target_R - before(found_R)


def _largest(holds: Callable[[Array], Array], shape: tuple[int, ...], bits: int) -> Array:
    """The largest int32 below 2**bits for which `holds`, true up to some point, is true; else 0."""

    def try_bit(i, value):
        with_bit = value | (1 << (bits - 1 - i)).astype(jnp.int32)
        return jnp.where(holds(with_bit), with_bit, value)

    return jax.lax.fori_loop(0, bits, try_bit, jnp.zeros(shape, jnp.int32))
