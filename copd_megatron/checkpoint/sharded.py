"""Adapters and their Adam moments as Megatron's sharded tensors, named independently of the layout.

Keys: ``adapters/{expert}/layers.3.mlp.up_proj.lora_A`` and ``optimizer/{expert}/{name}/exp_avg``. A
checkpoint written under one layout can be read under any other, because every key stands for a full factor.

The files are those of ``megatron.core.dist_checkpointing``, and its ``load`` reads them. Its ``save`` (0.19)
is not used: it starts a helper process on every rank, which costs seconds and outlives a killed rank, and a
rank that cannot write leaves the others waiting. Here a rank plans and writes its part without a word to the
others, so a thread can do it while training uses the network; one rank makes the index of all parts.
"""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from copd_megatron.model.adapter_bank import AdapterBank, Cut

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer(Protocol):
    """What a checkpoint needs of an expert's optimizer."""

    updates: int

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Adam state by parameter name."""

    def load_state_dict(self, state: dict[str, dict[str, Tensor]], updates: int) -> None:
        """Inverse of ``state_dict``."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank has to write: copies in host memory, which training does not touch."""

    rank: int
    planner: MCoreSavePlanner
    plan: SavePlan

    @property
    def is_empty(self) -> bool:
        """Whether other ranks write everything that this one holds."""
        return not self.plan.items


@dataclass(frozen=True)
class Part:
    """What one rank has written: what the index needs to know."""

    plan: SavePlan
    results: list[WriteResult]

    @property
    def files(self) -> list[str]:
        """Names of the files, within the folder."""
        return sorted({result.storage_data.relative_path for result in self.results})


def take_snapshot(bank: AdapterBank, optimizers: Mapping[str, Optimizer], updates: Mapping[str, int],
                  rank: int) -> Snapshot:
    """This rank's part of every hosted expert's factors and, from its first update on, its moments. Local."""
    shards = {}
    for key, shard in _shards(bank, optimizers, updates).items():
        if is_main_replica(shard.replica_id):
            shard.data = shard.data.to("cpu", copy=True)
            shards[key] = [shard]
    if rank == 0:
        nothing = ShardedObject("common_state", {}, (1,), (0,))  # dist_checkpointing.load insists on one
        shards[nothing.unique_key] = [nothing]
    planner = _planner()
    planner.set_up_planner(state_dict=mcore_to_pyt_state_dict(shards), is_coordinator=rank == 0)
    return Snapshot(rank, planner, planner.create_local_plan())


def write_part(folder: Path, snapshot: Snapshot) -> Part:
    """Write a snapshot's files, flushed to disk; waits for nobody.

    Raises:
        OSError: the disk refuses.
    """
    writer = FileSystemWriter(folder)
    # Without collectives torch names files by rank, so that ranks need not agree on names.
    writer.set_up_storage_writer(snapshot.rank == 0, rank=snapshot.rank, use_collectives=False)
    plan = snapshot.planner.finish_plan(writer.prepare_local_plan(snapshot.plan))
    try:
        return Part(plan, writer.write_data(plan, snapshot.planner).wait())
    except RuntimeError as error:  # torch.save may turn the system's error into one
        raise OSError(str(error)) from error


def write_index(folder: Path, parts: Sequence[Part]) -> list[str]:
    """Make the parts of all ranks one checkpoint; returns the names of the files that say so.

    Raises:
        OSError: the disk refuses.
        ValueError: the parts overlap or leave gaps.
    """
    before = {file.name for file in folder.iterdir()}
    _, metadata = _planner().create_global_plan([part.plan for part in parts])
    FileSystemWriter(folder).finish(metadata, [part.results for part in parts])
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    return sorted({file.name for file in folder.iterdir()} - before)


def _planner() -> MCoreSavePlanner:
    return MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)


def read_shards(folder: Path, bank: AdapterBank, optimizers: Mapping[str, Optimizer],
                updates: Mapping[str, int]) -> None:
    """Fill this rank's hosted experts and their optimizers, in place, from what all ranks' parts hold.

    Args:
        updates: of the experts in the checkpoint; hosted experts that it does not name are left alone.
    """
    with warnings.catch_warnings():  # torch's remarks about how Megatron 0.19 calls it
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        # The tensors given to ``load`` are filled in place, so the adapters need no copying afterwards.
        loaded = dist_checkpointing.load(_shards(bank, optimizers, updates), str(folder),
                                         validate_access_integrity=False)
    for expert in _hosted(bank, updates):
        bank.changed(expert)
        moments = {}
        if count := updates[expert]:
            moments = {name: {m: loaded[f"optimizer/{expert}/{name}/{m}"] for m in MOMENTS}
                       | {"step": torch.tensor(float(count))} for name in bank.parameters_of(expert)}
        optimizers[expert].load_state_dict(moments, count)


def _shards(bank: AdapterBank, optimizers: Mapping[str, Optimizer], updates: Mapping[str, int],
            ) -> dict[str, ShardedTensor]:
    """This rank's shards of the experts it hosts, by key; moments that do not exist yet are zeros."""
    shards = {}
    for expert in _hosted(bank, updates):
        state = optimizers[expert].state_dict()
        for name, parameter in bank.parameters_of(expert).items():
            tensors = {f"adapters/{expert}/{name}": parameter.detach()}
            if updates[expert]:
                moments = state.get(name) or {moment: torch.zeros_like(parameter) for moment in MOMENTS}
                tensors |= {f"optimizer/{expert}/{name}/{moment}": moments[moment] for moment in MOMENTS}
            for key, tensor in tensors.items():
                shards[key] = _shard(bank, expert, key, tensor, parameter.cut)
    return shards


def _hosted(bank: AdapterBank, updates: Mapping[str, int]) -> list[str]:
    return [expert for expert in bank.groups.hosted if expert in updates]


def _shard(bank: AdapterBank, expert: str, key: str, data: Tensor, cut: Cut | None) -> ShardedTensor:
    """One tensor of this rank, placed in its full tensor; copies on other ranks have other replica ids."""
    groups = bank.groups
    coords = groups.coords
    host = groups.placement.replicas_of(expert).index(coords.replica)
    place = () if cut is None else ((cut.dim, cut.of_rank(coords.tp), cut.pieces),)
    copy = (host, coords.cp, coords.tp if cut is None else coords.tp % cut.copies)
    return ShardedTensor.from_rank_offsets(key, data.detach(), *place, replica_id=copy)
