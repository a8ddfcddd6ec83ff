"""Adapters of experts that live elsewhere, brought to this replica as frozen copies.

Adapters are small. Evaluation, merging and agreement measurements fetch all of them: one broadcast per expert
over the exchange group (`gathered_adapters`). Transport ``gather_adapters`` fetches an OPD step's teachers, each
to the replicas that host a student of it and to no other: one all-to-all (`gathered_teachers`). Always shard by
shard (same pp, cp, tp on both sides), exactly, at the weights of the moment.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.exchange.wire import Wire, as_bytes, from_bytes
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import Edge


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


@contextmanager
def gathered_teachers(bank: AdapterBank, groups: Groups, edges: Iterable[Edge], wire: Wire) -> Iterator[None]:
    """Within the block every replica holds the teachers of its own students; foreign ones are frozen copies.

    Every rank enters it together, with the same edges. Blocks do not nest.
    """
    here, shapes = groups.coords.replica, _shapes(bank)
    copies = teacher_copies(edges, groups.placement)
    leaving = [[expert for expert, source, to in copies if source == here and to == peer]
               for peer in range(wire.size)]
    coming = [[expert for expert, source, to in copies if to == here and source == peer]
              for peer in range(wire.size)]
    size = bank.dtype.itemsize * sum(rows * cols for rows, cols in shapes.values())
    pieces = {expert: [as_bytes(factor) for factor in _factors(bank, expert, shapes)]
              for expert in {e for some in leaving for e in some}}
    messages = wire.trade([[piece for e in some for piece in pieces[e]] for some in leaving],
                          [size * len(some) for some in coming]).wait()
    foreign = [expert for some in coming for expert in some]
    try:
        for some, message in zip(coming, messages):
            for expert, part in zip(some, message.view(len(some), size)):
                _put(bank, expert, from_bytes(part, bank.dtype), shapes)
        yield
    finally:
        for expert in foreign:
            bank.remove(expert)


def teacher_copies(edges: Iterable[Edge], placement: Placement) -> list[tuple[str, int, int]]:
    """(teacher, replica that sends, replica that receives), in expert order: what `gathered_teachers` moves.

    A replica that hosts the teacher needs no copy. A teacher's replicas share the sending.
    """
    students: dict[str, set[int]] = {}
    for edge in edges:
        students.setdefault(edge.teacher, set()).update(placement.replicas_of(edge.student))
    copies = []
    for teacher in placement.experts:
        hosts = placement.replicas_of(teacher)
        copies += [(teacher, hosts[to % len(hosts)], to) for to in sorted(students.get(teacher, set()) - set(hosts))]
    return copies


def _share(bank: AdapterBank, groups: Groups, expert: str) -> None:
    """Broadcast one expert's shards from the first replica that hosts it; the others keep a copy."""
    hosted, shapes = expert in groups.hosted, _shapes(bank)
    flat = torch.empty(sum(rows * cols for rows, cols in shapes.values()), dtype=bank.dtype, device=bank.device)
    if hosted and shapes:  # stages below the first adapted layer have none
        torch.cat([factor.flatten() for factor in _factors(bank, expert, shapes)], out=flat)
    if shapes:
        dist.broadcast(flat, group=groups.exchange, group_src=groups.placement.replicas_of(expert)[0])
    if not hosted:
        _put(bank, expert, flat, shapes)


def _shapes(bank: AdapterBank) -> dict[str, tuple[int, int]]:
    """Of every factor's shard on this rank."""
    return {name: bank.local_shape(name, bank.config.rank) for name in bank.factor_names()}


def _factors(bank: AdapterBank, expert: str, shapes: Mapping[str, tuple[int, int]]) -> list[Tensor]:
    """One hosted expert's shards."""
    parameters = bank.parameters_of(expert)
    return [parameters[name].detach() for name in shapes]


def _put(bank: AdapterBank, expert: str, flat: Tensor, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Add a frozen copy from its shards in a row."""
    pieces = flat.split([rows * cols for rows, cols in shapes.values()])
    bank.put(expert, {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces)},
             bank.config.alpha / bank.config.rank)
