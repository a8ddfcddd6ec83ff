"""An expert that begins as a PEFT adapter and not as the backbone: the same function, bit by bit of its factors.

    W + s_p B_p A_p  =  W + s [(s_p / s) B_p | 0] [A_p ; A_new]        s = adapter.alpha / adapter.rank

Ranks that the adapter lacks, and weights that it does not adapt, begin as a new expert's do: A drawn, B zero. They add
nothing and can learn. Nothing is rounded: s_p / s must be a power of two.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.peft import check_section, read_peft_adapter
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.types import UserError

SAME = 1e-12
"""Relative difference of two scalings that are one number written differently (alpha / r in floating point)."""


@torch.no_grad()
def start_expert(bank: AdapterBank, expert: str, folder: Path, invocation_token_ids: Sequence[int] | None) -> None:
    """Lay a PEFT adapter over an expert that was just added. Every rank that hosts it calls it and reads the folder.

    Raises:
        UserError: the folder is broken or does not fit the backbone or the adapter section; the same on every rank.
    """
    where = f"experts.{expert}.init_from: adapter {folder}"
    adapter = read_peft_adapter(folder, bank.spec)
    check_section(adapter, bank.config, invocation_token_ids, where)
    ratio = _ratio(adapter, bank, where)
    for name, parameter in bank.parameters_of(expert).items():
        if name not in adapter.factors:
            continue
        full = adapter.factors[name]
        shard = bank.shard(name, full).to(parameter)
        if not torch.equal(shard.to(full.dtype).cpu(), bank.shard(name, full)):
            raise UserError(f"{where}: {name} is {full.dtype}, which {parameter.dtype} cannot hold; adapters are "
                            f"trained in {parameter.dtype}; save the adapter in it")
        if name.endswith("lora_A"):
            parameter[:len(shard)] = shard
        else:
            parameter[:, :shard.shape[1]] = shard * ratio


def _ratio(adapter: Adapter, bank: AdapterBank, where: str) -> float:
    """What B is multiplied with, a power of two."""
    config = bank.config
    rank = max(adapter.factors[f"{module}.lora_A"].shape[0] for module in adapter.modules())
    if rank > config.rank:
        raise UserError(f"{where}: rank {rank}; adapter.rank is {config.rank}, and what is larger does not fit; raise "
                        f"adapter.rank to {rank} or more, or cut the adapter: tools/convert_checkpoint.py peft --rank")
    ratio = adapter.scaling / (config.alpha / config.rank)
    if abs(ratio - 1) <= SAME:
        return 1.0
    if math.frexp(ratio)[0] != 0.5:
        raise UserError(f"{where}: scaling (lora_alpha / r) {adapter.scaling:.9g}; adapter.alpha / adapter.rank is "
                        f"{config.alpha / config.rank:.9g}, and only a power of two between them keeps every bit; set "
                        f"adapter.alpha={adapter.scaling * config.rank:.12g}")
    return ratio
