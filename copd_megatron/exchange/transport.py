"""What a step's exchange would move by either transport, and which one moves less.

    scatter          = sum over requests that leave their replica of a few integers + tokens x payload
    gather_adapters  = (teacher, replica that hosts a student of it but not the teacher) x adapter

summed over all ranks, tensor-parallel copies included: what ``Wire`` counts, but for its few bytes per peer
(sizes, numbers of rounds, checksums). Scatter grows with the tokens, gather_adapters with the experts only.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from copd_megatron.exchange.answers import ROUND_BYTES
from copd_megatron.exchange.gather import teacher_copies
from copd_megatron.exchange.payload import Codec, Kind
from copd_megatron.exchange.request import HEADER, ID_BYTES, ScoreRequest
from copd_megatron.exchange.scatter import host_of
from copd_megatron.model.adapter_bank import MODULE_OF, AdapterBank
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.platform import device
from copd_megatron.types import Edge

Transport = Literal["scatter", "gather_adapters"]


@dataclass(frozen=True)
class StepBytes:
    """Bytes between replicas in one step, over all ranks, by either transport."""

    scatter: int
    gather_adapters: int

    @property
    def cheaper(self) -> Transport:
        """Scatter unless gathering the adapters moves less."""
        return "gather_adapters" if self.gather_adapters < self.scatter else "scatter"

    @classmethod
    def count(cls, asked: Sequence[ScoreRequest], edges: Iterable[Edge], groups: Groups,
              codecs: Mapping[Kind, Codec], adapter_bytes: int) -> StepBytes:
        """The same on every rank; all ranks of the exchange group call it together.

        Args:
            asked: this replica's own requests.
            adapter_bytes: of one expert over the ranks of a replica, see `adapter_bytes`.
        """
        mine = [r for r in asked if host_of(r, groups) != groups.coords.replica]
        scatter = torch.tensor([sum(request_bytes(r, codecs[r.kind], groups.layout) for r in mine)],
                               dtype=torch.int64, device=device())
        if groups.layout.replicas > 1:
            dist.all_reduce(scatter, group=groups.exchange)
        return cls(int(scatter), len(teacher_copies(edges, groups.placement)) * adapter_bytes)


def request_bytes(request: ScoreRequest, codec: Codec, layout: Layout) -> int:
    """What one request and its answer move by ``scatter`` where they leave the replica, over its ranks."""
    tokens = len(request.token_ids)
    out = ID_BYTES * (HEADER + tokens)
    back = ROUND_BYTES + tokens * codec.bytes_per_token()
    if request.kind == "student_topk":
        back += ID_BYTES * codec.topk * tokens
    return layout.tp * layout.cp * (layout.pp * out + back)


def adapter_bytes(bank: AdapterBank) -> int:
    """Of one expert's adapters over all ranks of a replica, the copies of whole factors under TP included."""
    numbers = 0
    for target in bank.config.targets:
        layers = sum(bank.spec.has_linear(i, target) for i in range(bank.config.first_layer, bank.spec.num_layers))
        for factor in ("lora_A", "lora_B"):
            rows, cols = bank.local_shape(f"layers.0.{MODULE_OF[target]}.{target}.{factor}", bank.config.rank)
            numbers += layers * rows * cols
    return bank.dtype.itemsize * numbers * bank.groups.layout.tp * bank.groups.layout.cp
