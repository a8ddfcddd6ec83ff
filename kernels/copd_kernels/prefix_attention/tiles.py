"""Work lists of the Triton form: which rows a program has and what they meet. Host side, NumPy, once per microbatch.

Forward and the gradient of queries go by *query tiles*: rows next to each other that share a trunk, so that the trunk
is one dense product for all of them, whichever leaf they belong to. The gradients of keys and values go by *key
tiles*: keys next to each other that the same leaves see, with the runs of query rows that see all of them (*dense*)
or some (*masked*). A key tile that very many rows see is cut into several programs, whose parts are added in order.

Key positions are those of the stream of keys; a row sees its own span's keys in [low, high).
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copd_kernels.prefix_attention.plan import Plan, Span

SHORT = 4
"""Spans of at most this many tiles share tiles with their neighbours; longer ones would drag each other's keys in."""

MOST_ROWS = 8192
"""Query rows that one program of a key tile takes at most."""

Run = tuple[int, int]


@dataclass(frozen=True)
class QueryTiles:
    """For tiles of a fixed number of rows."""

    tiles: Tensor
    """[n, 7] int32, most work first: row, row_stop, trunk_start, trunk_stop, own_start, own_dense, own_stop. All rows
    see own keys [own_start, own_dense), some see those up to own_stop."""
    bounds: Tensor
    """[T, 2] int32: low and high of every row; 0, 0 outside all spans."""


@dataclass(frozen=True)
class KeyTiles:
    """For tiles of a fixed number of keys."""

    items: Tensor
    """[n, 6] int32, most work first: key, key_stop, then a, b, c: runs [a, b) are masked and [b, c) dense, slot. An
    item with slot -1 has its tile to itself."""
    runs: Tensor
    """[m, 2] int32: query rows [start, stop)."""
    sums: Tensor
    """[s, 4] int32: key, key_stop, first slot, number of slots: tiles that several items share."""
    slots: int


def query_tiles(plan: Plan, rows: int) -> QueryTiles:
    """Tiles of at most ``rows`` query rows."""
    key = "queries", rows
    if key not in plan.tables:
        plan.tables[key] = _query_tiles(plan, rows)
    return plan.tables[key]


def key_tiles(plan: Plan, keys: int, trunks: bool) -> KeyTiles:
    """Tiles of at most ``keys`` keys of the stream; ``trunks``: they are in the stream, and leaves see them."""
    key = "keys", keys, trunks
    if key not in plan.tables:
        plan.tables[key] = _key_tiles(plan, keys, trunks)
    return plan.tables[key]


def _query_tiles(plan: Plan, rows: int) -> QueryTiles:
    bounds = np.zeros((plan.tokens, 2), np.int32)
    tiles = []
    for run in _neighbours(plan.pieces, SHORT * rows):
        for piece in run:
            first, stop = piece.keys
            bounds[piece.start:piece.stop, 0] = first
            bounds[piece.start:piece.stop, 1] = np.arange(stop - piece.length, stop) + 1
        start, stop = run[0].start, run[-1].stop
        cuts = np.arange(start, stop, rows)
        low, high = bounds[start:stop, 0], bounds[start:stop, 1]
        own, dense, end = (f.reduceat(x, cuts - start) for f, x in
                           ((np.minimum, low), (np.minimum, high), (np.maximum, high)))
        alone = own == np.maximum.reduceat(low, cuts - start)
        trunk = np.full_like(own, run[0].trunk_start), np.full_like(own, run[0].trunk_stop)
        tiles.append(np.stack([cuts, np.minimum(cuts + rows, stop), *trunk, own, np.where(alone, dense, own), end], 1))
    table = np.concatenate(tiles) if tiles else np.zeros((0, 7))
    work = table[:, 3] - table[:, 2] + table[:, 6] - table[:, 4]
    return QueryTiles(_moved(table[np.argsort(-work, kind="stable")], plan.device), _moved(bounds, plan.device))


def _neighbours(pieces: Iterable[Span], short: int) -> list[list[Span]]:
    """Pieces whose rows may share tiles: next to each other, of one trunk, and short, with keys that are close."""
    runs: list[list[Span]] = []
    for piece in sorted(pieces):
        last = runs[-1][-1] if runs else None
        first, stop = piece.keys
        if (last is not None and last.stop == piece.start and last[2:4] == piece[2:4] and stop - first <= short
                and last.keys[1] - last.keys[0] <= short and 0 <= first - last.keys[1] <= short):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


