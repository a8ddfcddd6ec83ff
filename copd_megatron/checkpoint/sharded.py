"""Adapters and their Adam moments as Megatron's sharded tensors, named independently of the layout.

Keys: ``adapters/{expert}/layers.3.mlp.up_proj.lora_A`` and ``optimizer/{expert}/{name}/exp_avg``. A checkpoint
written under one layout can be read under any other, because every key stands for a full factor.
"""
from __future__ import annotations

from typing import Protocol

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from copd_megatron.model.adapter_bank import AdapterBank

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer(Protocol):
    """What a checkpoint needs of an expert's optimizer."""

    updates: int

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Adam state by parameter name."""

    def load_state_dict(self, state: dict[str, dict[str, Tensor]], updates: int) -> None:
        """Inverse of ``state_dict``."""


def sharded_state(bank: AdapterBank, optimizers: dict[str, Optimizer], expert: str, with_moments: bool,
                  ) -> dict[str, ShardedTensor]:
    """This rank's shards of one hosted expert: its factors and, after the first update, its moments.

    The tensors are the live ones when saving; ``dist_checkpointing.load`` fills fresh ones of their shape.
    """
    groups = bank.groups
    replica = groups.placement.replicas_of(expert).index(groups.coords.replica)
    moments = optimizers[expert].state_dict() if with_moments else {}
    shards = {}
    for name, parameter in bank.parameters_of(expert).items():
        def sharded(key: str, data: Tensor, dim=parameter.tp_dim) -> ShardedTensor:
            offsets = () if dim is None else ((dim, groups.coords.tp, groups.layout.tp),)
            return ShardedTensor.from_rank_offsets(
                key, data, *offsets, replica_id=(replica, groups.coords.tp if dim is None else 0))

        shards[f"adapters/{expert}/{name}"] = sharded(f"adapters/{expert}/{name}", parameter.detach())
        if with_moments:
            own = moments.get(name)
            for moment in MOMENTS:
                data = own[moment] if own is not None else torch.zeros_like(parameter)
                shards[f"optimizer/{expert}/{name}/{moment}"] = sharded(f"optimizer/{expert}/{name}/{moment}", data)
    return shards


@torch.no_grad()
def restore(bank: AdapterBank, optimizer: Optimizer, expert: str, loaded: dict[str, Tensor], updates: int) -> None:
    """Put loaded shards into the bank and the optimizer of one expert."""
    state = {}
    for name, parameter in bank.parameters_of(expert).items():
        parameter.copy_(loaded[f"adapters/{expert}/{name}"])
        if updates:
            state[name] = {m: loaded[f"optimizer/{expert}/{name}/{m}"].clone() for m in MOMENTS}
            state[name]["step"] = torch.tensor(float(updates))
    optimizer.load_state_dict(state, updates)
