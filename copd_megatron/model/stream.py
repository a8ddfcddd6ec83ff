"""Spans placed one after the other as the rows of a stream, and this rank's share of them as tensors.

A stream has one part, or two: trunks that need no gradient, then the leaves that attend to them. The rows of
each part are shared out by themselves (``row_share``), padding at its end belongs to no span.

Shapes: T rows of this context rank, S rows of this rank (S = T without sequence parallelism).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copd_kernels.prefix_attention.plan import Plan
from copd_kernels.prefix_attention.plan import Span as Piece
from copd_megatron.model.row_share import RowLayout, RowShare, local_slices, pieces_of
from copd_megatron.platform import on_device
from copd_megatron.types import Prompt

Routes = tuple[tuple[str, Tensor | slice], ...]
"""(expert, rows) of adapted rows."""


@dataclass(frozen=True)
class Span:
    """A trunk or a leaf of a stream, before it has a place."""

    lane: str | None
    token_ids: np.ndarray
    positions: np.ndarray
    """[3, tokens]."""
    prompt: int
    """Index of its prompt in the pack."""
    trunk: tuple | None
    """Key of the trunk it attends to; None for trunks."""
    adapted_from: int
    """Offset of the first adapted token in the span."""
    visual_tokens: np.ndarray
    """Offsets in the span that carry visual features (all of the prompt's, or none)."""


@dataclass(frozen=True)
class Part:
    """Rows of a stream that pass a layer in one call."""

    rows: slice
    """Among the T rows of this context rank: inside attention and MLP."""
    shard: slice
    """Among the S rows of this rank: between them."""
    spans: tuple[tuple[int, ...], ...]
    """See ``copd_kernels.prefix_attention.plan.Span``: queries count from the part's first row on this rank, keys
    from its first row of all, trunks from the first row of the part that holds them."""
    plan: Plan
    routing: Routes
    """Of the part's rows on this context rank."""
    shard_routing: Routes | None
    """Of those on this rank: the same experts, some perhaps without rows. None without sequence parallelism."""
    key_order: Tensor | None
    """[rows of the part] brings gathered keys into the part's order; None without context parallelism."""


@dataclass(frozen=True)
class Level:
    """One placed stream: tensors on the device."""

    tokens: int
    """Real tokens of the stream, over all ranks."""
    token_ids: Tensor
    """[T] in the order in which sequence parallelism shares them out."""
    position_ids: Tensor
    """[3, T], part by part."""
    visual_index: Tensor
    """[n] of the S rows that carry visual features."""
    visual_source: Tensor
    """[n] row of the concatenated features of the pack's prompts."""
    parts: tuple[Part, ...]
    """One, or two: trunks that need no gradient, then the leaves that attend to them."""
    layout: RowLayout


def to_tensor(parts: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Integer arrays one after the other."""
    joined = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return on_device(np.ascontiguousarray(joined), device)


def place(spans: dict[tuple, Span], prompts: Sequence[Prompt], device: torch.device, share: RowShare,
          apart: bool = False, frozen: bool = False,
          outside: Mapping[tuple, range] | None = None) -> tuple[Level, dict[tuple, range]]:
    """Give every span its rows, lane by lane, so that the rows of one expert are contiguous.

    Args:
        apart: trunks come first, as a part of their own: they need no gradient.
        frozen: no row is adapted.
        outside: rows of trunks that are in no stream, among all of these.

    Returns:
        The level, and the rows of each span in the whole stream.
    """
    lanes = {lane: i for i, lane in enumerate(dict.fromkeys(s.lane for s in spans.values()))}
    order = sorted(spans, key=lambda k: (apart and k[0] != "trunk", lanes[spans[k].lane]))
    trunks = [k for k in order if k[0] == "trunk"] if apart else []
    rows, cuts, members = {}, [], [keys for keys in (trunks, order[len(trunks):]) if keys] or [[]]
    for keys in members:
        start = stop = cuts[-1].stop if cuts else 0
        for key in keys:
            rows[key] = range(stop, stop + len(spans[key].token_ids))
            stop = rows[key].stop
        cuts.append(range(start, start + share.padded(stop - start)))
    layout = RowLayout(tuple(cuts), share)
    token_ids, positions, source = _fill(spans, rows, layout.rows, prompts)
    wholes, shards = local_slices(layout, False), local_slices(layout, True)
    trunk_rows = {**rows, **(outside or {})}
    parts = tuple(_part(keys, spans, trunk_rows, cut, layout, (whole, shard), device, frozen)
                  for keys, cut, whole, shard in zip(members, cuts, wholes, shards))
    context = np.concatenate([layout.of_context(cut) for cut in layout.parts])
    mine = source[layout.mine()]
    visual_index = np.flatnonzero(mine >= 0)
    position_ids = on_device(np.ascontiguousarray(positions[:, context]), device)
    level = Level(sum(map(len, rows.values())), to_tensor([token_ids[layout.by_sequence()]], device), position_ids,
                  to_tensor([visual_index], device),
                  to_tensor([mine[visual_index]], device), parts, layout)
    return level, rows


def _fill(spans: dict[tuple, Span], rows: dict[tuple, range], total: int,
          prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the whole stream: token ids [total], positions [3, total], and which visual feature a row carries (-1:
    none)."""
    token_ids, positions = np.zeros(total, np.int64), np.zeros((3, total), np.int64)
    source = np.full(total, -1, np.int64)
    first = np.concatenate([[0], np.cumsum([len(p.visual_index) for p in prompts])]).astype(np.int64)
    for key, own in rows.items():
        span = spans[key]
        token_ids[own.start:own.stop] = span.token_ids
        positions[:, own.start:own.stop] = span.positions
        source[own.start + span.visual_tokens] = first[span.prompt] + np.arange(len(span.visual_tokens))
    return token_ids, positions, source


def _part(keys: Sequence[tuple], spans: dict[tuple, Span], rows: dict[tuple, range], cut: range, layout: RowLayout,
          places: tuple[slice, slice], device: torch.device, frozen: bool) -> Part:
    share, first = layout.share, cut.start
    chunks = [range(c.start - first, c.stop - first) for c in share.chunks(cut)]
    pieces: list[tuple[int, ...]] = []
    for key in keys:
        trunk = rows[spans[key].trunk] if spans[key].trunk is not None else range(0)
        start, stop = rows[key].start - first, rows[key].stop - first
        if share.context == 1:
            pieces.append((start, stop, trunk.start, trunk.stop))
        else:
            pieces += [Piece(low, high, trunk.start, trunk.stop, start, row)
                       for low, high, row in pieces_of(start, stop, chunks)]
    whole, shard = places
    routing, shard_routing = _routing([spans[k] for k in keys], [rows[k] for k in keys], cut, layout, device, frozen)
    order = layout.key_order(cut)
    return Part(whole, shard, tuple(pieces), Plan.build(pieces, whole.stop - whole.start, device), routing,
                shard_routing, None if order is None else to_tensor([order], device))


def _routing(spans: Sequence[Span], rows: Sequence[range], cut: range, layout: RowLayout, device: torch.device,
             frozen: bool) -> tuple[Routes, Routes | None]:
    """Routes of a part on this context rank and, under sequence parallelism, on this rank."""
    share = layout.share
    experts = [] if frozen else list(dict.fromkeys(s.lane for s in spans if s.lane is not None))
    of_row = np.full(len(cut), -1)
    for span, own in zip(spans, rows):
        if span.lane in experts:
            of_row[own.start + span.adapted_from - cut.start:own.stop - cut.start] = experts.index(span.lane)
    whole = of_row[layout.of_context(cut) - cut.start]
    present = [n for n in range(len(experts)) if (whole == n).any()]
    routing = tuple((experts[n], _route(np.flatnonzero(whole == n), device)) for n in present)
    if share.sequence == 1:
        return routing, None
    mine = np.split(whole, share.sequence)[share.sequence_rank]
    return routing, tuple((experts[n], _route(np.flatnonzero(mine == n), device)) for n in present)


def _route(rows: np.ndarray, device: torch.device) -> slice | Tensor:
    """One slice where rows are contiguous, else (or where there are none) an index."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return on_device(rows, device)