@dataclass
class _Segment:
    """Keys [start, stop) that the same leaves see whole, and the pieces that have them as their own."""

    start: int
    stop: int
    leaves: list[Run]
    owners: list[Span]


def _segments(pieces: Sequence[Span], trunks: bool) -> list[_Segment]:
    leaves = defaultdict(list)
    if trunks:
        for piece in pieces:
            if piece.trunk_stop > piece.trunk_start:
                leaves[piece.trunk_start, piece.trunk_stop].append((piece.start, piece.stop))
    borders = sorted({border for piece in pieces for border in piece.keys} | {b for pair in leaves for b in pair})
    place = {border: n for n, border in enumerate(borders)}
    segments = [_Segment(start, stop, [], []) for start, stop in zip(borders, borders[1:])]
    for (start, stop), rows in leaves.items():
        for segment in segments[place[start]:place[stop]]:
            segment.leaves = _joined([*segment.leaves, *rows])
    for piece in pieces:
        first, stop = piece.keys
        for segment in segments[place[first]:place[stop]]:
            segment.owners.append(piece)
    return [segment for segment in segments if segment.leaves or segment.owners]


def _key_tiles(plan: Plan, keys: int, trunks: bool) -> KeyTiles:
    items, runs, sums, slots = [], [], [], 0
    for start, stop, leaves, owners in _cut(_segments(plan.pieces, trunks), keys):
        masked, dense = _seen(owners, start, stop)
        chunks = _chunks(_joined([*leaves, *dense]), MOST_ROWS) or [[]]
        if len(chunks) > 1:
            sums.append((start, stop, slots, len(chunks)))
        for number, chunk in enumerate(chunks):
            some = masked if number == 0 else []
            ends = len(runs), len(runs) + len(some), len(runs) + len(some) + len(chunk)
            runs += [*some, *chunk]
            slot = slots + number if len(chunks) > 1 else -1
            items.append((sum(b - a for a, b in (*some, *chunk)), start, stop, *ends, slot))
        slots += len(chunks) if len(chunks) > 1 else 0
    items.sort(key=lambda item: -item[0])
    table = np.array(items).reshape(-1, 7)[:, 1:]
    return KeyTiles(_moved(table, plan.device), _moved(np.array(runs).reshape(-1, 2), plan.device),
                    _moved(np.array(sums).reshape(-1, 4), plan.device), slots)


def _cut(segments: Sequence[_Segment], keys: int) -> Iterable[tuple[int, int, list[Run], list[Span]]]:
    """Tiles of at most ``keys``: start, stop, rows that see all of it as their trunk, pieces that own some of it."""
    pending: list[_Segment] = []  # Short ones without leaves, next to each other.
    for segment in (*segments, None):
        joins = pending and segment is not None and not segment.leaves and pending[-1].stop == segment.start
        if pending and not (joins and segment.stop - pending[0].start <= keys):
            owners = list(dict.fromkeys(piece for part in pending for piece in part.owners))
            yield pending[0].start, pending[-1].stop, [], owners
            pending = []
        if segment is None:
            return
        if not segment.leaves and segment.stop - segment.start <= keys:
            pending.append(segment)
            continue
        for start in range(segment.start, segment.stop, keys):
            yield start, min(start + keys, segment.stop), segment.leaves, segment.owners


def _seen(owners: Iterable[Span], start: int, stop: int) -> tuple[list[Run], list[Run]]:
    """Rows that see some of keys [start, stop) as their own, and rows that see all of them."""
    masked, dense = [], []
    for piece in owners:
        first, last = piece.keys
        key = last - piece.length  # The key of the piece's first row.
        some = piece.start + max(0, start - key)
        every = piece.stop if first > start else min(piece.stop, piece.start + max(0, stop - 1 - key))
        masked += [(some, every)] if some < every else []
        dense += [(max(some, every), piece.stop)] if max(some, every) < piece.stop else []
    return _joined(masked), _joined(dense)


def _joined(runs: Iterable[Run]) -> list[Run]:
    """The same rows in as few runs as possible."""
    joined: list[Run] = []
    for start, stop in sorted(runs):
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined


def _chunks(runs: Iterable[Run], most: int) -> list[list[Run]]:
    """Runs cut into lists of at most ``most`` rows each."""
    chunks: list[list[Run]] = []
    room = 0
    for start, stop in runs:
        while start < stop:
            if room == 0:
                chunks.append([])
                room = most
            end = min(stop, start + room)
            chunks[-1].append((start, end))
            start, room = end, room - (end - start)
    return chunks


def _moved(table: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(table, np.int32)).to(device, non_blocking=True)
