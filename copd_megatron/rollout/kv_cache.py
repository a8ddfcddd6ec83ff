"""Attention of decode steps: the prompts' KV, one copy for all lanes that share it, and each lane's own.

A lane attends to its trunk (the prefix of its prompt, evaluated once) and to its own rows so far. The two
softmaxes are merged exactly by log-sum-exp, as in ``copd_kernels.prefix_attention``; the lanes of a trunk
meet its keys in one dense product (Juravsky et al. 2024, arXiv:2402.05099). All lanes advance in lockstep, so
their own rows fill one rectangle without padding.

Shapes: L lanes, c rows per lane in a step, t own rows so far; B trunks of a block, Q lanes per trunk, P
tokens of a trunk.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from copd_kernels.prefix_attention.fused import attend, fold, unfold
from copd_kernels.prefix_attention.plan import Block
from copd_megatron.model.attention import KV
from copd_megatron.model.shared_prefix import Pack
from copd_megatron.platform import on_device

PADDING_LIMIT, PADDING_TOKENS = 1.25, 32
"""A trunk joins a block of longer ones while that pads it by at most a quarter of its length, or 32 keys."""

KEY_ALIGNMENT = 16
"""Padded blocks have a multiple of this many keys: CUDA's kernel reads the mask in aligned pieces."""

FIRST_CAPACITY = 16
"""Rows that the own caches start with; doubled when full."""


@dataclass(frozen=True, eq=False)
class PrefixBlock:
    """Trunks of similar length side by side."""

    trunks: np.ndarray
    """[B] their numbers in the wave."""
    lengths: np.ndarray
    """[B] tokens of each."""
    kv: dict[int, KV]
    """1-based layer -> K, V, each [B, kv_heads, P, d], padded on the right."""
    bias: Tensor | None
    """[B, 1, 1, P], -inf at padding; None when every trunk has length P."""

    def select(self, index: np.ndarray) -> PrefixBlock:
        """Some of the trunks."""
        where = on_device(index, next(iter(self.kv.values()))[0].device)
        kv = _select(self.kv, where)
        bias = None if self.bias is None else self.bias.index_select(0, where)
        return PrefixBlock(self.trunks[index], self.lengths[index], kv, bias)


def prefix_blocks(pack: Pack, capture: dict[int, KV], numbers: Mapping[tuple[int, str | None], int]
                  ) -> list[PrefixBlock]:
    """The trunks of an evaluated pack as blocks.

    Args:
        pack: built with ``trunks_only``.
        capture: what ``Backbone.forward`` captured: 1-based layer -> K, V of the whole stream, each
            [T, kv_heads, d]. Emptied on the way, so that memory does not double.
        numbers: (group of the pack, lane) as in ``Pack.trunk_rows`` -> number of the trunk in the wave.
    """
    blocks, gathers = [], []
    sample = next(iter(capture.values()))[0]
    keys = list(numbers)
    for run in similar_lengths([len(pack.trunk_rows[key][1]) for key in keys]):
        own = [keys[place] for place in run]
        lengths = np.array([len(pack.trunk_rows[key][1]) for key in own])
        width, bias = _padding(lengths, sample)
        columns = np.minimum(np.arange(width), lengths[:, None] - 1)
        blocks.append(PrefixBlock(np.array([numbers[key] for key in own]), lengths, {}, bias))
        starts = np.array([[rows.start for rows in pack.trunk_rows[key]] for key in own]).T
        gathers.append([on_device(first[:, None] + columns, sample.device) for first in starts])
    for layer in sorted(capture):
        level = 0 if pack.level(layer - 1) is pack.lower else 1
        kv = capture.pop(layer)
        for block, rows in zip(blocks, gathers):
            block.kv[layer] = tuple(x[rows[level]].transpose(1, 2).contiguous() for x in kv)
    return blocks


