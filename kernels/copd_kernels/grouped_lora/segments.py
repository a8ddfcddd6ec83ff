"""Rows of a stream sorted by the expert whose adapters act on them."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

TILE = 64
"""Rows of one program."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Example: ``Segments.build([slice(0, 40), slice(40, 50)], device)``: two experts, 40 and 10 rows."""

    routes: tuple[slice | Tensor, ...]
    """Rows of each expert, as a slice or as int64 indices without repetitions."""
    device: torch.device

    @classmethod
    def build(cls, routes: Sequence[slice | Tensor], device: torch.device) -> Segments:
        """Segments of experts in the order of ``routes``; a route may be empty."""
        return cls(tuple(routes), device)

    @property
    def lengths(self) -> list[int]:
        """Rows of each expert."""
        return [r.stop - r.start if isinstance(r, slice) else len(r) for r in self.routes]

    @cached_property
    def rows(self) -> Tensor:
        """[n] int64: stream rows, expert by expert."""
        parts = [torch.arange(r.start, r.stop, device=self.device) if isinstance(r, slice) else r.to(self.device)
                 for r in self.routes]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=self.device)

    @cached_property
    def bounds(self) -> Tensor:
        """[G + 1] int32: where each expert's rows start in ``rows``."""
        return _moved(np.concatenate([[0], np.cumsum(self.lengths)]), self.device)

    @cached_property
    def tiles(self) -> tuple[Tensor, Tensor]:
        """Expert, and first place in ``rows``, of every run of at most ``TILE`` rows of one expert; int32."""
        owners, firsts, start = [], [], 0
        for expert, length in enumerate(self.lengths):
            own = range(start, start + length, TILE)
            owners += [expert] * len(own)
            firsts += own
            start += length
        return _moved(owners, self.device), _moved(firsts, self.device)


def _moved(numbers, device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(numbers, np.int32)).to(device, non_blocking=True)
