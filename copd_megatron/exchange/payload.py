"""What a teacher says about the tokens of one completion, and how it is rounded and packed for the wire.

Every path, co-hosted experts included, passes the same codec, so that placement never changes the training.
The tail, the log-mass outside the top-k, travels in float32 as the teacher has it; after a narrow wire the
head is scaled by one factor per token, so that both sum to 1 again:

    log p_k = round(log p_k) + log(1 - tail) - log sum_j exp(round(log p_j))

The other way round, a tail that is what rounding left of 1, is off by as much as all rounding errors
together: beside a peaked head it is often 0, which a reverse KL punishes by tens of nats times the student's
own tail. The sampled token's log-prob is not narrowed, so that equal experts differ by exactly 0.

Shape suffixes: T completion tokens, K top-k ids, H hidden size.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from copd_megatron.exchange.wire import as_bytes, from_bytes
from copd_megatron.losses.topk_kl import log_tail

Kind = Literal["sampled", "topk", "student_topk", "full"]
BLOCK = 4096
"""Tokens."""
WIRE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Signal:
    """A teacher's signal for one completion of T tokens. Example: ``Signal("sampled", logprobs_T)``."""

    kind: Kind
    logprobs_T: Tensor
    """Natural log-prob of each sampled token; there for every kind."""
    topk_ids_TK: Tensor | None = None
    """int64: the teacher's most likely ones, that one first (``topk``), or the student's (``student_topk``)."""
    topk_logprobs_TK: Tensor | None = None
    """The teacher's log-probs at these ids."""
    log_tail_T: Tensor | None = None
    """Natural log of the mass outside the K ids, set by the codec; -inf where none is left."""
    hidden_TH: Tensor | None = None
    """Final-normed hidden states; kind ``full``: teachers share the frozen head."""


@dataclass(frozen=True)
class Codec:
    """Rounds signals to ``wire_dtype`` and packs them into bytes and back.

    Decoded floats are float32, or float64 when ``exact`` is set: then nothing is rounded (equality tests in
    float64).
    """

    kind: Kind
    wire_dtype: str = "float32"
    """Of top-k log-probs and hidden states; the sampled token's log-prob is always float32."""
    topk: int = 0
    """K; kinds ``topk`` and ``student_topk``, whose ids the student knows, so that they do not travel."""
    hidden_size: int = 0
    """H; kind ``full`` only."""
    exact: bool = False

    @property
    def decoded_dtype(self) -> torch.dtype:
        """Of floats after decoding."""
        return torch.float64 if self.exact else torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """Of top-k log-probs and hidden states on the wire."""
        return torch.float64 if self.exact else WIRE[self.wire_dtype]

    def bytes_per_token(self) -> int:
        """Payload of one completion token."""
        return sum(dtype.itemsize * math.prod(row) for dtype, row in self._columns())

    def round(self, signals: Sequence[Signal]) -> list[Signal]:
        """The signals as the other side will read them."""
        read = self._read(self._narrow(signals), [len(signal.logprobs_T) for signal in signals]) if signals else []
        if self.kind == "student_topk":
            return [replace(new, topk_ids_TK=signal.topk_ids_TK) for new, signal in zip(read, signals)]
        return read

    def pack(self, signals: Sequence[Signal]) -> list[Tensor]:
        """Pieces of a message, [bytes] uint8 each: one column of all tokens after the other.

        Raises:
            ValueError: a signal of another kind, K or H.
        """
        return [as_bytes(column) for column in self._narrow(signals)] if signals else []

    def unpack(self, message: Tensor, lengths: Sequence[int]) -> list[Signal]:
        """Inverse of ``pack``, its pieces in a row, for signals of the given lengths; equal to ``round`` of them.

        Signals of kind ``student_topk`` come without their ids.

        Raises:
            ValueError: a message of another length.
        """
        tokens = sum(lengths)
        if message.shape != (tokens * self.bytes_per_token(),):
            raise ValueError(f"{tuple(message.shape)} bytes; signals of lengths {list(lengths)} have "
                             f"{(tokens * self.bytes_per_token(),)}")
        parts = message.split([tokens * dtype.itemsize * math.prod(row) for dtype, row in self._columns()])
        return self._read([from_bytes(part, dtype).view(tokens, *row)
                           for part, (dtype, row) in zip(parts, self._columns())], lengths)

    def _columns(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """(dtype, shape) of what a token carries, in order; wide numbers first, so that they lie aligned."""
        own = (self.decoded_dtype, ())
        if self.kind in ("topk", "student_topk"):
            ids = [(torch.int32, (self.topk,))] if self.kind == "topk" else []
            return [own, own, *ids, (self.dtype, (self.topk,))]
        return [own, (self.dtype, (self.hidden_size,))] if self.kind == "full" else [own]

    def _narrow(self, signals: Sequence[Signal]) -> list[Tensor]:
        """The columns of all tokens, as they travel."""
        if other := [signal.kind for signal in signals if signal.kind != self.kind]:
            raise ValueError(f"a signal of kind {other[0]}; this codec packs {self.kind}")
        columns = [torch.cat([signal.logprobs_T for signal in signals])]
        if self.kind in ("topk", "student_topk"):
            head_TK = torch.cat([signal.topk_logprobs_TK for signal in signals])
            ids = [torch.cat([signal.topk_ids_TK for signal in signals])] if self.kind == "topk" else []
            columns += [_in_blocks(lambda block: log_tail(block.double()), head_TK), *ids, head_TK]
        if self.kind == "full":
            columns.append(torch.cat([signal.hidden_TH for signal in signals]))
        for column, (_, row) in zip(columns, self._columns()):
            if column.shape[1:] != row:
                raise ValueError(f"signals of kind {self.kind} hold {tuple(column.shape)}; {['tokens', *row]}")
        return [column.to(dtype) for column, (dtype, _) in zip(columns, self._columns())]

    def _read(self, columns: Sequence[Tensor], lengths: Sequence[int]) -> list[Signal]:
        """Signals, in memory of their own, of what travelled."""
        wide = [column.to(self.decoded_dtype if column.is_floating_point() else torch.int64, copy=True)
                for column in columns]
        if self.kind in ("topk", "student_topk") and self.dtype != self.decoded_dtype:
            wide[-1] = _in_blocks(_scaled_to, wide[-1], wide[1])
        return [self._signal(*part) for part in zip(*(column.split(list(lengths)) for column in wide))]

    def _signal(self, own_T: Tensor, *others: Tensor) -> Signal:
        """One signal of its columns."""
        if self.kind in ("topk", "student_topk"):
            tail_T, *ids_TK, head_TK = others
            return Signal(self.kind, own_T, *(ids_TK or [None]), head_TK, tail_T)
        return Signal(self.kind, own_T, hidden_TH=others[0] if self.kind == "full" else None)


def _in_blocks(function: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """``function`` of some tokens at a time, [T, ...] each: float64 copies of all would leave the caches."""
    return torch.cat([function(*block) for block in zip(*(column.split(BLOCK) for column in columns))])


def _scaled_to(logprobs_TK: Tensor, log_tail_T: Tensor) -> Tensor:
    """Rounded log-probs, scaled so that head and tail sum to 1; in float64, lest the order of sums shows.

    A head of less mass than float32 can say (a teacher that knows nothing of the student's ids) stays as it is.
    """
    rounded = logprobs_TK.double()
    head_T = (-torch.expm1(log_tail_T.double())).log()
    scale_T = (head_T - rounded.logsumexp(1)).masked_fill(head_T.isinf(), 0)
    return rounded.add_(scale_T[:, None]).to(logprobs_TK.dtype)
