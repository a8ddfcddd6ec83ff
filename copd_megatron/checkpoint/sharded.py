"""Adapters and their Adam moments as Megatron's sharded tensors, named independently of the layout.

Keys: ``adapters/{expert}/layers.3.mlp.up_proj.lora_A`` and ``optimizer/{expert}/{name}/exp_avg``. A
checkpoint written under one layout can be read under any other, because every key stands for a full factor.

The files are those of ``megatron.core.dist_checkpointing``, and its ``load`` reads them. Its ``save`` (0.19)
is not used: it starts a helper process on every rank, which costs seconds and outlives a killed rank, and a
rank that cannot write leaves the others waiting. PyTorch's writer, on which it builds, tells every rank.
"""
from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from copd_megatron.model.adapter_bank import AdapterBank

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer(Protocol):
    """What a checkpoint needs of an expert's optimizer."""

    updates: int

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Adam state by parameter name."""

    def load_state_dict(self, state: dict[str, dict[str, Tensor]], updates: int) -> None:
        """Inverse of ``state_dict``."""


def write_shards(folder: Path, bank: AdapterBank, optimizers: Mapping[str, Optimizer],
                 updates: Mapping[str, int], world: ProcessGroup) -> None:
    """Write every expert's factors and, from its first update on, its moments. Every rank calls it.

    Raises:
        OSError: on every rank, if any rank could not write.
    """
    shards = {key: [shard] for key, shard in _shards(bank, optimizers, updates).items()
              if is_main_replica(shard.replica_id)}
    if dist.get_rank(world) == 0:
        nothing = ShardedObject("common_state", {}, (1,), (0,))  # dist_checkpointing.load insists on one
        shards[nothing.unique_key] = [nothing]
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False,
                               flatten_sharded_tensors=False)
    try:
        torch_checkpoint.save(mcore_to_pyt_state_dict(shards), planner=planner, process_group=world,
                              storage_writer=torch_checkpoint.FileSystemWriter(folder))
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        if not isinstance(reason, OSError | RuntimeError):  # torch.save may turn the one into the other
            raise
        raise OSError(f"rank {rank}: {reason}") from error
    if dist.get_rank(world) == 0:
        save_config(CheckpointingConfig("torch_dist"), str(folder))


def read_shards(folder: Path, bank: AdapterBank, optimizers: Mapping[str, Optimizer],
                updates: Mapping[str, int]) -> None:
    """Fill this rank's hosted experts and their optimizers, in place, from what ``write_shards`` wrote."""
    with warnings.catch_warnings():  # torch's remarks about how Megatron 0.19 calls it
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        # The tensors given to ``load`` are filled in place, so the adapters need no copying afterwards.
        loaded = dist_checkpointing.load(_shards(bank, optimizers, updates), str(folder),
                                         validate_access_integrity=False)
    for expert in bank.groups.hosted:
        moments = {}
        if count := updates[expert]:
            moments = {name: {m: loaded[f"optimizer/{expert}/{name}/{m}"] for m in MOMENTS}
                       | {"step": torch.tensor(float(count))} for name in bank.parameters_of(expert)}
        optimizers[expert].load_state_dict(moments, count)


def _shards(bank: AdapterBank, optimizers: Mapping[str, Optimizer], updates: Mapping[str, int],
            ) -> dict[str, ShardedTensor]:
    """This rank's shards of the experts it hosts, by key; moments that do not exist yet are zeros."""
    shards = {}
    for expert in bank.groups.hosted:
        state = optimizers[expert].state_dict()
        for name, parameter in bank.parameters_of(expert).items():
            tensors = {f"adapters/{expert}/{name}": parameter.detach()}
            if updates[expert]:
                moments = state.get(name) or {moment: torch.zeros_like(parameter) for moment in MOMENTS}
                tensors |= {f"optimizer/{expert}/{name}/{moment}": moments[moment] for moment in MOMENTS}
            for key, tensor in tensors.items():
                shards[key] = _shard(bank, expert, key, tensor, parameter.tp_dim)
    return shards


def _shard(bank: AdapterBank, expert: str, key: str, data: Tensor, tp_dim: int | None) -> ShardedTensor:
    """One tensor of this rank, placed in its full tensor; copies on other ranks have other replica ids."""
    groups = bank.groups
    coords = groups.coords
    host = groups.placement.replicas_of(expert).index(coords.replica)
    place = () if tp_dim is None else ((tp_dim, coords.tp, groups.layout.tp),)
    copy = (host, coords.cp, coords.tp if tp_dim is None else 0)
    return ShardedTensor.from_rank_offsets(key, data.detach(), *place, replica_id=copy)
