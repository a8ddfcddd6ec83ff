"""What a teacher says about the tokens of one completion, and how it is rounded and packed for the wire.

Every path, co-hosted experts included, passes the same codec, so that placement never changes the training.
The tail, the log-mass outside the top-k, travels in float32 as the teacher has it; after a narrow wire the
head is scaled by one factor per token, so that both sum to 1 again:

    log p_k = round(log p_k) + log(1 - tail) - log sum_j exp(round(log p_j))

Both sums are taken in float64, lest their order, which depends on what lies beside a token, shows in float32.

The other way round, a tail that is what rounding left of 1, is off by as much as all rounding errors
together: beside a peaked head it is often 0, which a reverse KL punishes by tens of nats times the student's
own tail. The sampled token's log-prob is not narrowed, so that equal experts differ by exactly 0.

Shape suffixes: T completion tokens, K top-k ids, H hidden size.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from copd_megatron.exchange.wire import from_bytes
from copd_megatron.platform import device

Kind = Literal["sampled", "topk", "student_topk", "full"]
BLOCK = {"cpu": 2**16, "cuda": 2**24}
"""Log-probs that are float64 at a time: such that they stay in a core's cache; in few launches."""
WIRE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Signal:
    """A teacher's signal for one completion of T tokens. Example: ``Signal("sampled", logprobs_T)``."""

    kind: Kind
    logprobs_T: Tensor | None = None
    """Natural log-prob of each sampled token; None for kind ``full``, whose student has the teacher's logits."""
    topk_ids_TK: Tensor | None = None
    """int64: the teacher's most likely ones, that one first (``topk``), or the student's (``student_topk``)."""
    topk_logprobs_TK: Tensor | None = None
    """The teacher's log-probs at these ids."""
    log_tail_T: Tensor | None = None
    """Natural log of the mass outside the K ids, set by the codec; -inf where none is left."""
    hidden_TH: Tensor | None = None
    """Final-normed hidden states; kind ``full``: teachers share the frozen head."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.hidden_TH if self.logprobs_T is None else self.logprobs_T)


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
        return sum(dtype.itemsize * math.prod(row) for dtype, row in self._columns().values())

    @torch.no_grad()
    def round(self, signals: Sequence[Signal]) -> list[Signal]:
        """The signals as the other side will read them; ids are the given tensors.

        Raises:
            ValueError: a signal of another kind, K or H.
        """
        if not signals:
            return []
        columns, wire = self._joined(signals), self._columns()
        for name, column in columns.items():
            column.copy_(column.to(wire[name][0]))
        return self._read(columns, [signal.topk_ids_TK for signal in signals], [s.tokens for s in signals])

    @torch.no_grad()
    def pack(self, signals: Sequence[Signal]) -> Tensor:
        """A message, [bytes] uint8: one column of all tokens after the other.

        Raises:
            ValueError: a signal of another kind, K or H.
        """
        tokens = sum(signal.tokens for signal in signals)
        message = torch.empty(tokens * self.bytes_per_token(), dtype=torch.uint8, device=device())
        if signals:
            places = self._views(message, tokens)
            for name, column in self._joined(signals).items():
                places[name].copy_(column)
            if self.kind == "topk":
                torch.cat([signal.topk_ids_TK for signal in signals], out=places["topk_ids_TK"])
        return message

    @torch.no_grad()
    def unpack(self, message: Tensor, lengths: Sequence[int]) -> list[Signal]:
        """Inverse of ``pack`` for signals of the given lengths, in memory of their own; equal to ``round`` of them.

        Signals of kind ``student_topk`` come without their ids.

        Raises:
            ValueError: a message of another length.
        """
        tokens = sum(lengths)
        if message.shape != (tokens * self.bytes_per_token(),):
            raise ValueError(f"{tuple(message.shape)} bytes; signals of lengths {list(lengths)} have "
                             f"{(tokens * self.bytes_per_token(),)}")
        columns = self._views(message, tokens)
        ids = columns.pop("topk_ids_TK").long().split(list(lengths)) if self.kind == "topk" else [None] * len(lengths)
        return self._read(columns, ids, lengths, copy=True)

    def _columns(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """(dtype, shape) of what a token carries, by field of `Signal`; wide numbers first: they lie aligned."""
        if self.kind == "full":
            return {"hidden_TH": (self.dtype, (self.hidden_size,))}
        own = (self.decoded_dtype, ())
        columns = {"logprobs_T": own}
        if self.kind in ("topk", "student_topk"):
            columns |= {"log_tail_T": own, "topk_logprobs_TK": (self.dtype, (self.topk,))}
        if self.kind == "topk":
            columns["topk_ids_TK"] = (torch.int32, (self.topk,))
        return dict(sorted(columns.items(), key=lambda column: -column[1][0].itemsize))

    def _views(self, message: Tensor, tokens: int) -> dict[str, Tensor]:
        """The columns of a message, [tokens, ...] each; its own memory where it lies aligned."""
        columns = self._columns()
        parts = message.split([tokens * dtype.itemsize * math.prod(row) for dtype, row in columns.values()])
        return {name: from_bytes(part, dtype).view(tokens, *row)
                for part, (name, (dtype, row)) in zip(parts, columns.items())}

    def _joined(self, signals: Sequence[Signal]) -> dict[str, Tensor]:
        """Columns of all tokens as the teacher has them, tails included, in new memory. Ids, half of what a teacher
        says, stay where they are."""
        wanted = {name: row for name, (_, row) in self._columns().items() if name != "log_tail_T"}
        for signal in signals:
            if signal.kind != self.kind:
                raise ValueError(f"a signal of kind {signal.kind}; this codec packs {self.kind}")
            for name, row in wanted.items():
                if (shape := tuple(getattr(signal, name).shape))[1:] != row:
                    raise ValueError(f"signals of kind {self.kind} hold {shape}; {['tokens', *row]}")
        columns = {name: torch.cat([getattr(signal, name) for signal in signals])
                   for name in wanted if name != "topk_ids_TK"}
        if "topk_logprobs_TK" in columns:
            columns["log_tail_T"] = torch.log1p(-_mass(columns["topk_logprobs_TK"]).clamp_max(1))  # as topk_kl.log_tail
        return columns

    def _read(self, columns: Mapping[str, Tensor], ids: Sequence[Tensor | None], lengths: Sequence[int],
              copy: bool = False) -> list[Signal]:
        """Signals of what travelled; with ``copy`` they share no memory with the columns."""
        wide = {name: column.to(self.decoded_dtype, copy=copy) for name, column in columns.items()}
        if "topk_logprobs_TK" in wide and self.dtype != self.decoded_dtype:
            _scale_(wide["topk_logprobs_TK"], wide["log_tail_T"])
        parts = zip(*(column.split(list(lengths)) for column in wide.values()))
        return [Signal(self.kind, **dict(zip(wide, part)), topk_ids_TK=own) for part, own in zip(parts, ids)]


def _mass(logprobs_TK: Tensor) -> Tensor:
    """[T] float64 sums of probabilities; no maximum is taken out, as float64 reaches down to e^-745."""
    tokens = max(1, BLOCK[logprobs_TK.device.type] // max(1, logprobs_TK.shape[1]))
    return torch.cat([block.to(torch.float64, copy=True).exp_().sum(1) for block in logprobs_TK.split(tokens)])


def _scale_(logprobs_TK: Tensor, log_tail_T: Tensor) -> None:
    """Scale rounded log-probs, in place, so that head and tail sum to 1.

    A head of less mass than float32 can say (a teacher that knows nothing of the student's ids) stays as it is.
    """
    head_T = (-torch.expm1(log_tail_T.double())).log()
    scale_T = (head_T - _mass(logprobs_TK).log()).masked_fill(head_T.isinf(), 0)
    logprobs_TK += scale_T[:, None].to(logprobs_TK.dtype)
