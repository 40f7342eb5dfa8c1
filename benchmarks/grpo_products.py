"""The products with a model's matrices alone: what is left of a phase is anything else.

They have the shapes and the dtype that they have in a rollout and in an update, and nothing else is
computed but what ties one to the next. Attention has no matrix of the model: it is "anything else".
Dimension key: B prompts, T tokens of a row, D model dim, V vocab.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.config import ModelConfig
from models.llama.layout import FUSED
from utils.cross_entropy import chunk_size
from utils.ops import linear, matmul, project

Array = jax.Array
Layers = tuple[dict[str, Array], ...]


class Products:
    """Random matrices of a model's shapes, which neither shrink nor grow what they multiply."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        c = self._config = config
        q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        sizes = {"q": (q_dim, c.dim), "k": (kv_dim, c.dim), "v": (kv_dim, c.dim)}
        sizes |= {"o": (c.dim, q_dim), "_gate": (c.ffn_dim, c.dim), "_up": (c.ffn_dim, c.dim)}
        sizes |= {"_down": (c.dim, c.ffn_dim)}
        draw = np.random.default_rng(0).standard_normal
        matrix = lambda m, n: jnp.asarray(draw((m, n), np.float32) / n**0.5, dtype)
        names = range(c.n_layers)
        self._layers = tuple({k: matrix(*size) for k, size in sizes.items()} for _ in names)
        self._head_VD, self._dtype = matrix(c.vocab_size, c.dim), dtype
        groups = FUSED["attn"] | FUSED["mlp"]
        fuse = lambda layer, names: jnp.concatenate([layer[name] for name in names])
        # As `for_decoding` lays them out.
        self._fused = tuple(
            {
                name: fuse(layer, groups.get(name, (name,)))
                for name in ("qkv", "o", "_gate_up", "_down")
            }
            for layer in self._layers
        )

    def rollout(self, prompts: int, width: int, rows: int, steps: int, repeats: int) -> float:
        """Seconds of the products that sample rows of a token more than `steps`, after a prefill.

        Args:
            prompts, width: of the prefill.
            rows, steps: of decoding.
            repeats: the median of so many.
        """

        def prefill(layers, head_VD, x_BTD):
            return project(self._through(layers, x_BTD)[:, -1:], head_VD)

        def decode(layers, head_VD, x_R1D):
            def step(_, x_R1D):
                logits_R1V = project(self._through(layers, x_R1D), head_VD)
                return _tied(x_R1D, logits_R1V)

            return jax.lax.fori_loop(0, steps, step, x_R1D)

        first = _median_seconds(
            prefill, self._fused, self._head_VD, self._ones(prompts, width), repeats
        )
        return first + _median_seconds(
            decode, self._fused, self._head_VD, self._ones(rows, 1), repeats
        )

    def update(self, rows: int, width: int, wanted: int, repeats: int) -> float:
        """Seconds of the products of a micro-batch, forward and backward.

        Args:
            rows, width: of what goes through the layers.
            wanted: tokens that the head multiplies. Its logits are computed again backwards.
            repeats: the median of so many.
        """
        size = chunk_size(wanted, self._config.vocab_size)

        def step(layers, head_VD, x_BTD):
            y_BTD, backward = jax.vjp(self._through, layers, x_BTD)
            h_ND, found = y_BTD.reshape(-1, y_BTD.shape[-1])[-wanted:], []
            for start in range(0, wanted, size):
                h_CD = h_ND[start : start + size]
                h_CD = _tied(h_CD, matmul(h_CD, head_VD, 1, 1))
                dlogits_CV = matmul(h_CD, head_VD, 1, 1).astype(h_CD.dtype)
                dh_CD = matmul(dlogits_CV, head_VD, 1, 0)
                found += [dh_CD, matmul(dlogits_CV, h_CD, 0, 0)]
                y_BTD = _tied(y_BTD, dh_CD.reshape(1, 1, -1))
            found += jax.tree.leaves(backward(y_BTD))
            # Not the gradients themselves: to hand them out costs time of its own.
            return [jnp.max(x) for x in found]

        return _median_seconds(step, self._layers, self._head_VD, self._ones(rows, width), repeats)

    def _through(self, layers: Layers, x_BTD: Array) -> Array:
        """x through all matrices of the layers."""
        c = self._config
        ends = c.n_heads * c.head_dim, (c.n_heads + c.n_kv_heads) * c.head_dim
        half = np.float32(0.5**0.5)
        for layer in layers:
            named = lambda names: [linear(x_BTD, layer[name]) for name in names if name in layer]
            q, k, v = jnp.split(jnp.concatenate(named(("qkv", "q", "k", "v")), -1), ends, axis=-1)
            rest = jnp.pad(k + v, ((0, 0), (0, 0), (0, q.shape[-1] - k.shape[-1])))
            x_BTD = linear(((q + rest) * half).astype(x_BTD.dtype), layer["o"])
            both = jnp.concatenate(named(("_gate_up", "_gate", "_up")), -1)
            gate, up = jnp.split(both, 2, axis=-1)
            x_BTD = linear(((gate + up) * half).astype(x_BTD.dtype), layer["_down"])
        return x_BTD

    def _ones(self, rows: int, width: int) -> Array:
        return jnp.ones((rows, width, self._config.dim), self._dtype)


def _tied(x: Array, to: Array) -> Array:
    """x, as it can be known only when all of another array is."""
    return x + (1e-6 * jnp.max(to, axis=-1, keepdims=True)).astype(x.dtype)


def _median_seconds(function, layers: Layers, head_VD: Array, x: Array, repeats: int) -> float:
    """Of the jitted function, after one call to compile it."""
    function, seconds = jax.jit(function), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function(layers, head_VD, x))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
