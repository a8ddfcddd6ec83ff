"""Which tokens meet in which product: spans sorted once per microbatch, by whoever asks first.

For torch's kernels spans are sorted into padded blocks. Causal products need no mask when shorter spans are padded on
the right; products with a trunk need none when every trunk of the block has the same length. So no block ever
carries a mask. The Triton form needs no blocks; its tables are in ``tiles``.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST_DIM = 256
"""The largest head dim of the Triton form."""

PADDING_LIMIT = 1.25
"""A causal block may hold at most this many times its real tokens."""


class Span(NamedTuple):
    """Query rows ``start`` to ``stop`` and what they attend to, in rows.

    A whole span of the stream by default. Where queries are only some rows of a longer stream of keys (context
    parallelism), a piece of a span: its own keys start at ``key`` of the key stream, and the span that it is a
    piece of at ``first``.
    """

    start: int
    stop: int
    trunk_start: int = 0
    trunk_stop: int = 0
    first: int | None = None
    key: int | None = None

    @property
    def length(self) -> int:
        """Query rows."""
        return self.stop - self.start

    @property
    def keys(self) -> tuple[int, int]:
        """Key rows of the span up to the piece's last row: (first, stop)."""
        if self.key is None:
            return self.start, self.stop
        return self.first, self.key + self.length


@dataclass(frozen=True)
class Block:
    """Rows of the stream arranged as a padded rectangle."""

    index: Tensor
    """[B x L] int64: stream row of each slot; padding slots point at some real row."""
    shape: tuple[int, int]
    slots: Tensor | None
    """int64: which slots are real; None when all are."""
    rows: Tensor
    """int64: stream rows of the real slots, in slot order."""

    @classmethod
    def build(cls, ranges: Sequence[np.ndarray], device: torch.device) -> Block:
        """One row of the block per array of stream rows."""
        length = max(len(r) for r in ranges)
        index = np.zeros((len(ranges), length), np.int64)
        real = np.zeros((len(ranges), length), bool)
        for line, (rows, mask) in zip(ranges, zip(index, real)):
            rows[:len(line)], mask[:len(line)] = line, True
        move = lambda a: torch.from_numpy(a).to(device, non_blocking=True)  # noqa: E731
        slots = None if real.all() else move(np.flatnonzero(real))
        return cls(move(index.reshape(-1)), index.shape, slots, move(index[real]))


@dataclass(frozen=True)
class Meeting:
    """Queries [B, Q] against keys [B, K], row by row of the rectangles."""

    queries: Block
    keys: Block


@dataclass(frozen=True, eq=False)
class Plan:
    """The spans of one stream, and what was derived from them."""

    pieces: tuple[Span, ...]
    """Those that have rows."""
    tokens: int
    """Query rows."""
    device: torch.device

    @classmethod
    def build(cls, spans: Sequence[tuple[int, ...]], tokens: int, device: torch.device) -> Plan:
        """Of spans as ``reference.prefix_attention`` takes them."""
        return cls(tuple(piece for piece in (Span(*span) for span in spans) if piece.length), tokens, device)

    @cached_property
    def causal(self) -> tuple[Meeting, ...]:
        """Pieces against themselves."""
        return tuple(_causal(line, self.device) for line in _lines(self.pieces))

    @cached_property
    def earlier(self) -> tuple[Meeting, ...]:
        """Pieces against the rows of their span before them; none where queries are the whole stream."""
        members = defaultdict(list)
        for piece in self.pieces:
            first, stop = piece.keys
            if stop - first > piece.length:
                members[first, stop - piece.length].append(np.arange(piece.start, piece.stop))
        return _dense(members, self.device)

    @cached_property
    def trunk(self) -> tuple[Meeting, ...]:
        """Leaves against their trunks."""
        members = defaultdict(list)
        for piece in self.pieces:
            if piece.trunk_stop > piece.trunk_start:
                members[piece.trunk_start, piece.trunk_stop].append(np.arange(piece.start, piece.stop))
        return _dense(members, self.device)

    @cached_property
    def tables(self) -> dict:
        """What ``tiles`` derived for a size of tile; filled there."""
        return {}


def _lines(pieces: Sequence[Span]) -> list[list[Span]]:
    """Pieces of similar length together, longest first."""
    lines, line, real = [], [], 0
    for piece in sorted(pieces, key=lambda p: p.length, reverse=True):
        if line and line[0].length * (len(line) + 1) > PADDING_LIMIT * (real + piece.length):
            lines.append(line)
            line, real = [], 0
        line.append(piece)
        real += piece.length
    return [*lines, line] if line else lines


def _causal(line: Sequence[Span], device: torch.device) -> Meeting:
    queries = Block.build([np.arange(p.start, p.stop) for p in line], device)
    if all(p.key is None for p in line):
        return Meeting(queries, queries)
    return Meeting(queries, Block.build([np.arange(p.keys[1] - p.length, p.keys[1]) for p in line], device))


def _dense(members: dict[tuple[int, int], list[np.ndarray]], device: torch.device) -> tuple[Meeting, ...]:
    """Ranges of keys with the queries that see all of them, ranges of equal length in one block."""
    by_length = defaultdict(list)
    for (start, stop), queries in members.items():
        by_length[stop - start].append((start, np.concatenate(queries)))
    return tuple(Meeting(Block.build([rows for _, rows in group], device),
                         Block.build([np.arange(start, start + length) for start, _ in group], device))
                 for length, group in by_length.items())
