"""What a teacher says about the tokens of one completion, and how it is rounded and packed for the wire.

Every path, co-hosted experts included, passes the same codec, so that placement never changes the training.
The log-mass outside the top-k is set after rounding, so that head and tail sum to 1.

Shape suffixes: T completion tokens, K top-k ids, H hidden size.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from copd_megatron.losses.topk_kl import log_tail

Kind = Literal["sampled", "topk", "full"]
WIRE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Signal:
    """A teacher's signal for one completion of T tokens. Example: ``Signal("sampled", logprobs_T)``."""

    kind: Kind
    logprobs_T: Tensor
    """Natural log-prob of each sampled token; there for every kind."""
    topk_ids_TK: Tensor | None = None
    """int64, most likely first; kind ``topk``."""
    topk_logprobs_TK: Tensor | None = None
    log_tail_T: Tensor | None = None
    """Natural log of the mass outside the K ids; -inf where none is left."""
    hidden_TH: Tensor | None = None
    """Final-normed hidden states; kind ``full``: teachers share the frozen head."""


@dataclass(frozen=True)
class Codec:
    """Rounds signals to ``wire_dtype`` and packs them into bytes and back.

    Float64 signals stay exact when the wire is float32 and ``exact`` is set (equality tests in float64).
    """

    kind: Kind
    wire_dtype: str = "float32"
    topk: int = 0
    """K; kind ``topk`` only."""
    hidden_size: int = 0
    """H; kind ``full`` only."""
    exact: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of floats on the wire."""
        return torch.float64 if self.exact else WIRE[self.wire_dtype]

    def bytes_per_token(self) -> int:
        """Payload of one completion token."""
        size = self.dtype.itemsize
        return {"sampled": size, "topk": size + self.topk * (4 + size), "full": size + self.hidden_size * size}[self.kind]

    def round(self, signal: Signal) -> Signal:
        """The signal as the other side will read it."""
        back = torch.float64 if self.exact else torch.float32
        through = lambda x: x.to(self.dtype).to(back)  # noqa: E731
        if self.kind == "topk":
            logprobs_TK = through(signal.topk_logprobs_TK)
            return Signal("topk", through(signal.logprobs_T), signal.topk_ids_TK, logprobs_TK, log_tail(logprobs_TK))
        if self.kind == "full":
            return Signal("full", through(signal.logprobs_T), hidden_TH=through(signal.hidden_TH))
        return Signal("sampled", through(signal.logprobs_T))

    def pack(self, signals: Sequence[Signal], device: torch.device) -> Tensor:
        """[tokens, bytes_per_token] uint8: all signals, one row per token."""
        if not signals:
            return torch.empty(0, self.bytes_per_token(), dtype=torch.uint8, device=device)
        columns = [torch.cat([s.logprobs_T for s in signals]).to(self.dtype)[:, None]]
        if self.kind == "topk":
            columns += [torch.cat([s.topk_ids_TK for s in signals]).to(torch.int32),
                        torch.cat([s.topk_logprobs_TK for s in signals]).to(self.dtype)]
        if self.kind == "full":
            columns.append(torch.cat([s.hidden_TH for s in signals]).to(self.dtype))
        return torch.cat([c.contiguous().view(torch.uint8).view(len(c), -1) for c in columns], 1)

    def unpack(self, rows: Tensor, lengths: Sequence[int]) -> list[Signal]:
        """Inverse of ``pack`` for signals of the given lengths; equal to ``round`` of what was packed."""
        size, back = self.dtype.itemsize, torch.float64 if self.exact else torch.float32
        floats = lambda part: part.contiguous().view(self.dtype).to(back)  # noqa: E731
        pieces = [[x[:, 0] for x in floats(rows[:, :size]).split(list(lengths))]]
        if self.kind == "topk":
            middle = size + 4 * self.topk
            ids = rows[:, size:middle].contiguous().view(torch.int32).long()
            logprobs = floats(rows[:, middle:])
            pieces += [ids.split(list(lengths)), logprobs.split(list(lengths)),
                       log_tail(logprobs).split(list(lengths))]
            return [Signal("topk", *parts) for parts in zip(*pieces)]
        if self.kind == "full":
            hidden = floats(rows[:, size:]).split(list(lengths))
            return [Signal("full", a, hidden_TH=h) for a, h in zip(pieces[0], hidden)]
        return [Signal("sampled", a) for a in pieces[0]]
