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

    Every rank enters it together.
    """
    foreign = []
    for expert in experts:
        owner = groups.placement.replicas_of(expert)[0]
        if groups.layout.replicas == len(groups.placement.replicas_of(expert)):
            continue
        hosted = expert in groups.hosted
        shapes = [(name, bank.local_shape(name, bank.config.rank)) for name in bank.factor_names()]
        total = sum(a * b for _, (a, b) in shapes)
        if hosted:
            parameters = bank.parameters_of(expert)
            flat = torch.cat([parameters[name].detach().reshape(-1) for name, _ in shapes])
        else:
            flat = torch.empty(total, dtype=bank.dtype, device=bank.device)
        dist.broadcast(flat, group=groups.exchange, group_src=owner)
        if not hosted:
            pieces = flat.split([a * b for _, (a, b) in shapes])
            bank.put(expert, {name: piece.view(shape) for (name, shape), piece in zip(shapes, pieces)},
                     bank.config.alpha / bank.config.rank)
            foreign.append(expert)
    try:
        yield
    finally:
        for expert in foreign:
            bank.remove(expert)
