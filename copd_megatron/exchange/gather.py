"""Adapters of experts that live elsewhere, brought to this replica as frozen copies.

Adapters are small, so evaluation, merging and agreement measurements fetch them whole: one broadcast per
expert over the exchange group, shard by shard (same pp, cp, tp on both sides).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.parallel.groups import Groups


@contextmanager
def gathered_adapters(bank: AdapterBank, groups: Groups, experts: Sequence[str]) -> Iterator[None]:
    """Within the block every replica holds every expert; foreign ones are frozen copies of this moment.

    Every rank enters it together. Blocks do not nest.
    """
    foreign = []
    try:
        for expert in experts:
            if len(groups.placement.replicas_of(expert)) == groups.layout.replicas:
                continue
            if expert not in groups.hosted:
                foreign.append(expert)
            _share(bank, groups, expert)
        yield
    finally:
        for expert in foreign:
            bank.remove(expert)


def _share(bank: AdapterBank, groups: Groups, expert: str) -> None:
    """Broadcast one expert's shards from the first replica that hosts it; the others keep a copy."""
    hosted = expert in groups.hosted
    shapes = {name: bank.local_shape(name, bank.config.rank) for name in bank.factor_names()}
    sizes = [rows * cols for rows, cols in shapes.values()]
    if hosted:
        parameters = bank.parameters_of(expert)
        pieces = [parameters[name].detach().flatten() for name in shapes]
    else:
        pieces = [torch.empty(size, dtype=bank.dtype, device=bank.device) for size in sizes]
    if pieces:  # stages below the first adapted layer have none
        flat = torch.cat(pieces)
        dist.broadcast(flat, group=groups.exchange, group_src=groups.placement.replicas_of(expert)[0])
        pieces = flat.split(sizes)
    if not hosted:
        bank.put(expert, {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces)},
                 bank.config.alpha / bank.config.rank)
