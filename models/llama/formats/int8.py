"""Eight-bit matrices in safetensors, in this project's own naming. No JAX here.

A matrix `X.weight` is I8 [out, in] beside `X.weight_scale` F32 [out], whose product with its rows it
stands for; the rest is as in Hugging Face's format. config.json has another model_type, so that other
programs refuse the folder: transformers takes the integers for weights under any quantization_config
that it does not know.
"""

import math

import numpy as np

from models.llama.layout import TensorSource
from utils.errors import ArtifactError

SUFFIX = "_int8"  # behind config.json's model_type
SCALE = "_scale"  # behind the name of a matrix


class Int8Tensors:
    """A TensorSource over one with int8 tensors and their scales; `read` multiplies them."""

    def __init__(self, source: TensorSource):
        """Raises ArtifactError where values and scales do not belong together."""
        self._source, self.description, self.files = source, source.description, source.files
        scales = {name + SCALE for name, dtype in source.dtypes.items() if dtype == np.int8}
        for scale in sorted(scales):
            rows = source.shapes[scale.removesuffix(SCALE)][:1]
            found = source.shapes.get(scale), source.dtypes.get(scale)
            if found != (rows, np.float32):
                got = "missing" if found[0] is None else f"{found[1].name} {list(found[0])}"
                raise ArtifactError(
                    f"{self.description}: {scale!r:.200} is {got}, expected float32 {list(rows)}"
                )
        self.shapes = {name: shape for name, shape in source.shapes.items() if name not in scales}
        of_file = {name: source.dtypes[name] for name in self.shapes}
        wide = np.dtype(np.float32)
        self.dtypes = {name: wide if d == np.int8 else d for name, d in of_file.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor, in float32 if it is kept in eight bits."""
        if self._source.dtypes[name] != np.int8:
            return self._source.read(name)
        values, scales = self.read_int8(name, slice(0, self.shapes[name][0]))
        return values * scales[:, None]

    def read_int8(self, name: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """(values [rows, in] int8, scales [rows] float32) of some rows of a matrix.

        Raises ArtifactError if the tensor is not kept in eight bits.
        """
        if self._source.dtypes[name] != np.int8:
            raise ArtifactError(
                f"{self.description}: {name!r:.200} is not int8, as config.json says"
            )
        columns = slice(0, math.prod(self.shapes[name][1:]))
        values = self._source.read_part(name, (rows, columns))
        return values, self._source.read_part(name + SCALE, (rows,))