def joined_block(numbers: Sequence[int], trunks: Sequence[Mapping[int, KV]]) -> PrefixBlock:
    """Trunks that were evaluated one by one as a block.

    Args:
        numbers: of each in the wave.
        trunks: 1-based layer -> K, V, each [P, kv_heads, d], of every trunk.
    """
    sample = next(iter(trunks[0].values()))[0]
    lengths = np.array([len(next(iter(trunk.values()))[0]) for trunk in trunks])
    width, bias = _padding(lengths, sample)
    kv = {}
    for layer in trunks[0]:
        kv[layer] = tuple(sample.new_zeros(len(trunks), sample.shape[1], width, sample.shape[2]) for _ in range(2))
        for place, trunk in enumerate(trunks):
            for whole, own in zip(kv[layer], trunk[layer]):
                whole[place, :, :lengths[place]] = own.transpose(0, 1)
    return PrefixBlock(np.array(numbers), lengths, kv, bias)


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Places of trunks, longest first, cut into runs of similar length: those of a block."""
    runs: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not runs or longest > max(PADDING_LIMIT * lengths[place], lengths[place] + PADDING_TOKENS):
            runs.append([])
            longest = lengths[place]
        runs[-1].append(place)
    return runs


def _padding(lengths: np.ndarray, like: Tensor) -> tuple[int, Tensor | None]:
    """Keys of a block of trunks of these lengths, and the bias that hides those beyond a trunk's own."""
    width = int(lengths.max())
    if lengths.min() == width:
        return width, None
    width = -(-width // KEY_ALIGNMENT) * KEY_ALIGNMENT
    padding = on_device(np.arange(width) >= lengths[:, None], like.device)[:, None, None]
    bias = torch.zeros(padding.shape, dtype=like.dtype, device=like.device)
    return width, bias.masked_fill_(padding, float("-inf"))


def _select(kv: Mapping[int, KV], where: Tensor) -> dict[int, KV]:
    """Rows ``where`` of the first dim of every layer's K and V."""
    return {layer: (k.index_select(0, where), v.index_select(0, where)) for layer, (k, v) in kv.items()}


class OwnCache:
    """K and V of the rows that the lanes fed themselves; per layer [L, kv_heads, capacity, d], growing."""

    def __init__(self) -> None:
        self.length = 0
        """Rows of every lane, the current step's included."""
        self._start = 0
        self._kv: dict[int, KV] = {}

    def advance(self, rows: int) -> None:
        """Begin a step in which every lane feeds ``rows`` rows."""
        self._start, self.length = self.length, self.length + rows

    def append(self, layer: int, k: Tensor, v: Tensor) -> KV:
        """Add this step's k, v [L, kv_heads, c, d]; returns all of the layer's, views [L, kv_heads, t, d]."""
        have = self._kv.get(layer)
        if have is None or have[0].shape[2] < self.length:
            pairs = zip((k, v), have or (None, None))
            have = self._kv[layer] = tuple(self._grown(new, old) for new, old in pairs)
        for new, cache in zip((k, v), have):
            cache[:, :, self._start:self.length] = new
        return have[0][:, :, :self.length], have[1][:, :, :self.length]

    def select(self, lanes: Tensor) -> None:
        """Keep some lanes."""
        self._kv = _select(self._kv, lanes)

    def _grown(self, like: Tensor, old: Tensor | None) -> Tensor:
        capacity = max(FIRST_CAPACITY, self.length, 0 if old is None else 2 * old.shape[2])
        grown = like.new_empty(*like.shape[:2], capacity, like.shape[3])
        if old is not None:
            grown[:, :, :self._start] = old[:, :, :self._start]
        return grown


@dataclass(frozen=True, eq=False)
class _Meeting:
    """A prefix block with the lanes that attend to it."""

    block: PrefixBlock
    lanes: Block
    """[B, Q] lanes per trunk."""
    everybody: bool
    """The lanes are all lanes in order, so nothing need be gathered."""


class DecodeAttention(PackedSeqParams):
    """Attention of one decode step of L lanes; rows are lane-major, c rows per lane.

    Sits where Megatron passes ``packed_seq_params``; see ``copd_megatron.model.attention``. The first step
    may feed several rows per lane, later ones feed one.
    """

    def __init__(self, blocks: Sequence[PrefixBlock], trunk_of_lane: np.ndarray, device: torch.device,
                 backend: str = "flash"):
        """Args:
            blocks: all trunks of the wave (unused ones are dropped).
            trunk_of_lane: [L] number of each lane's trunk, -1 for none.
            backend: "reference", one plain softmax per lane, or any other: merged parts.
        """
        super().__init__(qkv_format="sbhd")
        self.device, self.backend = device, backend
        self.own = OwnCache()
        self._meet(blocks, trunk_of_lane)

    @property
    def lanes(self) -> int:
        """L."""
        return len(self.trunk_of_lane)

    def keep(self, lanes: np.ndarray) -> None:
        """Go on with some of the lanes only."""
        self.own.select(on_device(lanes, self.device))
        self._meet([meeting.block for meeting in self._meetings], self.trunk_of_lane[lanes])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[L c, heads, d] from q [L c, heads, d] and k, v [L c, kv_heads, d] of 1-based layer ``layer``.

        ``own.advance(c)`` must have been called once for the step.
        """
        q, k, v = (x.unflatten(0, (self.lanes, -1)).transpose(1, 2) for x in (q, k, v))
        keys, values = self.own.append(layer, k, v)
        if self.backend == "reference":
            out = self._reference(layer, q, keys, values)
        else:
            out = self._merged(layer, q, keys, values)
        return out.transpose(1, 2).flatten(0, 1)

    def _meet(self, blocks: Iterable[PrefixBlock], trunk_of_lane: np.ndarray) -> None:
        """Find out which lanes attend to which trunk."""
        self.trunk_of_lane = trunk_of_lane
        order = np.argsort(trunk_of_lane, kind="stable")
        trunks, first = np.unique(trunk_of_lane[order], return_index=True)
        members = dict(zip(trunks.tolist(), np.split(order, first[1:])))
        self._meetings: list[_Meeting] = []
        for block in blocks:
            used = np.flatnonzero(np.isin(block.trunks, trunks))
            if not len(used):
                continue
            block = block if len(used) == len(block.trunks) else block.select(used)
            ranges = [members[trunk] for trunk in block.trunks.tolist()]
            joined = np.concatenate(ranges)
            everybody = (np.array_equal(joined, np.arange(len(trunk_of_lane)))
                         and len({len(lanes) for lanes in ranges}) == 1)
            self._meetings.append(_Meeting(block, Block.build(ranges, self.device), everybody))

    def _merged(self, layer: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[L, heads, c, d] from q [L, heads, c, d] and own keys, values [L, kv_heads, t, d]."""
        heads, kv_heads, rows = q.shape[1], keys.shape[1], q.shape[2]
        if rows == 1:
            out, lse = (unfold(x, heads) for x in attend(fold(q, kv_heads), keys, values, False))
        elif rows == keys.shape[2]:
            repeat = heads // kv_heads
            out, lse = attend(q, keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1), True)
        else:
            raise ValueError(f"{rows} rows per lane after {keys.shape[2] - rows}; only the first step may "
                             "feed several")
        for meeting in self._meetings:
            part, part_lse = self._with_trunk(layer, q, meeting)
            if meeting.everybody:
                out, lse = _merge(out, lse, part, part_lse)
            else:
                lanes = meeting.lanes.rows
                merged, merged_lse = _merge(out[lanes], lse[lanes], part, part_lse)
                out, lse = out.index_copy(0, lanes, merged), lse.index_copy(0, lanes, merged_lse)
        return out

    def _with_trunk(self, layer: int, q: Tensor, meeting: _Meeting) -> tuple[Tensor, Tensor]:
        """Attention of a block's lanes to their trunks: out [n, heads, c, d] and lse [n, heads, c]."""
        block, (trunks, per_trunk) = meeting.block, meeting.lanes.shape
        heads, rows = q.shape[1:3]
        k, v = block.kv[layer]
        queries = q if meeting.everybody else q.index_select(0, meeting.lanes.index)
        queries = queries.unflatten(0, (trunks, per_trunk)).transpose(1, 2).flatten(2, 3)

        def back(x: Tensor) -> Tensor:
            x = unfold(x, heads).unflatten(2, (per_trunk, rows)).transpose(1, 2).flatten(0, 1)
            return x if meeting.lanes.slots is None else x.index_select(0, meeting.lanes.slots)

        part, lse = attend(fold(queries, k.shape[1]), k, v, False, block.bias)
        return back(part), back(lse)

    def _reference(self, layer: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As ``_merged``: one dense softmax per lane over its trunk and its own rows."""
        place = {int(trunk): (meeting.block, i) for meeting in self._meetings
                 for i, trunk in enumerate(meeting.block.trunks)}
        repeat, rows = q.shape[1] // keys.shape[1], q.shape[2]
        out = torch.empty_like(q)
        for lane, trunk in enumerate(self.trunk_of_lane.tolist()):
            k, v = keys[lane], values[lane]
            if trunk >= 0:
                block, i = place[trunk]
                k, v = (torch.cat([trunk_x[i, :, :block.lengths[i]], own], 1)
                        for trunk_x, own in zip(block.kv[layer], (k, v)))
            scores = q[lane] @ k.repeat_interleave(repeat, 0).transpose(1, 2) * q.shape[-1] ** -0.5
            future = torch.ones_like(scores[0], dtype=torch.bool).triu(k.shape[1] - rows + 1)
            out[lane] = scores.masked_fill(future, float("-inf")).softmax(-1) @ v.repeat_interleave(repeat, 0)
        return out


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over disjoint keys as one."""
    both = torch.logaddexp(lse, part_lse)
    merged = out * (lse - both).exp()[..., None] + part * (part_lse - both).exp()[..., None]
    return merged.to(out.dtype), both
