"""Which rows of a stream each rank of a replica holds: shares of context, then of sequence parallelism.

A part of the stream, padded, is cut into 2 CP chunks, and context rank c holds chunks c and 2 CP - 1 - c: causal
attention then costs all ranks about the same (the order that Megatron-Core uses too). Under sequence parallelism
(Korthikanti et al. 2022, arXiv:2205.05198) these rows are cut once more, into one piece per tensor-parallel rank.

Host side, NumPy only: every rank knows where every row is.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class RowShare:
    """A rank's place among those that share out rows. Example: ``RowShare(context=2, context_rank=1)``."""

    context: int = 1
    """CP size."""
    context_rank: int = 0
    sequence: int = 1
    """TP size under sequence parallelism, else 1."""
    sequence_rank: int = 0

    @property
    def is_split(self) -> bool:
        """Whether rows are shared out at all."""
        return self.context * self.sequence > 1

    @property
    def unit(self) -> int:
        """A part has a multiple of this many rows."""
        return self.sequence if self.context == 1 else self.context * math.lcm(2, self.sequence)

    def padded(self, rows: int) -> int:
        """Rows of a part after padding."""
        return -(-rows // self.unit) * self.unit

    def chunks(self, part: range, context_rank: int | None = None) -> list[range]:
        """Rows of a padded part that a context rank (this one by default) holds, in its order."""
        if self.context == 1:
            return [part]
        rank = self.context_rank if context_rank is None else context_rank
        size = len(part) // (2 * self.context)
        return [part[n * size:(n + 1) * size] for n in (rank, 2 * self.context - 1 - rank)]


WHOLE = RowShare()
"""Every rank holds every row."""


@dataclass(frozen=True)
class RowLayout:
    """The padded parts of one stream and where their rows are."""

    parts: tuple[range, ...]
    """Rows of each part, one after the other."""
    share: RowShare

    @property
    def rows(self) -> int:
        """Rows of the stream, padding included."""
        return self.parts[-1].stop

    def of_context(self, part: range, context_rank: int | None = None) -> np.ndarray:
        """Rows of a part on all sequence ranks of a context rank (this one by default)."""
        return np.concatenate([np.arange(c.start, c.stop) for c in self.share.chunks(part, context_rank)])

    def mine(self) -> np.ndarray:
        """Rows of this rank, part by part."""
        return self._of(self.share.context_rank, self.share.sequence_rank)

    def by_sequence(self) -> np.ndarray:
        """Rows of this context rank in the order of its sequence ranks."""
        return np.concatenate([self._of(self.share.context_rank, s) for s in range(self.share.sequence)])

    def _of(self, context_rank: int, sequence_rank: int) -> np.ndarray:
        pieces = [np.split(self.of_context(part, context_rank), self.share.sequence)[sequence_rank]
                  for part in self.parts]
        return np.concatenate(pieces)

    @cached_property
    def _everywhere(self) -> list[np.ndarray]:
        """Rows of each rank, sequence ranks fastest: the order in which gathers put them."""
        return [self._of(c, s) for c in range(self.share.context) for s in range(self.share.sequence)]

    def gathered_places(self) -> np.ndarray:
        """[rows] place of each row in all ranks' rows one after the other."""
        places = np.empty(self.rows, np.int64)
        places[np.concatenate(self._everywhere)] = np.arange(self.rows)
        return places

    def key_order(self, part: range) -> np.ndarray | None:
        """[rows of the part] place of each in the rows of all context ranks one after the other."""
        if self.share.context == 1:
            return None
        gathered = np.concatenate([self.of_context(part, c) for c in range(self.share.context)])
        order = np.empty(len(part), np.int64)
        order[gathered - part.start] = np.arange(len(part))
        return order

    def share_out(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Which of its rows this rank contributes so that a gather brings the ``wanted`` rows together.

        Returns:
            Places among this rank's own rows, as many on every rank (filled up with place 0), and the place of each
            wanted row in what is gathered (None where rows are not shared out).
        """
        if not self.share.is_split:
            return wanted, None
        order = np.empty(len(wanted), np.int64)
        owners = np.empty(self.rows, np.int64)
        places = np.empty(self.rows, np.int64)
        for rank, rows in enumerate(self._everywhere):
            owners[rows], places[rows] = rank, np.arange(len(rows))
        owner = owners[wanted]
        most = max(1, int(np.bincount(owner, minlength=1).max()) if len(owner) else 1)
        for rank in range(len(self._everywhere)):
            where = np.flatnonzero(owner == rank)
            order[where] = rank * most + np.arange(len(where))
        here = self.share.context_rank * self.share.sequence + self.share.sequence_rank
        own = np.zeros(most, np.int64)
        mine = places[wanted[owner == here]]
        own[:len(mine)] = mine
        return own, order


def local_slices(layout: RowLayout, shards: bool) -> list[slice]:
    """Each part's rows among those of this context rank, or with ``shards`` of this rank."""
    divisor = layout.share.context * (layout.share.sequence if shards else 1)
    stops = np.cumsum([len(part) // divisor for part in layout.parts]).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops)]


def pieces_of(start: int, stop: int, chunks: Sequence[range]) -> list[tuple[int, int, int]]:
    """(local start, local stop, first row) of what the chunks, laid end to end, hold of rows start to stop."""
    found, offset = [], 0
    for chunk in chunks:
        low, high = max(start, chunk.start), min(stop, chunk.stop)
        if low < high:
            found.append((offset + low - chunk.start, offset + high - chunk.start, low))
        offset += len(chunk)
    return found
