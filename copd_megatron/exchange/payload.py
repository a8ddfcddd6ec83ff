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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from copd_megatron.losses.topk_kl import log_tail

Kind = Literal["sampled", "topk", "student_topk", "full"]
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
        return sum(dtype.itemsize * width for dtype, width in self._columns())

    def round(self, signal: Signal) -> Signal:
        """The signal as the other side will read it."""
        read = self.unpack(self.pack([signal], signal.logprobs_T.device), [len(signal.logprobs_T)])[0]
        return replace(read, topk_ids_TK=signal.topk_ids_TK) if self.kind == "student_topk" else read

    def pack(self, signals: Sequence[Signal], device: torch.device) -> Tensor:
        """[tokens, bytes_per_token] uint8: all signals, one row per token.

        Raises:
            ValueError: a signal of another kind, K or H.
        """
        columns = []
        for (dtype, width), values in zip(self._columns(), zip(*map(self._values, signals))):
            column = torch.cat(values)
            if column.shape[1:] != (width,):
                raise ValueError(f"signals of kind {self.kind} hold {tuple(column.shape)}; [tokens, {width}]")
            columns.append(column.to(dtype).view(torch.uint8))
        if not columns:
            return torch.empty(0, self.bytes_per_token(), dtype=torch.uint8, device=device)
        return torch.cat(columns, 1)

    def unpack(self, rows: Tensor, lengths: Sequence[int]) -> list[Signal]:
        """Inverse of ``pack`` for signals of the given lengths; equal to ``round`` of what was packed.

        Signals of kind ``student_topk`` come without their ids.

        Raises:
            ValueError: not so many rows, or not so wide.
        """
        widths = [dtype.itemsize * width for dtype, width in self._columns()]
        if rows.shape != (sum(lengths), sum(widths)):
            raise ValueError(f"{tuple(rows.shape)} bytes; signals of lengths {list(lengths)} have "
                             f"{(sum(lengths), sum(widths))}")
        columns = []
        for (dtype, _), part in zip(self._columns(), rows.split(widths, 1)):
            # A clone, not contiguous(): a single row counts as contiguous wherever it lies, aligned or not.
            values = part.clone(memory_format=torch.contiguous_format).view(dtype)
            columns.append(values.to(self.decoded_dtype if values.is_floating_point() else torch.int64))
        if self.kind in ("topk", "student_topk") and self.dtype != self.decoded_dtype:
            columns[-2] = _scaled_to(columns[-2], columns[-1])
        parts = zip(*(column.split(list(lengths)) for column in columns))
        return [self._signal(*part) for part in parts]

    def _columns(self) -> list[tuple[torch.dtype, int]]:
        """(dtype, width) of what a token carries, in order."""
        own = (self.decoded_dtype, 1)
        if self.kind == "topk":
            return [own, (torch.int32, self.topk), (self.dtype, self.topk), own]
        if self.kind == "student_topk":
            return [own, (self.dtype, self.topk), own]
        return [own, (self.dtype, self.hidden_size)] if self.kind == "full" else [own]

    def _values(self, signal: Signal) -> list[Tensor]:
        """The tensors of the columns, [T, width] each."""
        if signal.kind != self.kind:
            raise ValueError(f"a signal of kind {signal.kind}; this codec packs {self.kind}")
        own = signal.logprobs_T[:, None]
        if self.kind in ("topk", "student_topk"):
            ids = [signal.topk_ids_TK] if self.kind == "topk" else []
            tail_T = log_tail(signal.topk_logprobs_TK.double())
            return [own, *ids, signal.topk_logprobs_TK, tail_T[:, None]]
        return [own, signal.hidden_TH] if self.kind == "full" else [own]

    def _signal(self, own_T1: Tensor, *others: Tensor) -> Signal:
        """Inverse of ``_values``."""
        own_T = own_T1[:, 0]
        if self.kind in ("topk", "student_topk"):
            *ids_TK, logprobs_TK, tail_T1 = others
            return Signal(self.kind, own_T, *(ids_TK or [None]), logprobs_TK, tail_T1[:, 0])
        return Signal(self.kind, own_T, hidden_TH=others[0] if self.kind == "full" else None)


def _scaled_to(logprobs_TK: Tensor, log_tail_T1: Tensor) -> Tensor:
    """Rounded log-probs, scaled so that head and tail sum to 1; in float64, lest the order of sums shows.

    A head of less mass than float32 can say (a teacher that knows nothing of the student's ids) stays as it is.
    """
    rounded = logprobs_TK.double()
    head = (-torch.expm1(log_tail_T1.double())).log()
    scale = head - rounded.logsumexp(1, keepdim=True)
    return (rounded + scale.masked_fill(head.isinf(), 0)).to(logprobs_TK.dtype)
