"""AdamW by torch, or in one launch by Transformer Engine or NVIDIA Apex (Loshchilov and Hutter 2019, arXiv:1711.05101).

All three compute the same formula and keep ``exp_avg`` and ``exp_avg_sq`` per parameter. torch counts updates per
parameter, the fused ones per group, so parameters of different age are put into different groups.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from copd_megatron.config.trainer import OptimizerConfig
from copd_megatron.optional import Maker


def build_adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig, maker: Maker) -> torch.optim.Optimizer:
    """An optimizer of one group, also if it is empty."""
    options: dict[str, Any] = dict(lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    # A dict is a parameter group: a stage below the first adapted layer has an empty one.
    groups = [{"params": list(parameters)}]
    if maker == "te":
        from megatron.core.optimizer import Adam  # Transformer Engine's, as it is importable

        return Adam(groups, adam_w_mode=True, **options)
    if maker == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **options)
    return torch.optim.AdamW(groups, **options)


def moments(adamw: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """exp_avg, exp_avg_sq and step of a parameter that was updated; whoever made the optimizer."""
    own = dict(adamw.state[parameter])
    if "step" not in own:
        group = next(g for g in adamw.param_groups if any(p is parameter for p in g["params"]))
        own["step"] = torch.tensor(float(group["step"]))
    return {name: own[name] for name in ("exp_avg", "exp_avg_sq", "step")}


def restore(adamw: torch.optim.Optimizer, state: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
    """Inverse of ``moments`` for many parameters; those without state start afresh."""
    if isinstance(adamw, torch.optim.AdamW):
        for parameter, own in state.items():
            adamw.state[parameter] = dict(own)
        return
    for parameter, own in state.items():
        adamw.state[parameter] = {name: value for name, value in own.items() if name != "step"}
    adamw.param_groups[:] = by_age(adamw.param_groups, {p: int(own["step"]) for p, own in state.items()})
    if hasattr(adamw, "param_groups_master"):  # Apex walks through both side by side, and stops at the shorter one
        adamw.param_groups_master = [{"params": [None] * len(group["params"])} for group in adamw.param_groups]


def by_age(groups: Sequence[Mapping[str, Any]], updates: Mapping[nn.Parameter, int]) -> list[dict[str, Any]]:
    """The groups, cut so that all parameters of one were updated equally often; 0 times where nothing is said."""
    cut = []
    for group in groups:
        ages = [updates.get(p, 0) for p in group["params"]]
        for age in sorted(set(ages)) or [0]:
            members = [p for p, own in zip(group["params"], ages) if own == age]
            cut.append({**group, "params": members, "step": age})
    return cut
