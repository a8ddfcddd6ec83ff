"""Parts of tensors in a Hugging Face checkpoint: what a rank's parameters are put together from."""
from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from copd_megatron.model.safetensor_reader import SafetensorReader

_EVERYTHING = slice(None)


@dataclass(frozen=True)
class Piece:
    """A matrix, or part of one, within one Hugging Face tensor. Example: rows 0 to 63 of the query projection of layer
    0 are ``Piece("model.layers.0.self_attn.q_proj.weight", rows=slice(0, 64))``."""

    name: str
    rows: slice = _EVERYTHING
    cols: slice = _EVERYTHING
    """Of the weight as it is used, [out, in]."""
    index: int | None = None
    """Which matrix of a stack; None: the tensor is no stack."""
    transposed: bool = False
    """Stored as [in, out]."""

    def read(self, reader: SafetensorReader) -> Tensor:
        """Its numbers, [rows, cols] (or [rows]), in the stored dtype."""
        if self.transposed:
            return reader.read(self.name, self.cols, self.rows, self.index).T
        return reader.read(self.name, self.rows, self.cols, self.index)

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the matrix that it is a part of, as stored, if its tensor has this shape."""
        return shape if self.index is None else shape[1:]

    def elements(self, shape: tuple[int, ...]) -> int:
        """How many numbers it has if its tensor has this shape."""
        cuts = (self.cols, self.rows) if self.transposed else (self.rows, self.cols)
        return math.prod(len(range(*cut.indices(size))) for size, cut in zip(self.matrix(shape), cuts))
