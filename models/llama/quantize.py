"""Parameters in eight bits: the matrices of a model as `Int8`, its norms and biases as they are."""

import jax

from models.llama.model import Params
from utils.int8 import quantize


def quantize_params(params: Params) -> Params:
    """The same parameters with each matrix as an `Int8`, in either layout (stacked or for decoding).

    `Checkpoint.params(quantize=True)` gives the same while it reads, without the floats in memory.
    Quality next to float32 and to llama.cpp's Q8_0: docs/speed.md.
    """

    def convert(path, x):
        name = path[-1].key
        return quantize(x) if name[0] == "w" or name in ("embed", "lm_head") else x

    return jax.tree_util.tree_map_with_path(convert, params)
