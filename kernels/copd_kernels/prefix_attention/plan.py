"""Which tokens meet in which dense product: spans sorted into padded blocks, once per microbatch.

Causal products need no mask when shorter spans are padded on the right; products with a trunk need
none when every trunk of the block has the same length. So no block ever carries a mask.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PADDING_LIMIT = 1.25
"""A causal block may hold at most this many times its real tokens."""


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
class TrunkBlock:
    """Leaves of several trunks of one length: queries [B, Q] against keys [B, P]."""

    queries: Block
    keys: Block


@dataclass(frozen=True)
class Plan:
    """All blocks of one stream."""

    causal: tuple[Block, ...]
    """Spans against themselves."""
    trunk: tuple[TrunkBlock, ...]
    """Leaves against their trunks."""
    tokens: int

    @classmethod
    def build(cls, spans: Sequence[tuple[int, int, int, int]], tokens: int, device: torch.device) -> Plan:
        """Sort spans (see ``reference.prefix_attention``) into blocks."""
        by_length = sorted(((start, stop) for start, stop, *_ in spans), key=lambda s: s[1] - s[0], reverse=True)
        causal, line, real = [], [], 0
        for start, stop in by_length:
            longest = line[0][1] - line[0][0] if line else 0
            if line and longest * (len(line) + 1) > PADDING_LIMIT * (real + stop - start):
                causal.append(line)
                line, real = [], 0
            line.append((start, stop))
            real += stop - start
        if line:
            causal.append(line)
        members = defaultdict(list)
        for start, stop, trunk_start, trunk_stop in spans:
            if trunk_stop > trunk_start:
                members[trunk_start, trunk_stop].append(np.arange(start, stop))
        by_trunk_length = defaultdict(list)
        for (trunk_start, trunk_stop), leaves in members.items():
            by_trunk_length[trunk_stop - trunk_start].append((trunk_start, np.concatenate(leaves)))
        trunk = tuple(
            TrunkBlock(Block.build([rows for _, rows in group], device),
                       Block.build([np.arange(start, start + length) for start, _ in group], device))
            for length, group in by_trunk_length.items())
        blocks = tuple(Block.build([np.arange(*s) for s in line], device) for line in causal)
        return cls(blocks, trunk, tokens)
