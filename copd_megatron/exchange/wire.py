"""Bytes between replicas whose sizes both sides know: in the background, counted, and checked in debug mode.

A checked message ends in a checksum of its 64-bit words w_i, so that a torn, shifted or flipped one is noticed:

    sum_i (2 i + 1) w_i + MIX (bytes + 1)    modulo 2^64

The factors are odd: damage to any one word always shows. The last term tells zeros that were sent from a buffer
that nobody wrote.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, starmap

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from copd_megatron.platform import device

CHECKSUM_BYTES = 8
LENGTH_BYTES = 8
"""What :meth:`Wire.trade_ragged` adds per peer."""
MIX = 0x1E3779B97F4A7C15


class CorruptPayload(RuntimeError):
    """A message did not arrive as it was sent."""


class Trade:
    """One message from and to every peer, under way."""

    def __init__(self, work: dist.Work, sent: Tensor, received: Tensor, sizes: Sequence[int], checked: bool):
        self._work, self._sent, self._received, self._sizes, self._checked = work, sent, received, sizes, checked

    def wait(self) -> list[Tensor]:
        """What came from each peer, [bytes] uint8, by group rank.

        Raises:
            CorruptPayload: in debug mode, for a message with a wrong checksum.
        """
        self._work.wait()
        del self._sent  # the collective read from it until now
        messages = self._received.split(self._sizes)
        return list(starmap(_verified, enumerate(messages))) if self._checked else list(messages)


class Wire:
    """Trades bytes over one group and counts those that leave this rank."""

    def __init__(self, group: ProcessGroup, checked: bool = False):
        """``checked``: a checksum with every message, on all ranks or on none (``parallel.debug_checks``)."""
        self.group, self.checked = group, checked
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent_to = [0] * self.size
        """Bytes that left for each peer, control words included."""

    @property
    def sent_bytes(self) -> int:
        """Bytes that left this rank."""
        return sum(self.sent_to)

    def trade(self, out: Sequence[Sequence[Tensor]], sizes_in: Sequence[int]) -> Trade:
        """Send the pieces ``out[i]`` ([bytes] uint8 each) to group rank i, in a row, without waiting. All ranks of
        the group call it.

        Args:
            out: not to be written to before the trade has been waited for.
            sizes_in: bytes that come from each peer, which this rank must know.
        """
        seal = [torch.zeros(CHECKSUM_BYTES, dtype=torch.uint8, device=device())] if self.checked else []
        parts = [[*pieces, *seal] for pieces in out]
        sizes = [size + CHECKSUM_BYTES * self.checked for size in sizes_in]
        sizes_out = [_length(pieces) for pieces in parts]
        pieces = [*chain.from_iterable(parts)] or [torch.empty(0, dtype=torch.uint8, device=device())]
        sent = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        for message in sent.split(sizes_out) if self.checked else ():
            message[-CHECKSUM_BYTES:] = checksum(message[:-CHECKSUM_BYTES])
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=sent.device)
        self._count(sizes_out)
        work = dist.all_to_all_single(received, sent, sizes, sizes_out, group=self.group, async_op=True)
        return Trade(work, sent, received, sizes, self.checked)

    def trade_ragged(self, out: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """As ``trade``, and wait, where the peers' sizes are unknown: they travel first."""
        sizes = torch.tensor([_length(pieces) for pieces in out], dtype=torch.int64, device=device())
        sizes_in = torch.empty_like(sizes)
        dist.all_to_all_single(sizes_in, sizes, group=self.group)
        self._count([LENGTH_BYTES] * self.size)
        return self.trade(out, sizes_in.tolist()).wait()

    def _count(self, sizes: Sequence[int]) -> None:
        for peer, size in enumerate(sizes):
            self.sent_to[peer] += size if peer != self.rank else 0


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as [bytes] uint8, without gradient."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def from_bytes(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `as_bytes`, flat; the same memory unless it lies unaligned, as a slice of a message may."""
    return (flat.clone() if flat.storage_offset() % dtype.itemsize else flat).view(dtype)


def checksum(message: Tensor) -> Tensor:
    """[8] uint8 of a [bytes] uint8 message, see the file's head."""
    words = torch.zeros(-(-len(message) // 8), dtype=torch.int64, device=message.device)
    words.view(torch.uint8)[:len(message)] = message
    factors = 2 * torch.arange(len(words), dtype=torch.int64, device=words.device) + 1
    total = (words * factors).sum() + MIX * (len(message) + 1) % 2**63
    return total.reshape(1).view(torch.uint8)


def _length(pieces: Sequence[Tensor]) -> int:
    return sum(map(len, pieces))


def _verified(peer: int, message: Tensor) -> Tensor:
    """The message without its checksum."""
    content, theirs = message[:-CHECKSUM_BYTES], message[-CHECKSUM_BYTES:]
    if not torch.equal(checksum(content), theirs):
        raise CorruptPayload(f"the message of group rank {peer} ({len(content)} bytes) does not have the checksum it "
                             "was sent with; look for a faulty link or a write to a buffer in flight")
    return content
