"""What a teacher says about the tokens of one completion, and how it is rounded and packed for the wire.

Every path, co-hosted experts included, passes the same codec, so that placement never changes the training.
Top-k log-probs are rounded down: the mass of the head then never exceeds 1, and the tail, which is what is
left of 1 after rounding, is never smaller than the teacher's own. Rounding to nearest would now and then
leave no tail at all, which a reverse KL punishes without measure. The sampled token's log-prob is not
narrowed, so that equal experts differ by exactly 0.

Shape suffixes: T completion tokens, K top-k ids, H hidden size.
"""
from __future__ import annotations

import math
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
    """K; kind ``topk`` only."""
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
        """Payload of one completion token; the tail is computed at the other end."""
        return sum(dtype.itemsize * width for dtype, width in self._columns())

    def round(self, signal: Signal) -> Signal:
        """The signal as the other side will read it."""
        return self.unpack(self.pack([signal], signal.logprobs_T.device), [len(signal.logprobs_T)])[0]

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
        columns[0] = columns[0][:, 0]
        if self.kind == "topk":  # in float64, so that the order of the sum cannot show
            columns.append(log_tail(columns[2].double()).to(self.decoded_dtype))
        return [Signal("full", own[0], hidden_TH=own[1]) if self.kind == "full" else Signal(self.kind, *own)
                for own in zip(*(column.split(list(lengths)) for column in columns))]

    def _columns(self) -> list[tuple[torch.dtype, int]]:
        """(dtype, width) of what a token carries, in order."""
        others = {"sampled": [], "topk": [(torch.int32, self.topk), (self.dtype, self.topk)],
                  "full": [(self.dtype, self.hidden_size)]}
        return [(self.decoded_dtype, 1), *others[self.kind]]

    def _values(self, signal: Signal) -> list[Tensor]:
        """The tensors of the columns, [T, width] each."""
        if signal.kind != self.kind:
            raise ValueError(f"a signal of kind {signal.kind}; this codec packs {self.kind}")
        own = signal.logprobs_T[:, None]
        if self.kind == "topk":
            return [own, signal.topk_ids_TK, _round_down(signal.topk_logprobs_TK, self.dtype)]
        return [own, signal.hidden_TH] if self.kind == "full" else [own]


def _round_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To a narrower float type, never upwards."""
    rounded = values.to(dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded.to(values.dtype) > values, below, rounded)
